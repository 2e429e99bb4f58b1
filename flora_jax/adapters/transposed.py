"""A base weight held by outputs, ``[O, I]``, in the place of one that is ``[I, O]``.

A CPU's product of a few rows reads it up to 1.6 times faster so (16 to 32 rows); of hundreds of rows the
two are equal. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """Stands in the place of a weight ``[I, O]``; ``W_OI`` is its transpose."""

    W_OI: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.W_OI.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        return self.W_OI.dtype

    def __getitem__(self, index: Any) -> Transposed:
        """``W[...]``, by which a ``nnx.Param`` hands out its value; ``TypeError`` for any part."""
        if index is not Ellipsis:
            raise TypeError(f"a transposed weight has no parts, found index {index!r}")
        return self


def matmul(x_xI: jax.Array, W_IO: Transposed) -> jax.Array:
    """``x @ W`` over the last axis of ``x``, accumulated and returned in float32."""
    return jnp.einsum("...i,oi->...o", x_xI, W_IO.W_OI, preferred_element_type=jnp.float32)
