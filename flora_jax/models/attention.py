"""Attention on arrays, with fewer key and value heads than query heads or as many: masks, softmax.

Attention without a cache has one implementation for every way that a platform wants it. Knows nothing of
parameters, adapters or platforms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flora_jax.models.family import AttentionConfig

# Numbers of a head that cuDNN takes on every card since Ampere.
_LARGEST_HEAD = 128
# Queries of a block. With 256 a CPU's backward pass takes twice as long at 512 tokens.
_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """What the tokens of a batch see of one another, and how attention over it is computed.

    ``mask [B, T, S]`` is true where visible; ``None`` is all earlier tokens of the row and the token
    itself. ``positions [B, T]`` are the tokens' own. ``attention``: a name of :data:`IMPLEMENTATIONS`,
    static.
    """

    mask_BTS: jax.Array | None
    positions_BT: jax.Array
    attention: str = dataclasses.field(default="einsum", metadata=dict(static=True))

    def within(self, window: int | None) -> jax.Array | None:
        """The mask of a layer in which a token sees the last ``window`` positions alone, or all."""
        if window is None:
            return self.mask_BTS
        near_BTS = self.positions_BT[:, :, None] - self.positions_BT[:, None, :] < window
        return near_BTS if self.mask_BTS is None else self.mask_BTS & near_BTS


def visible(
    positions_BT: jax.Array, segments_BT: jax.Array | None, attention: str = "einsum"
) -> Visible:
    """A token sees those of its own segment at its own or an earlier position, and segment 0 nothing.

    Without ``segments`` every row is one. For any other attention than "einsum" the tokens of a segment
    stand in the order of their positions.

    Raises:
        ValueError: ``attention`` is no implementation's name.
    """
    if attention not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention is {attention!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if segments_BT is None:
        if attention != "einsum":
            return Visible(None, positions_BT, attention)
        segments_BT = jnp.ones_like(positions_BT)
    return Visible(causal_mask(positions_BT, segments_BT), positions_BT, attention)


def attend_visible(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    seen: Visible,
    config: AttentionConfig,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention among the tokens of a batch, ``[B, T, H·K]`` in the queries' dtype.

    With ``window`` a token sees so many of the last positions, its own among them.
    """
    return IMPLEMENTATIONS[seen.attention](q_BTHK, k_BTGK, v_BTGK, seen.within(window), config)


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """Two products with the scores between them in memory; takes every dtype and every length.

    Scores are scaled by ``score_scale``. The softmax runs in float32, or in the activations' dtype where
    ``softmax_in_float32`` is false; scaling happens in float32 only if ``scale_in_float32`` asks for it.
    """
    assert mask_BTS is not None
    batch, length, heads, _ = q_BTHK.shape
    slots, groups = k_BSGK.shape[1:3]
    dtype = q_BTHK.dtype
    wide, scale, late = softmax_options(dtype, config)
    q_BGXK = queries_as_rows(q_BTHK, groups, 1.0 if late else scale)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgxk,bgsk->bgxs", q_BGXK, k_BGSK, preferred_element_type=wide)
    # Four axes: with a fifth, of one key head, a CPU's backward pass takes twice as long.
    scores = scores.reshape(batch, heads, length, slots)
    if late:
        scores = scores * scale
    # Finite, so that a row of padding that sees nothing stays finite too.
    scores = jnp.where(mask_BTS[:, None], scores, jnp.finfo(wide).min)
    weights = _softmax(scores).astype(dtype)
    weights_BGXS = weights.reshape(batch, groups, -1, slots)
    out = jnp.einsum("bgxs,bgsk->bgxk", weights_BGXS, v_BGSK, preferred_element_type=jnp.float32)
    return rows_as_tokens(out.astype(dtype), length)


def attend_blocked(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask_BTT: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """:func:`attend` for a block of queries at a time, over the tokens up to the block's end.

    Tokens behind a token are masked by their place. The half of the scores that no token sees is not
    computed, and a block's stay in a CPU's cache: 3.4 times faster there at 512 tokens, forward and
    backward.
    """
    length = q_BTHK.shape[1]
    earlier_1TT = jnp.tri(length, dtype=bool)[None]
    mask_BTT = earlier_1TT if mask_BTT is None else earlier_1TT & mask_BTT
    blocks = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        blocks.append(
            attend(
                q_BTHK[:, start:end], k_BTGK[:, :end], v_BTGK[:, :end],
                mask_BTT[:, start:end, :end], config,
            )
        )  # fmt: skip
    return jnp.concatenate(blocks, axis=1)


def softmax_options(dtype: jnp.dtype, config: AttentionConfig) -> tuple[Any, float, bool]:
    """The scores' dtype, their scale, and whether they are scaled in that dtype."""
    wide = jnp.float32 if config.softmax_in_float32 else dtype
    return wide, config.score_scale, config.scale_in_float32


def queries_as_rows(q_BTHK: jax.Array, groups: int, scale: float) -> jax.Array:
    """The queries that share a key head as rows of one matrix, ``[B, G, Q·T, K]``.

    1.4 times faster than a product for each head on a CPU, and one product per key head on a GPU.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    if scale != 1.0:
        q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    q_BGQTK = q_BTHK.reshape(batch, length, groups, heads // groups, head_dim)
    return q_BGQTK.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, head_dim)


def rows_as_tokens(out_BGXK: jax.Array, length: int) -> jax.Array:
    """The way back, to ``[B, T, H·K]``."""
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


def fused_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask_BTT: jax.Array | None,
    config: AttentionConfig,
    *,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """The library's own attention; with "cudnn" no scores lie in memory, forward or backward.

    Tokens behind a token are masked by their place, whose tiles a kernel leaves out, and the segments by
    the mask. Softmax and scale are float32's, whatever the model's options say.
    """
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK,
        mask=None if mask_BTT is None else mask_BTT[:, None],
        scale=config.score_scale, is_causal=True, implementation=implementation,
    )  # fmt: skip
    return out_BTHK.reshape(*out_BTHK.shape[:2], -1)


def cudnn_refuses(config: AttentionConfig, dtype: Any, length: int) -> str | None:
    """Why "cudnn" does not take rows of ``length`` tokens in ``dtype``; ``None`` where it does."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"it takes 16-bit activations, found {jnp.dtype(dtype).name}"
    if config.head_dim % 8 or config.head_dim > _LARGEST_HEAD:
        return (
            f"a head has {config.head_dim} numbers, expected a multiple of 8 up to {_LARGEST_HEAD}"
        )
    if length % 2:
        return f"rows have {length} tokens, expected an even number"
    return None


Implementation = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array | None, AttentionConfig], jax.Array
]
# By the names that the table of platforms has.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "einsum": attend,
    "blocked": attend_blocked,
    "cudnn": functools.partial(fused_attention, implementation="cudnn"),
}
# Those that not every card, dtype or length has.
MAY_REFUSE = {"cudnn"}
