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

from flora_jax.weights.dense import Plain
from flora_jax.weights.held import BaseWeight, plus_bias

PROJECTED = "projected"
# What stands as a base weight [I, O] in every function of a kind.
Weight = jax.Array | BaseWeight


def as_weight(W_IO: Weight) -> BaseWeight:
    """The weight with the methods that all ways to hold one have."""
    return W_IO if isinstance(W_IO, BaseWeight) else Plain(W_IO)


def product(x_xI: jax.Array, W_IO: Weight) -> jax.Array:
    """``x @ W`` over the last axis of ``x``, accumulated and returned in float32.

    A quantised weight gets no gradient.
    """
    return as_weight(W_IO).matmul(x_xI)


def rounded(x_xI: jax.Array, W_IO: Weight) -> jax.Array:
    """:func:`product` rounded to the dtype of ``x``, in full precision by the product itself."""
    return as_weight(W_IO).rounded(x_xI)


def explicit(W_IO: Weight, dtype: Any = None) -> jax.Array:
    """The weight as an array ``[I, O]`` in ``dtype`` (by default its own), however it is held."""
    return as_weight(W_IO).explicit(dtype)


def finish(y_xO: jax.Array, bias_O: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Adds the bias in float32 and rounds to the activations' dtype.

    The result is named :data:`PROJECTED` for policies of rematerialisation.
    """
    return checkpoint_name(plus_bias(y_xO, bias_O).astype(dtype), PROJECTED)


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
    return checkpoint_name(as_weight(W_IO).rounded(x_BTI, bias_O), PROJECTED)
