"""The product with a frozen base weight, the one place that touches it, and the hook's dispatch.

Factors may be wider than the activations: products are accumulated in float32 and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flora_jax.weights.held import Held

PROJECTED = "projected"
# What stands as a base weight [I, O] in every function of a kind.
Weight = jax.Array | Held


def product(x_xI: jax.Array, W_IO: Weight) -> jax.Array:
    """``x @ W`` over the last axis of ``x``, accumulated and returned in float32.

    A quantised weight gets no gradient.
    """
    if isinstance(W_IO, Held):
        return W_IO.matmul(x_xI)
    if x_xI.dtype == W_IO.dtype and W_IO.dtype.itemsize == 2:
        return _of_halves(x_xI, W_IO)
    return _wide(x_xI, W_IO)


def _wide(x_xI: jax.Array, W_IO: jax.Array) -> jax.Array:
    return jnp.matmul(x_xI, W_IO, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _of_halves(x_xI: jax.Array, W_IO: jax.Array) -> jax.Array:
    """:func:`_wide` of 16-bit arrays, whose gradients a GPU computes from 16-bit arrays as well.

    By itself JAX multiplies the float32 gradient of the result with a weight taken to float32: at a half
    or an eighth of the speed, beside the conversions. Nothing is lost where the result is rounded to
    16 bits before anything else: its gradient has 16 bits as well.
    """
    return _wide(x_xI, W_IO)


def _halves_forward(
    x_xI: jax.Array, W_IO: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _wide(x_xI, W_IO), (x_xI, W_IO)


def _halves_backward(
    held: tuple[jax.Array, jax.Array], slope_xO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def wide(x_xI: jax.Array, W_IO: jax.Array, slope_xO: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(_wide, x_xI, W_IO)[1](slope_xO)

    return jax.lax.platform_dependent(*held, slope_xO, cpu=wide, default=slopes_of_halves)


def slopes_of_halves(
    x_xI: jax.Array, W_IO: jax.Array, slope_xO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of ``x`` and ``W``, each by one product of 16-bit arrays, added up in float32."""
    slope_xO = slope_xO.astype(x_xI.dtype)
    flat_XI, flat_XO = (a.reshape(-1, a.shape[-1]) for a in (x_xI, slope_xO))
    return jnp.einsum("...o,io->...i", slope_xO, W_IO), jnp.einsum("xi,xo->io", flat_XI, flat_XO)


_of_halves.defvjp(_halves_forward, _halves_backward)


def rounded(x_xI: jax.Array, W_IO: Weight) -> jax.Array:
    """:func:`product` rounded to the dtype of ``x``, of a plain array by the product itself."""
    if isinstance(W_IO, Held):
        return product(x_xI, W_IO).astype(x_xI.dtype)
    return jnp.matmul(x_xI, W_IO)


def explicit(W_IO: Weight, dtype: Any = None) -> jax.Array:
    """The weight as an array ``[I, O]`` in ``dtype`` (by default its own), however it is held."""
    if isinstance(W_IO, Held):
        return W_IO.explicit(dtype)
    return W_IO if dtype is None else W_IO.astype(dtype)


def finish(y_xO: jax.Array, bias_O: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Adds the bias in float32 and rounds to the activations' dtype.

    The result is named :data:`PROJECTED` for policies of rematerialisation.
    """
    if bias_O is not None:
        y_xO = y_xO + bias_O.astype(y_xO.dtype).reshape((1,) * (y_xO.ndim - 1) + (-1,))
    return checkpoint_name(y_xO.astype(dtype), PROJECTED)


@singledispatch
def apply(
    adapter: Any, x_BTI: jax.Array, W_IO: Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """A projection under an adapter: ``[B, T, I] → [B, T, O]`` in the dtype of ``x``.

    Dispatches on the adapter's type; ``None`` is the base projection ``x @ W + bias``.

    Raises:
        TypeError: no kind of adapter has this type.
    """
    raise TypeError(f"{type(adapter).__name__} is not an adapter")


@apply.register
def _base(
    adapter: None, x_BTI: jax.Array, W_IO: Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    return finish(product(x_BTI, W_IO), bias_O, x_BTI.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """In the place of ``None``: the base projection with its result rounded as it is made.

    A GPU's library then adds the bias, and applies GELU, as part of the product. Sums are accumulated in
    float32 all the same; the bias is added in the activations' dtype.
    """


ROUNDED = Rounded()


def rounding_others(
    hooks: Sequence[Mapping[str, Any]], targets: Iterable[str]
) -> list[dict[str, Any]]:
    """The hooks of every layer, and :data:`ROUNDED` for those of the targets that have none."""
    plain = dict.fromkeys(targets, ROUNDED)
    return [plain | dict(own) for own in hooks]


@apply.register
def _rounded(
    adapter: Rounded, x_BTI: jax.Array, W_IO: Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    if isinstance(W_IO, Held):
        return _base(None, x_BTI, W_IO, bias_O)
    y_BTO = jnp.matmul(x_BTI, W_IO)
    if bias_O is not None:
        y_BTO = y_BTO + bias_O.astype(y_BTO.dtype)[None, None]
    return checkpoint_name(y_BTO, PROJECTED)
