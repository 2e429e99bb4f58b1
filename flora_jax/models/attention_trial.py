"""Whether an implementation of attention works on this machine: tried on numbers before it is used.

A library may refuse a shape only when it is compiled or run, or give wrong numbers on a new card. Knows
nothing of parameters, adapters or platforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.models.attention import attend_visible, visible
from flora_jax.models.cache import LayerCache, Paging
from flora_jax.models.cached_attention import attend_cached
from flora_jax.models.family import AttentionConfig

_ROWS = 2
# Of the largest number, as much as two ways to add up in 16 bits may differ.
_TOLERANCE = 0.03


def fails(attention: str, config: AttentionConfig, dtype: Any, length: int) -> str | None:
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

    names = ["result", *(f"gradient of {name}" for name in "qkv")]
    return _differs(run, attention, "einsum", names)


def fails_on_cache(
    attention: str, config: AttentionConfig, dtype: Any, length: int, span: int, block_size: int
) -> str | None:
    """The same over a cache, for chunks of ``length`` tokens and tables of ``span`` positions.

    Results of two rows that end at different places are compared with those of "gather".
    """
    rng = np.random.default_rng(0)
    width = -(-span // block_size)
    shape = (_ROWS * width, block_size, config.kv_heads, config.head_dim)
    cache = LayerCache(*(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in "kv"))
    table_BM = rng.permutation(_ROWS * width).reshape(_ROWS, width).astype(np.int32)
    q_shape = (_ROWS, length, config.n_head, config.head_dim)
    queries = jnp.asarray(rng.standard_normal(q_shape, np.float32), dtype)
    last_B1 = np.array([[span - 1], [span // 2]])
    positions_BT = np.maximum(last_B1 - np.arange(length)[None, ::-1], 0).astype(np.int32)

    def run(name: str) -> list[np.ndarray]:
        paging = Paging(jnp.asarray(table_BM), attention=name)
        whole = jax.jit(attend_cached, static_argnums=4)
        out = whole(queries, cache, paging, jnp.asarray(positions_BT), config)
        return [np.asarray(out, np.float32)]

    return _differs(run, attention, "gather", ["result"])


def _differs(
    run: Callable[[str], list[np.ndarray]], attention: str, reference: str, names: list[str]
) -> str | None:
    """What of the results of two implementations differs, or why the first gives none."""
    try:
        found = run(attention)
    except Exception as refusal:  # Whatever the library and what it stands on make of it.
        return str(refusal).strip().split("\n")[0] or type(refusal).__name__
    for name, own, right in zip(names, found, run(reference), strict=True):
        error = float(np.abs(own - right).max() / np.abs(right).max())
        if not error < _TOLERANCE:
            return f"its {name} is {error:.2g} of the largest number away from {reference}'s"
    return None
