"""The sum of rank-1 multiplicative components that FLoRA, HiRA and IA3 have in common.

A component is a pair ``(pre_I, post_O)``; together they make ``W ∘ Σ_r pre_r post_rᵀ``, computed
without that matrix as ``Σ_r post_r ∘ ((x ∘ pre_r) @ W)`` (the paper's Eq. 5 and 6).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flora_jax.adapters.product import Weight, explicit, product
from flora_jax.adapters.transposed import Transposed


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


def merge_as_held(pre_RI: jax.Array, post_RO: jax.Array, W_IO: Weight) -> jax.Array | Transposed:
    """The same, by outputs where ``W`` is held so."""
    pre_RI, post_RO = pre_RI.astype(jnp.float32), post_RO.astype(jnp.float32)
    if isinstance(W_IO, Transposed):
        factor_OI = jnp.einsum("ro,ri->oi", post_RO, pre_RI)
        return Transposed((W_IO.W_OI.astype(jnp.float32) * factor_OI).astype(W_IO.dtype))
    factor_IO = jnp.einsum("ri,ro->io", pre_RI, post_RO)
    return (explicit(W_IO, jnp.float32) * factor_IO).astype(W_IO.dtype)
