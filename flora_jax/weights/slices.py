"""Slices of a weight's outputs, for what would need too much memory of the whole weight at once.

A slice takes every n-th run of features: where a mesh splits them, each device has its share of every
slice. Knows nothing of how a weight is held.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Of this many bytes at most: they stay in a GPU's second-level cache.
_SLICE_BYTES = 32 << 20
# Features that stay together in a slice: contiguous bytes enough for a whole memory access.
RUN = 128


def slices(shape: tuple[int, ...]) -> int:
    """Into how many slices to cut a weight ``[I, O]`` so that each is small in float32."""
    inputs, outputs = shape
    return slices_of(4 * inputs * outputs, outputs // math.gcd(outputs, RUN))


def slices_of(whole_bytes: int, units: int) -> int:
    """Into how many slices of equally many units to cut: at least two, as XLA unrolls a loop of one.

    One where no number near that divides the units, as with an odd number of features.
    """
    least = max(2, -(-whole_bytes // _SLICE_BYTES))
    return next((n for n in range(least, 8 * least) if units % n == 0), 1)


def columns(array: jax.Array, number: jax.Array, count: int, *, axis: int = -1) -> jax.Array:
    """Slice ``number`` of ``count`` of an axis: every ``count``-th run of features."""
    axis %= array.ndim
    before, outputs, behind = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
    split = array.reshape(*before, -1, count, math.gcd(outputs, RUN), *behind)
    part = jax.lax.dynamic_index_in_dim(split, number, axis + 1, keepdims=False)
    return part.reshape(*before, outputs // count, *behind)


def join_columns(y_Sxo: jax.Array) -> jax.Array:
    """All slices of :func:`columns` of the last axis, stacked in front, as one array ``[…, O]``."""
    count, *lead, width = y_Sxo.shape
    split = y_Sxo.reshape(count, *lead, -1, math.gcd(count * width, RUN))
    return jnp.moveaxis(split, 0, -2).reshape(*lead, count * width)
