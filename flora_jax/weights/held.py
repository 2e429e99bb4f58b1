"""How a base weight is held: the interface of all the ways.

A way is a frozen dataclass pytree that stands in the place of a weight ``[I, O]``; products, merges,
reading and writing ask it, and no other file asks which way it is. Knows nothing of models.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

# ``Σ_r left_r right_rᵀ`` of ``[R, X]`` and ``[R, Y]`` for a weight of a dtype: float32 ``[X, Y]``.
Outer = Callable[[jax.Array, jax.Array, np.dtype], jax.Array]


class BaseWeight(abc.ABC):
    """What products and adapters ask of a weight ``[I, O]``."""

    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(I, O)``, however it is held."""

    @abc.abstractmethod
    def matmul(self, x_xI: jax.Array) -> jax.Array:
        """``x @ W`` over the last axis of ``x``, accumulated and returned in float32."""

    def rounded(self, x_xI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
        """``x @ W + bias`` in the dtype of ``x``, rounded as early as this way allows."""
        return plus_bias(self.matmul(x_xI), bias_O).astype(x_xI.dtype)

    @abc.abstractmethod
    def explicit(self, dtype: Any = None) -> jax.Array:
        """The weight as an array ``[I, O]`` in ``dtype``, by default its own."""

    def scaled(self, pre_RI: jax.Array, post_RO: jax.Array, outer: Outer) -> jax.Array | BaseWeight:
        """``W ∘ Σ_r pre_r post_rᵀ`` in the weight's dtype; ``outer`` makes the sum."""
        factor_IO = outer(pre_RI, post_RO, self.dtype)
        return (self.explicit(jnp.float32) * factor_IO).astype(self.dtype)

    @abc.abstractmethod
    def columns(self, number: jax.Array, count: int) -> Self:
        """Slice ``number`` of ``count`` of the outputs, see :func:`flora_jax.weights.slices.columns`."""

    @property
    def slices_to_merge(self) -> int:
        """Into how many slices of outputs to cut before an explicit weight is built from it: one, unless
        such a weight would need much more memory than it has itself."""
        return 1


class Held(BaseWeight):
    """A weight as it stands among a model's parameters."""

    @abc.abstractmethod
    def specs(self, spec: Any) -> Any:
        """This with a ``PartitionSpec`` in each array's place, from that of a weight ``[I, O]``."""

    @property
    def input_units(self) -> int:
        """Groups of inputs that stay on one device; a cut by the inputs divides their number."""
        return self.shape[0]

    @abc.abstractmethod
    def reading(self, placed: Any) -> Reading:
        """How such a weight, described by shapes, is made from the array ``[O, I]`` of a file.

        ``placed`` is the same with a sharding in each array's place, or ``None``.
        """

    @abc.abstractmethod
    def stored(self) -> jax.Array:
        """The array ``[O, I]`` that files have.

        Raises:
            ValueError: the weight is not in full precision; the message is what it is in.
        """

    def __getitem__(self, index: Any) -> Self:
        """``W[...]``, by which a ``nnx.Param`` hands out its value; ``TypeError`` for any part."""
        if index is not Ellipsis:
            raise TypeError(f"a {type(self).__name__} weight has no parts, found index {index!r}")
        return self


class Reading(NamedTuple):
    """How a parameter is made from the array that files have.

    ``dtype`` is that in which the array is read, ``None`` for the one in which it is stored; ``sharding``
    where it lies until ``make`` takes it, ``None`` for JAX's device.
    """

    dtype: np.dtype | None
    sharding: Any
    make: Callable[[jax.Array], Any]


def reading_of(leaf: Any, placed: Any) -> Reading:
    """:meth:`Held.reading` of a weight; any other parameter is what files have."""
    if isinstance(leaf, Held):
        return leaf.reading(placed)
    return Reading(leaf.dtype, placed, lambda array: array)


def stored_array(leaf: Any) -> jax.Array:
    """:meth:`Held.stored` of a weight; any other parameter is what files have."""
    return leaf.stored() if isinstance(leaf, Held) else leaf


def plus_bias(y_xO: jax.Array, bias_O: jax.Array | None) -> jax.Array:
    """``y + bias`` over the last axis in the dtype of ``y``."""
    if bias_O is None:
        return y_xO
    return y_xO + bias_O.astype(y_xO.dtype).reshape((1,) * (y_xO.ndim - 1) + (-1,))
