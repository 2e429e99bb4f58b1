"""Whether an implementation of attention works on this machine: tried on numbers before it is used.

A library may refuse a shape only when it is compiled or run, or give wrong numbers on a new card. Knows
nothing of parameters, adapters or platforms.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.starcoder.attention import attend_visible, visible
from flora_jax.starcoder.config import StarCoderConfig

_ROWS = 2
# Of the largest number, as much as two ways to add up in 16 bits may differ.
_TOLERANCE = 0.03


def fails(attention: str, config: StarCoderConfig, dtype: Any, length: int) -> str | None:
    """Why ``attention`` is not usable here on rows of ``length`` tokens; ``None`` where it is.

    Results and gradients of two rows of random numbers, each with two segments and padding, are
    compared with those of "einsum".
    """
    rng = np.random.default_rng(0)

    def draw(heads: int) -> jax.Array:
        shape = (_ROWS, length, heads, config.head_dim)
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    queries, keys, values = (draw(n) for n in (config.n_head, config.kv_heads, config.kv_heads))
    first, padding = length // 3, length // 8
    segments_T = np.repeat([1, 2, 0], [first, length - first - padding, padding])
    positions_T = np.concatenate([np.arange(first), np.arange(length - first)])
    positions_BT, segments_BT = (
        jnp.asarray(np.tile(row_T, (_ROWS, 1)), jnp.int32) for row_T in (positions_T, segments_T)
    )

    def run(name: str) -> list[np.ndarray]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            seen = visible(positions_BT, segments_BT, name)
            out_BTD = attend_visible(q, k, v, seen, config).astype(jnp.float32)
            counted_BTD = jnp.where((segments_BT > 0)[:, :, None], out_BTD, 0.0)
            return jnp.sum(jnp.square(counted_BTD)), counted_BTD

        slopes, out_BTD = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(queries, keys, values)
        return [np.asarray(array, np.float32) for array in (out_BTD, *slopes)]

    try:
        found = run(attention)
    except Exception as refusal:  # Whatever the library and what it stands on make of it.
        return str(refusal).strip().split("\n")[0] or type(refusal).__name__
    for name, own, right in zip(("result", "q", "k", "v"), found, run("einsum"), strict=True):
        error = float(np.abs(own - right).max() / np.abs(right).max())
        if not error < _TOLERANCE:
            what = name if name == "result" else f"gradient of {name}"
            return f"its {what} is {error:.2g} of the largest number away from einsum's"
    return None
