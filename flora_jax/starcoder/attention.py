"""Multi-query and multi-head attention on arrays: splitting the fused projection, masks, softmax.

Knows nothing of parameters or adapters.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.starcoder.cache import LayerCache, Paging
from flora_jax.starcoder.config import StarCoderConfig

# Positions of one step over a cached row's keys. Fixed, and longer rows take more steps, so that what a
# row sees is added up in the same order whatever the longest row of its batch is.
KEY_BLOCK = 128


def split_qkv(
    qkv_BTO: jax.Array, config: StarCoderConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits ``c_attn``'s output into ``q [B,T,H,K]`` and ``k``, ``v`` ``[B,T,G,K]``.

    With ``multi_query`` the output is all queries, then one key, then one value; without it, each
    head's query, key and value stand together.
    """
    batch, length, _ = qkv_BTO.shape
    width, heads, head_dim = config.n_embd, config.n_head, config.head_dim
    if config.multi_query:
        q, k, v = jnp.split(qkv_BTO, [width, width + head_dim], axis=-1)
        return (
            q.reshape(batch, length, heads, head_dim),
            k.reshape(batch, length, 1, head_dim),
            v.reshape(batch, length, 1, head_dim),
        )
    q, k, v = jnp.split(qkv_BTO.reshape(batch, length, heads, 3 * head_dim), 3, axis=-1)
    return q, k, v


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array,
    config: StarCoderConfig,
) -> jax.Array:
    """Softmax attention, ``[B, T, D]`` in the queries' dtype; ``mask`` is true where visible.

    Scores are scaled by ``1/sqrt(K)`` (``scale_attn_weights``). The softmax runs in float32, or in
    the activations' dtype where ``attention_softmax_in_fp32`` is false; scaling happens in the same
    dtype as the softmax only if ``scale_attention_softmax_in_fp32`` asks for it.
    """
    batch, length, heads, _ = q_BTHK.shape
    slots, groups = k_BSGK.shape[1:3]
    shared = heads // groups
    dtype = q_BTHK.dtype
    wide, scale, late = _softmax_options(dtype, config)
    q_BGXK = _queries_as_rows(q_BTHK, groups, 1.0 if late else scale)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgxk,bgsk->bgxs", q_BGXK, k_BGSK, preferred_element_type=wide)
    scores = scores.reshape(batch, groups, shared, length, slots)
    if late:
        scores = scores * scale
    # Finite, so that a row of padding that sees nothing stays finite too.
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(wide).min)
    weights = _softmax(scores).astype(dtype)
    weights_BGXS = weights.reshape(batch, groups, shared * length, slots)
    out = jnp.einsum("bgxs,bgsk->bgxk", weights_BGXS, v_BGSK, preferred_element_type=jnp.float32)
    return _rows_as_tokens(out.astype(dtype), length)


def attend_cached(
    q_BTHK: jax.Array,
    cache: LayerCache,
    paging: Paging,
    positions_BT: jax.Array,
    config: StarCoderConfig,
) -> jax.Array:
    """Attention over cached positions up to each token's own, ``[B, T, D]`` in the queries' dtype.

    Keys are read in blocks of :data:`KEY_BLOCK` positions with a running maximum and sum, so memory does
    not grow with the length; a block behind a row's last position changes none of the row's bits. What
    stands in a page from an earlier owner is never multiplied, not even by zero (it could be NaN).
    """
    batch, length, heads, head_dim = q_BTHK.shape
    page, groups = cache.k_LSGK.shape[1:3]
    dtype = q_BTHK.dtype
    wide, scale, late = _softmax_options(dtype, config)
    q_BGXK = _queries_as_rows(q_BTHK, groups, 1.0 if late else scale)
    width = paging.table_BM.shape[1]
    pages = min(width, _block_pages(page))
    blocks = -(-width // pages)
    table_BM = jnp.pad(
        paging.table_BM,
        ((0, 0), (0, blocks * pages - width)),
        constant_values=cache.k_LSGK.shape[0],
    )
    last_B = jnp.max(positions_BT, axis=1)

    def step(number: int | jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most_BGX, sum_BGX, out_BGXK = carry
        start = jnp.asarray(number, jnp.int32) * pages
        k_BSGK, v_BSGK = cache.read(jax.lax.dynamic_slice_in_dim(table_BM, start, pages, axis=1))
        at_S = start * page + jnp.arange(pages * page)
        v_BSGK = jnp.where((at_S[None] <= last_B[:, None])[:, :, None, None], v_BSGK, 0)
        scores = jnp.einsum("bgxk,bsgk->bgxs", q_BGXK, k_BSGK, preferred_element_type=wide)
        if late:
            scores = scores * scale
        seen_BTS = at_S[None, None] <= positions_BT[:, :, None]
        # One mask for the rows of X, which are the queries of T for each head of a group.
        seen_B1XS = jnp.tile(seen_BTS, (1, heads // groups, 1))[:, None]
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
    if blocks == 1:
        carry = step(0, carry)
    else:
        looked_at = blocks if paging.blocks is None else jnp.minimum(paging.blocks, blocks)
        carry = jax.lax.fori_loop(0, looked_at, step, carry)
    _, sum_BGX, out_BGXK = carry
    out_BGXK = out_BGXK / jnp.maximum(sum_BGX, jnp.finfo(jnp.float32).tiny)[..., None]
    return _rows_as_tokens(out_BGXK.astype(dtype), length)


def key_blocks(length: int, page: int) -> int:
    """How many steps :func:`attend_cached` takes over so many positions in pages of such a size."""
    return -(-length // (_block_pages(page) * page))


def _block_pages(page: int) -> int:
    return max(1, KEY_BLOCK // page)


def _softmax_options(dtype: jnp.dtype, config: StarCoderConfig) -> tuple[Any, float, bool]:
    """The scores' dtype, their scale, and whether they are scaled in that dtype."""
    wide = jnp.float32 if config.attention_softmax_in_fp32 else dtype
    scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    late = config.attention_softmax_in_fp32 and config.scale_attention_softmax_in_fp32
    return wide, scale, late


def _queries_as_rows(q_BTHK: jax.Array, groups: int, scale: float) -> jax.Array:
    """The queries that share a key head as rows of one matrix, ``[B, G, Q·T, K]``.

    1.4 times faster than a product for each head on a CPU, and one product per key head on a GPU.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    if scale != 1.0:
        q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    q_BGQTK = q_BTHK.reshape(batch, length, groups, heads // groups, head_dim)
    return q_BGQTK.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, head_dim)


def _rows_as_tokens(out_BGXK: jax.Array, length: int) -> jax.Array:
    """The way back, to ``[B, T, D]``."""
    batch, groups, _, head_dim = out_BGXK.shape
    out_BGQTK = out_BGXK.reshape(batch, groups, -1, length, head_dim)
    return out_BGQTK.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


# Checkpointed: the scores alone are kept for the backward pass, not the softmax's intermediates too,
# which with the activation function's are a third of what training holds.
_softmax = jax.checkpoint(functools.partial(jax.nn.softmax, axis=-1))


def causal_mask(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """``[B, T, T]``: a token sees those of its own segment at its own or an earlier position."""
    earlier = positions_BT[:, :, None] >= positions_BT[:, None, :]
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    return earlier & same & (segments_BT[:, None, :] > 0)
