"""A base weight in full precision: by outputs, ``[O, I]``, as models hold theirs, or an array ``[I, O]``.

By outputs is how files have it. A CPU multiplies a few rows faster so; of hundreds of rows, and on a GPU,
the two are equal. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.weights.held import BaseWeight, Held, Outer, Reading, plus_bias
from flora_jax.weights.slices import columns

# Rows from which a CPU's product has the same speed with the weight on either side.
_MANY = 512
# The weight's axes in order, inputs and outputs.
Axes = Literal["io", "oi"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Held):
    """The weight by outputs."""

    W_OI: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.W_OI.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        return self.W_OI.dtype

    def matmul(self, x_xI: jax.Array) -> jax.Array:
        """On a CPU a few rows are the right operand, ``(W_OI xᵀ)ᵀ``: a speed-up of up to 1.8x."""
        return _matmul("oi", x_xI, self.W_OI)

    def rounded(self, x_xI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
        """The bias is added in the dtype of ``x``: a GPU's library does it inside the product."""
        return plus_bias(_dot("oi", x_xI, self.W_OI, None), bias_O)

    def explicit(self, dtype: Any = None) -> jax.Array:
        """See :meth:`BaseWeight.explicit`."""
        return self.W_OI.T if dtype is None else self.W_OI.T.astype(dtype)

    def specs(self, spec: Any) -> Dense:
        """The array has the weight's axes the other way round."""
        return Dense(type(spec)(*reversed(spec)))

    def scaled(self, pre_RI: jax.Array, post_RO: jax.Array, outer: Outer) -> Dense:
        """``W ∘ Σ_r pre_r post_rᵀ``, held by outputs as well."""
        factor_OI = outer(post_RO, pre_RI, self.dtype)
        return Dense((self.W_OI.astype(jnp.float32) * factor_OI).astype(self.dtype))

    def reading(self, placed: Any) -> Reading:
        """As it is stored."""
        return Reading(self.dtype, None if placed is None else placed.W_OI, Dense)

    def stored(self) -> jax.Array:
        """The array itself."""
        return self.W_OI

    def columns(self, number: jax.Array, count: int) -> Dense:
        """See :meth:`BaseWeight.columns`."""
        return Dense(columns(self.W_OI, number, count, axis=0))


@dataclasses.dataclass(frozen=True)
class Plain(BaseWeight):
    """An array ``[I, O]``, as the functions of the kinds take it."""

    W_IO: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.W_IO.shape

    @property
    def dtype(self) -> np.dtype:
        return self.W_IO.dtype

    def matmul(self, x_xI: jax.Array) -> jax.Array:
        """Of float32 arrays it can be differentiated in both modes."""
        if _are_halves(x_xI, self.W_IO):
            return _matmul("io", x_xI, self.W_IO)
        return _dot("io", x_xI, self.W_IO, jnp.float32)

    def rounded(self, x_xI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
        """See :meth:`Dense.rounded`."""
        return plus_bias(_dot("io", x_xI, self.W_IO, None), bias_O)

    def explicit(self, dtype: Any = None) -> jax.Array:
        """See :meth:`BaseWeight.explicit`."""
        return self.W_IO if dtype is None else self.W_IO.astype(dtype)

    def columns(self, number: jax.Array, count: int) -> Plain:
        """See :meth:`BaseWeight.columns`."""
        return Plain(columns(self.W_IO, number, count))


def _dot(axes: Axes, x_xI: jax.Array, W: jax.Array, dtype: Any) -> jax.Array:
    """``x @ W`` with a result of ``dtype``, by default that of the operands."""
    contracted = ((x_xI.ndim - 1,), (axes.index("i"),))
    return jax.lax.dot_general(x_xI, W, (contracted, ((), ())), preferred_element_type=dtype)


def _are_halves(x_xI: jax.Array, W: jax.Array) -> bool:
    return x_xI.dtype == W.dtype and W.dtype.itemsize == 2


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(axes: Axes, x_xI: jax.Array, W: jax.Array) -> jax.Array:
    """The product, accumulated and returned in float32, and both gradients.

    A GPU computes those of 16-bit arrays from 16-bit arrays. By itself JAX multiplies the float32
    gradient of the result with a weight taken to float32: at a half or an eighth of the speed, beside
    the conversions. Nothing is lost where the result is rounded to 16 bits before anything else: its
    gradient has 16 bits as well.
    """
    rows_first = partial(_dot, axes, dtype=jnp.float32)
    if axes == "io" or math.prod(x_xI.shape[:-1]) >= _MANY:
        return rows_first(x_xI, W)
    return jax.lax.platform_dependent(x_xI, W, cpu=_weight_first, default=rows_first)


def _weight_first(x_xI: jax.Array, W_OI: jax.Array) -> jax.Array:
    x_NI = x_xI.reshape(-1, x_xI.shape[-1])
    y_ON = jnp.einsum("oi,ni->on", W_OI, x_NI, preferred_element_type=jnp.float32)
    # Without the barrier XLA turns the operands round again.
    return jax.lax.optimization_barrier(y_ON).T.reshape(*x_xI.shape[:-1], -1)


def _forward(axes: Axes, x_xI: jax.Array, W: jax.Array) -> tuple[jax.Array, Any]:
    return _matmul(axes, x_xI, W), (x_xI, W)


def _backward(axes: Axes, operands: Any, slope_xO: jax.Array) -> tuple[jax.Array, jax.Array]:
    def wide(x_xI: jax.Array, W: jax.Array, slope_xO: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(partial(_dot, axes, dtype=jnp.float32), x_xI, W)[1](slope_xO)

    x_xI, W = operands
    if not _are_halves(x_xI, W):
        return wide(x_xI, W, slope_xO)
    halves = partial(slopes_of_halves, axes)
    return jax.lax.platform_dependent(x_xI, W, slope_xO, cpu=wide, default=halves)


_matmul.defvjp(_forward, _backward)


def slopes_of_halves(
    axes: Axes, x_xI: jax.Array, W: jax.Array, slope_xO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of ``x`` and ``W``, each by one product of 16-bit arrays, added up in float32."""
    slope_xO = slope_xO.astype(x_xI.dtype)
    flat_XI, flat_XO = (a.reshape(-1, a.shape[-1]) for a in (x_xI, slope_xO))
    dx_xI = jnp.einsum(f"...o,{axes}->...i", slope_xO, W)
    return dx_xI, jnp.einsum(f"xi,xo->{axes}", flat_XI, flat_XO)
