"""Attention over the paged cache, in one implementation for every way that a platform wants it.

All of them see the cached positions up to each token's own and give ``[B, T, H·K]`` in the queries'
dtype.
What stands in a block from an earlier owner never reaches a result, not even multiplied by zero (it could
be NaN). ``Paging.attention`` names the one to use. Knows nothing of parameters, adapters or platforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.models.attention import queries_as_rows, rows_as_tokens, softmax_options
from flora_jax.models.cache import LayerCache, Paging
from flora_jax.models.family import AttentionConfig

# Positions of one step over a cached row's keys. Fixed, and longer rows take more steps, so that what a
# row sees is added up in the same order whatever the longest row of its batch is.
KEY_STRETCH = 128


def attend_cached(
    q_BTHK: jax.Array,
    cache: LayerCache,
    paging: Paging,
    positions_BT: jax.Array,
    config: AttentionConfig,
    window: int | None = None,
) -> jax.Array:
    """Attention over cached positions up to each token's own, ``[B, T, H·K]`` in the queries' dtype.

    With ``window`` a token sees so many of the last positions, its own among them. Where ``paging.heads``
    says that devices share the heads, each computes its own, and so is the result cut.

    Raises:
        KeyError: ``paging.attention`` names no implementation.
    """
    run, heads = IMPLEMENTATIONS[paging.attention], paging.heads
    if heads is None:
        return run(q_BTHK, cache, paging, positions_BT, config, window)
    whole = PartitionSpec()
    if not heads.own:
        # The queries came with the one key and value, so each device has all of them already; without
        # this XLA would cut what it has and then exchange the edges.
        q_BTHK = jax.lax.with_sharding_constraint(q_BTHK, NamedSharding(heads.mesh, whole))
    by_heads = jax.shard_map(
        lambda *arrays: run(*arrays, config, window),
        mesh=heads.mesh,
        in_specs=(PartitionSpec(None, None, heads.axis), heads.pools, whole, whole),
        out_specs=PartitionSpec(None, None, heads.axis),
        check_vma=False,
    )
    return by_heads(q_BTHK, cache, paging, positions_BT)


def _loop(
    q_BTHK: jax.Array,
    cache: LayerCache,
    paging: Paging,
    positions_BT: jax.Array,
    config: AttentionConfig,
    window: int | None,
) -> jax.Array:
    """Keys in stretches of :data:`KEY_STRETCH` positions with a running maximum and sum.

    Memory does not grow with the length, and a stretch behind a row's last position, or before its
    window, changes none of the row's bits. Right for a CPU; a GPU pays nine kernels for every stretch.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    block, groups = cache.k_LSGK.shape[1:3]
    dtype = q_BTHK.dtype
    wide, scale, late = softmax_options(dtype, config)
    q_BGXK = queries_as_rows(q_BTHK, groups, 1.0 if late else scale)
    width = paging.table_BM.shape[1]
    blocks = min(width, _blocks_of_stretch(block))
    stretches = -(-width // blocks)
    table_BM = jnp.pad(
        paging.table_BM,
        ((0, 0), (0, stretches * blocks - width)),
        constant_values=cache.k_LSGK.shape[0],
    )
    last_B = jnp.max(positions_BT, axis=1)

    def step(number: int | jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most_BGX, sum_BGX, out_BGXK = carry
        start = jnp.asarray(number, jnp.int32) * blocks
        k_BSGK, v_BSGK = cache.read(jax.lax.dynamic_slice_in_dim(table_BM, start, blocks, axis=1))
        at_S = start * block + jnp.arange(blocks * block)
        v_BSGK = jnp.where((at_S[None] <= last_B[:, None])[:, :, None, None], v_BSGK, 0)
        scores = jnp.einsum("bgxk,bsgk->bgxs", q_BGXK, k_BSGK, preferred_element_type=wide)
        if late:
            scores = scores * scale
        seen_B1XS = _seen_by_rows(at_S, positions_BT, heads // groups, window)
        scores = jnp.where(seen_B1XS, scores.astype(jnp.float32), -jnp.inf)
        new_BGX = jnp.maximum(most_BGX, jnp.max(scores, axis=-1))
        share_BGXS = jnp.exp(scores - new_BGX[..., None])
        kept_BGX = jnp.exp(most_BGX - new_BGX)
        mixed_BGXK = jnp.einsum(
            "bgxs,bsgk->bgxk", share_BGXS.astype(dtype), v_BSGK, preferred_element_type=jnp.float32
        )
        return (
            new_BGX,
            sum_BGX * kept_BGX + jnp.sum(share_BGXS, axis=-1),
            out_BGXK * kept_BGX[..., None] + mixed_BGXK,
        )

    rows = (batch, groups, q_BGXK.shape[2])
    carry: tuple[jax.Array, ...] = (
        # Finite, so that a token that sees nothing stays finite too.
        jnp.full(rows, jnp.finfo(jnp.float32).min),
        jnp.zeros(rows),
        jnp.zeros((*rows, head_dim)),
    )
    if stretches == 1:
        carry = step(0, carry)
    else:
        looked_at = (
            stretches if paging.stretches is None else jnp.minimum(paging.stretches, stretches)
        )
        first = 0 if window is None else _first_stretch(positions_BT, window, blocks * block)
        carry = jax.lax.fori_loop(first, looked_at, step, carry)
    _, sum_BGX, out_BGXK = carry
    out_BGXK = out_BGXK / jnp.maximum(sum_BGX, jnp.finfo(jnp.float32).tiny)[..., None]
    return rows_as_tokens(out_BGXK.astype(dtype), length)


def _gather(
    q_BTHK: jax.Array,
    cache: LayerCache,
    paging: Paging,
    positions_BT: jax.Array,
    config: AttentionConfig,
    window: int | None,
) -> jax.Array:
    """The whole table's positions in one gather, two batched products and a float32 softmax.

    A constant number of kernels whatever the length, so a GPU puts a step into one graph. The scores of
    all positions are in memory, and a row's bits follow from the table's width.
    """
    length, heads = q_BTHK.shape[1:3]
    groups = cache.k_LSGK.shape[2]
    dtype = q_BTHK.dtype
    wide, scale, late = softmax_options(dtype, config)
    q_BGXK = queries_as_rows(q_BTHK, groups, 1.0 if late else scale)
    k_BSGK, v_BSGK, at_S = _read_own(cache, paging, positions_BT)
    scores = jnp.einsum("bgxk,bsgk->bgxs", q_BGXK, k_BSGK, preferred_element_type=wide)
    if late:
        scores = scores * scale
    seen_B1XS = _seen_by_rows(at_S, positions_BT, heads // groups, window)
    # Finite, so that a token that sees nothing stays finite too.
    least = jnp.finfo(jnp.float32).min
    weights = jax.nn.softmax(jnp.where(seen_B1XS, scores.astype(jnp.float32), least), axis=-1)
    out_BGXK = jnp.einsum(
        "bgxs,bsgk->bgxk", weights.astype(dtype), v_BSGK, preferred_element_type=jnp.float32
    )
    return rows_as_tokens(out_BGXK.astype(dtype), length)


def _cudnn(
    q_BTHK: jax.Array,
    cache: LayerCache,
    paging: Paging,
    positions_BT: jax.Array,
    config: AttentionConfig,
    window: int | None,
    *,
    bounded: bool,
) -> jax.Array:
    """The same positions through cuDNN's flash attention under an explicit mask: no scores in memory.

    ``bounded`` tells it each row's length as well, so that it leaves out what lies behind. On a GPU
    alone, in 16 bits, with heads as :func:`flora_jax.models.attention.cudnn_refuses` says.
    """
    batch, length = q_BTHK.shape[:2]
    k_BSGK, v_BSGK, at_S = _read_own(cache, paging, positions_BT)
    _, scale, _ = softmax_options(q_BTHK.dtype, config)
    mask_B1TS = _seen(at_S, positions_BT, window)[:, None]
    queries_B = keys_B = None
    if bounded:
        queries_B = jnp.full(batch, length, jnp.int32)
        keys_B = jnp.maximum(jnp.max(positions_BT, axis=1) + 1, 1).astype(jnp.int32)
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, mask=mask_B1TS, scale=scale, implementation="cudnn",
        query_seq_lengths=queries_B, key_value_seq_lengths=keys_B,
    )  # fmt: skip
    return out_BTHK.reshape(batch, length, -1)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "loop": _loop,
    "gather": _gather,
    "cudnn": functools.partial(_cudnn, bounded=True),
    "cudnn_masked": functools.partial(_cudnn, bounded=False),
}
# Those that only some devices and models have, and what to try after each, in order.
OTHERWISE = {"cudnn": ("cudnn_masked", "gather"), "cudnn_masked": ("gather",)}


def _read_own(
    cache: LayerCache, paging: Paging, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values ``[B, S, G, K]`` of all the table's positions, and those ``[S]``; zeros behind a
    row's last one.
    """
    k_BSGK, v_BSGK = cache.read(paging.table_BM)
    at_S = jnp.arange(k_BSGK.shape[1])
    own_BS11 = (at_S[None] <= jnp.max(positions_BT, axis=1)[:, None])[:, :, None, None]
    return jnp.where(own_BS11, k_BSGK, 0), jnp.where(own_BS11, v_BSGK, 0), at_S


def _seen(at_S: jax.Array, positions_BT: jax.Array, window: int | None) -> jax.Array:
    """``[B, T, S]``: which of the cached positions a token sees."""
    seen_BTS = at_S[None, None] <= positions_BT[:, :, None]
    if window is None:
        return seen_BTS
    return seen_BTS & (at_S[None, None] > positions_BT[:, :, None] - window)


def _seen_by_rows(
    at_S: jax.Array, positions_BT: jax.Array, shared: int, window: int | None
) -> jax.Array:
    """``[B, 1, X, S]``: the rows of ``X`` are the queries of ``T`` for each of ``shared`` heads."""
    return jnp.tile(_seen(at_S, positions_BT, window), (1, shared, 1))[:, None]


def _first_stretch(positions_BT: jax.Array, window: int, stretch: int) -> jax.Array:
    """The first stretch in which some token of the batch sees a position."""
    far = jnp.iinfo(positions_BT.dtype).max
    first = jnp.min(jnp.where(positions_BT >= 0, positions_BT, far)) - window + 1
    return jnp.maximum(first, 0) // stretch


def key_stretches(length: int, block: int) -> int:
    """How many steps the loop takes over so many positions in blocks of such a size."""
    return -(-length // (_blocks_of_stretch(block) * block))


def _blocks_of_stretch(block: int) -> int:
    return max(1, KEY_STRETCH // block)
