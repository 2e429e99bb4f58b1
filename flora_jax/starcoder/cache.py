"""The key/value cache: a pytree of per-layer buffers that a step takes, donated, and returns.

Buffers are per layer, not stacked: a scan over a stacked cache makes XLA copy and double-buffer it.
Knows nothing of tokens or adapters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.starcoder.config import StarCoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, ``[B, S, G, K]`` each; a position is its index on ``S``."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array

    def write(self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> LayerCache:
        """Stores new keys and values at their positions; positions outside ``[0, S)`` are dropped."""
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        length = self.k_BSGK.shape[1]
        # A negative index would count from the end: send it out of range instead.
        slots_BT = jnp.where(positions_BT < 0, length, positions_BT)
        return LayerCache(
            self.k_BSGK.at[rows_B1, slots_BT].set(k_BTGK, mode="drop"),
            self.v_BSGK.at[rows_B1, slots_BT].set(v_BTGK, mode="drop"),
        )


Cache = list[LayerCache]


def init_cache(config: StarCoderConfig, rows: int, length: int, dtype: Any) -> Cache:
    """Empty buffers for ``rows`` sequences of up to ``length`` tokens."""
    shape = (rows, length, config.kv_heads, config.head_dim)
    return [
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)
    ]


def cache_bytes_per_token(config: StarCoderConfig, dtype: Any) -> int:
    """Bytes that one token of one sequence takes in all layers."""
    return 2 * config.n_layer * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
