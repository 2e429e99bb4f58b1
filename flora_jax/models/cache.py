"""The key/value cache: blocks of a few positions that rows own, as a pytree that a step donates.

Every layer has a pool of blocks of its own; a row's table says which block holds which of its positions,
the same in all layers. Buffers are per layer, not stacked: a scan over a stacked cache makes XLA copy
and double-buffer it. Who owns which block is the caller's affair. Knows nothing of tokens or adapters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from flora_jax.models.family import ModelConfig

# Where a token without a place stands: nothing is stored, and nothing sees it.
NOWHERE = -1


@dataclasses.dataclass(frozen=True)
class SplitHeads:
    """The queries' heads are cut along an axis of a mesh; so are those of keys and values (``own``), or
    the one of them is whole on every device.
    """

    mesh: Mesh
    axis: str
    own: bool

    @property
    def pools(self) -> PartitionSpec:
        """Of the keys and values, ``[L, S, G, K]``."""
        return PartitionSpec(None, None, self.axis if self.own else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paging:
    """Where the positions of a batch's rows lie, the same in every layer.

    ``table [B, M]``, int32: the block of positions ``m·S`` to ``m·S + S - 1``; a number outside the
    pool where there is none. ``stretches``: how many stretches of keys attention looks at, an int32
    scalar; ``None`` is all of them, with a trip count that is known when compiling. ``attention``: a name
    of :data:`flora_jax.models.cached_attention.IMPLEMENTATIONS`, static. ``heads``: how the heads lie on
    devices that share them, static.
    """

    table_BM: Any
    stretches: Any = None
    attention: str = dataclasses.field(default="loop", metadata=dict(static=True))
    heads: SplitHeads | None = dataclasses.field(default=None, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, ``[L, S, G, K]`` each: ``L`` blocks of ``S`` positions."""

    k_LSGK: jax.Array
    v_LSGK: jax.Array

    def write(
        self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array, paging: Paging
    ) -> LayerCache:
        """Stores keys and values at their positions; those without a block are dropped."""
        blocks, block = self.k_LSGK.shape[:2]
        width = paging.table_BM.shape[1]
        at_BT = positions_BT // block
        block_BT = jnp.take_along_axis(paging.table_BM, jnp.clip(at_BT, 0, width - 1), axis=1)
        placed_BT = (positions_BT >= 0) & (at_BT < width) & (block_BT >= 0)
        # Numbers past the pool, each once: a scatter of unique places has no order that could matter, and
        # a GPU told to be deterministic needs no sort.
        nowhere_BT = blocks + jnp.arange(block_BT.size, dtype=block_BT.dtype).reshape(
            block_BT.shape
        )
        block_BT = jnp.where(placed_BT, block_BT, nowhere_BT)
        slot_BT = positions_BT % block

        def put(pool_LSGK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
            place = pool_LSGK.at[block_BT, slot_BT]
            return place.set(new_BTGK, mode="drop", unique_indices=True)

        return LayerCache(put(self.k_LSGK, k_BTGK), put(self.v_LSGK, v_BTGK))

    def read(self, block_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values ``[B, M·S, G, K]`` of some blocks; zeros where a number is no block."""
        batch = block_BM.shape[0]

        def get(pool_LSGK: jax.Array) -> jax.Array:
            own = pool_LSGK.at[block_BM].get(mode="fill", fill_value=0)
            return own.reshape(batch, -1, *own.shape[3:])

        return get(self.k_LSGK), get(self.v_LSGK)


Cache = list[LayerCache]


def init_cache(config: ModelConfig, blocks: int, block: int, dtype: Any) -> Cache:
    """Empty pools of ``blocks`` blocks of ``block`` positions for every layer."""
    shape = (blocks, block, config.kv_heads, config.head_dim)
    return [
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)
    ]


def contiguous(rows: int, length: int, block: int) -> Paging:
    """A table that gives each of ``rows`` rows the next blocks of a pool, for ``length`` positions."""
    width = -(-length // block)
    return Paging(jnp.asarray(np.arange(rows * width, dtype=np.int32).reshape(rows, width)))


def cache_bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Bytes that one token of one sequence takes in all layers."""
    return 2 * config.n_layer * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
