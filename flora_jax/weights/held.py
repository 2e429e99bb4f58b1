"""How a base weight is held where it is no plain array ``[I, O]``: the interface of all the ways.

A way is a frozen dataclass pytree that stands in a weight's place; products and merges ask it, and no
other file asks which way it is. Knows nothing of models.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

# ``Σ_r left_r right_rᵀ`` of ``[R, X]`` and ``[R, Y]`` for a weight of a dtype: float32 ``[X, Y]``.
Outer = Callable[[jax.Array, jax.Array, np.dtype], jax.Array]


class Held(abc.ABC):
    """Stands in the place of a weight ``[I, O]``."""

    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(I, O)``, however it is held."""

    @abc.abstractmethod
    def matmul(self, x_xI: jax.Array) -> jax.Array:
        """``x @ W`` over the last axis of ``x``, accumulated and returned in float32."""

    @abc.abstractmethod
    def explicit(self, dtype: Any = None) -> jax.Array:
        """The weight as an array ``[I, O]`` in ``dtype``, by default its own."""

    @abc.abstractmethod
    def specs(self, spec: Any) -> Any:
        """This with a ``PartitionSpec`` in each array's place, from that of a weight ``[I, O]``."""

    def scaled(self, pre_RI: jax.Array, post_RO: jax.Array, outer: Outer) -> jax.Array | Held:
        """``W ∘ Σ_r pre_r post_rᵀ`` in the weight's dtype; ``outer`` makes the sum."""
        factor_IO = outer(pre_RI, post_RO, self.dtype)
        return (self.explicit(jnp.float32) * factor_IO).astype(self.dtype)

    def __getitem__(self, index: Any) -> Self:
        """``W[...]``, by which a ``nnx.Param`` hands out its value; ``TypeError`` for any part."""
        if index is not Ellipsis:
            raise TypeError(f"a {type(self).__name__} weight has no parts, found index {index!r}")
        return self
