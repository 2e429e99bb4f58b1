"""The sum of rank-1 multiplicative components that FLoRA, HiRA and IA3 have in common.

A component is a pair ``(pre_I, post_O)``; together they make ``W ∘ Σ_r pre_r post_rᵀ``, computed
without that matrix as ``Σ_r post_r ∘ ((x ∘ pre_r) @ W)`` (the paper's Eq. 5 and 6).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.weights.product import Weight, as_weight, explicit, product

# Components up to which a sum of outer products is less work for a GPU than a float32 product.
_MOST_SUMMED = 16


def scale_inputs(x_xI: jax.Array, pre_xI: jax.Array) -> jax.Array:
    """``x ∘ pre`` (broadcast), multiplied in float32 and rounded once to the dtype of ``x``."""
    return (x_xI.astype(jnp.float32) * pre_xI.astype(jnp.float32)).astype(x_xI.dtype)


def apply_batch(
    pre_BRI: jax.Array, post_BRO: jax.Array, x_BTI: jax.Array, W_IO: Weight
) -> jax.Array:
    """Each row under its own components: float32 ``[B, T, O]`` by one product of ``B·R·T`` rows."""
    y_BRTO = product(scale_inputs(x_BTI[:, None], pre_BRI[:, :, None]), W_IO)
    return jnp.einsum("brto,bro->bto", y_BRTO, post_BRO.astype(jnp.float32))


def apply_one(pre_RI: jax.Array, post_RO: jax.Array, x_TI: jax.Array, W_IO: Weight) -> jax.Array:
    """One example, component by component: float32 ``[T, O]``. The body of the ``vmap`` form."""

    def component(pre_I: jax.Array, post_O: jax.Array) -> jax.Array:
        y_TO = product(scale_inputs(x_TI, pre_I[None]), W_IO)
        return y_TO * post_O.astype(jnp.float32)[None]

    return jnp.sum(jax.vmap(component)(pre_RI, post_RO), axis=0)


def merge(pre_RI: jax.Array, post_RO: jax.Array, W_IO: Weight) -> jax.Array:
    """``W ∘ Σ_r pre_r post_rᵀ`` in the dtype of ``W``; about ``2·R·I·O`` operations."""
    return explicit(merge_as_held(pre_RI, post_RO, W_IO))


def merge_as_held(pre_RI: jax.Array, post_RO: jax.Array, W_IO: Weight) -> Weight:
    """The same, by outputs where ``W`` is held so."""
    pre_RI, post_RO = pre_RI.astype(jnp.float32), post_RO.astype(jnp.float32)
    return as_weight(W_IO).scaled(pre_RI, post_RO, _factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _factor(left_RI: jax.Array, right_RO: jax.Array, dtype: np.dtype) -> jax.Array:
    """``Σ_r left_r right_rᵀ``, float32 ``[I, O]``, of a weight of ``dtype``.

    A CPU multiplies. On a GPU the sum of a few outer products becomes part of the pass that reads
    ``W``, so that the factor itself never lies in memory; counted for 4 rows of 6,144 × 6,400 in
    float16, rank 8, under 4 × 64 tokens: 686 MiB moved instead of 2,174, in two kernels. (A CPU's
    product of a factor takes 1.6 times as long as its sum, but gives other bits.)
    """
    if len(left_RI) > _MOST_SUMMED:
        return multiplied(left_RI, right_RO)
    return jax.lax.platform_dependent(left_RI, right_RO, cpu=multiplied, default=summed)


def multiplied(left_RI: jax.Array, right_RO: jax.Array) -> jax.Array:
    return jnp.einsum("ri,ro->io", left_RI, right_RO)


def summed(left_RI: jax.Array, right_RO: jax.Array) -> jax.Array:
    return jnp.sum(left_RI[:, :, None] * right_RO[:, None, :], axis=0)


def _factor_forward(
    left_RI: jax.Array, right_RO: jax.Array, dtype: np.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _factor(left_RI, right_RO, dtype), (left_RI, right_RO)


def _factor_backward(
    dtype: np.dtype, held: tuple[jax.Array, jax.Array], slope_IO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """By products everywhere: of a sum it would be a reduction for each component.

    On a GPU of arrays of the weight's dtype: the slope, as large as the weight, is written and read in
    half of the bytes.
    """

    def wide(left_RI: jax.Array, right_RO: jax.Array, slope_IO: jax.Array) -> Any:
        return jax.vjp(multiplied, left_RI, right_RO)[1](slope_IO)

    return jax.lax.platform_dependent(
        *held, slope_IO, cpu=wide, default=functools.partial(rounded_slopes, dtype=dtype)
    )


def rounded_slopes(
    left_RI: jax.Array, right_RO: jax.Array, slope_IO: jax.Array, *, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """The gradients of a sum of outer products, float32, by products of arrays of ``dtype``."""
    slope_IO = slope_IO.astype(dtype)
    return (
        jnp.einsum(
            "io,ro->ri", slope_IO, right_RO.astype(dtype), preferred_element_type=jnp.float32
        ),
        jnp.einsum(
            "io,ri->ro", slope_IO, left_RI.astype(dtype), preferred_element_type=jnp.float32
        ),
    )


_factor.defvjp(_factor_forward, _factor_backward)
