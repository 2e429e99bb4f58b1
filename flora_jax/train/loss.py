"""Next-token cross-entropy, and divergence from a teacher, per token.

Knows nothing of models or optimizers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class HeadChunks:
    """How the logits of a batch are cut along its positions.

    At most ``numbers`` logits are made at once (64 MiB in float32 by default). ``even``: the chunks are
    cut equally long, so that the last is not mostly padding.
    """

    numbers: int = 2**24
    even: bool = False

    def cut(self, batch: int, length: int, vocabulary: int) -> tuple[int, int]:
        """How many chunks, and of how many positions each."""
        step = min(length, max(1, self.numbers // (vocabulary * batch)))
        count = -(-length // step)
        return count, -(-length // count) if self.even else step


def bits_per_byte(nll_nats: float, text_bytes: float) -> float:
    """A total negative log-likelihood as bits per UTF-8 byte of the text it stands for."""
    return nll_nats / math.log(2) / text_bytes


def token_scores(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    chunks: HeadChunks = HeadChunks(),
) -> tuple[jax.Array, jax.Array]:
    """Per token the negative log-likelihood in nats, and 1 where the target is the likeliest.

    Both float32 ``[B, T]``. The logits of a stretch of positions are made, used and dropped before
    the next, as ``chunks`` says, so that ``[B, T, V]`` never exists.
    """
    nll_BT, hit_BT = _scan_head(hidden_BTD, head_DV, targets_BT, chunks, gradient=False)
    return nll_BT, hit_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_head_nll(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    chunks: HeadChunks = HeadChunks(),
) -> jax.Array:
    """As :func:`token_scores`, the likelihoods alone, with a gradient for ``hidden`` only.

    ``head`` is frozen: no gradient reaches it. The gradient of ``hidden`` is made in the forward pass
    beside the loss, as ``(softmax - onehot) headᵀ`` chunk by chunk, so the logits are computed once
    and none is kept.
    """
    return token_scores(hidden_BTD, head_DV, targets_BT, chunks)[0]


def _forward(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunks: HeadChunks
) -> tuple[jax.Array, jax.Array]:
    nll_BT, _, slope_BTD = _scan_head(hidden_BTD, head_DV, targets_BT, chunks, gradient=True)
    return nll_BT, slope_BTD


def _backward(
    chunks: HeadChunks, slope_BTD: jax.Array, upstream_BT: jax.Array
) -> tuple[jax.Array, None, None]:
    wide_BTD = slope_BTD.astype(jnp.float32) * upstream_BT[..., None]
    return wide_BTD.astype(slope_BTD.dtype), None, None


frozen_head_nll.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_head_divergence(
    hidden_BTD: jax.Array,
    teacher_BTD: jax.Array,
    head_DV: jax.Array,
    chunks: HeadChunks = HeadChunks(),
) -> jax.Array:
    """Per token ``KL(teacher ‖ own)`` of the next-token distributions, in nats: float32 ``[B, T]``.

    ``hidden`` alone gets a gradient, made beside the divergence as in :func:`frozen_head_nll`:
    ``(softmax - softmax of the teacher) headᵀ``. Of both logits a stretch of positions is made at once.
    """
    return _scan_divergence(hidden_BTD, teacher_BTD, head_DV, chunks, gradient=False)[0]


def _forward_divergence(
    hidden_BTD: jax.Array, teacher_BTD: jax.Array, head_DV: jax.Array, chunks: HeadChunks
) -> tuple[jax.Array, jax.Array]:
    found = _scan_divergence(hidden_BTD, teacher_BTD, head_DV, chunks, gradient=True)
    return found[0], found[1]


frozen_head_divergence.defvjp(_forward_divergence, _backward)


def _scan_divergence(
    hidden_BTD: jax.Array,
    teacher_BTD: jax.Array,
    head_DV: jax.Array,
    chunks: HeadChunks,
    *,
    gradient: bool,
) -> tuple[jax.Array, ...]:
    """Divergences and, with ``gradient``, their slope in ``hidden``."""
    dtype = hidden_BTD.dtype

    def chunk(hidden_BtD: jax.Array, teacher_BtD: jax.Array) -> tuple[jax.Array, ...]:
        own_BtV, wanted_BtV = (
            jax.nn.log_softmax(jnp.matmul(part, head_DV, preferred_element_type=jnp.float32))
            for part in (hidden_BtD, teacher_BtD)
        )
        share_BtV = jnp.exp(wanted_BtV)
        divergence_Bt = jnp.sum(share_BtV * (wanted_BtV - own_BtV), axis=-1)
        if not gradient:
            return (divergence_Bt,)
        slope_BtD = jnp.matmul(
            (jnp.exp(own_BtV) - share_BtV).astype(dtype), head_DV.T,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return divergence_Bt, slope_BtD.astype(dtype)

    return _by_chunks(chunk, (hidden_BTD, teacher_BTD), 2 * head_DV.shape[1], chunks)


def _scan_head(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    chunks: HeadChunks,
    *,
    gradient: bool,
) -> tuple[jax.Array, ...]:
    """Likelihoods, hits and, with ``gradient``, the slope of the first in ``hidden``."""
    vocabulary = head_DV.shape[1]

    def chunk(hidden_BtD: jax.Array, targets_Bt: jax.Array) -> tuple[jax.Array, ...]:
        logits_BtV = jnp.matmul(hidden_BtD, head_DV, preferred_element_type=jnp.float32)
        top_Bt = jnp.max(logits_BtV, axis=-1)
        powers_BtV = jnp.exp(logits_BtV - top_Bt[..., None])
        total_Bt = jnp.sum(powers_BtV, axis=-1)
        own_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
        nll_Bt = top_Bt + jnp.log(total_Bt) - own_Bt
        hit_Bt = (own_Bt >= top_Bt).astype(jnp.float32)
        if not gradient:
            return nll_Bt, hit_Bt
        chosen_BtV = jnp.arange(vocabulary)[None, None] == targets_Bt[..., None]
        share_BtV = powers_BtV / total_Bt[..., None] - chosen_BtV.astype(jnp.float32)
        slope_BtD = jnp.matmul(
            share_BtV.astype(hidden_BTD.dtype), head_DV.T, preferred_element_type=jnp.float32
        )
        return nll_Bt, hit_Bt, slope_BtD.astype(hidden_BTD.dtype)

    return _by_chunks(chunk, (hidden_BTD, targets_BT), vocabulary, chunks)


def _by_chunks(
    own: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    numbers: int,
    chunks: HeadChunks,
) -> tuple[jax.Array, ...]:
    """``own`` of arrays ``[B, T, …]``, a stretch of positions at a time, one after another.

    ``numbers`` are the logits that it makes of a position.
    """
    batch, length = arrays[0].shape[:2]
    count, step = chunks.cut(batch, length, numbers)
    padding = count * step - length

    # Chunks are cut along positions: rows may be split over devices.
    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, step, *array.shape[2:]), 1, 0)

    def join(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, 1).reshape(batch, -1, *array.shape[3:])[:, :length]

    pieces = tuple(map(cut, arrays))
    _, found = jax.lax.scan(lambda carry, parts: (carry, own(*parts)), None, pieces)
    return tuple(map(join, found))
