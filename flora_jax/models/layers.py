"""Layers that the families share: linear projections with an adapter hook, norms, activation functions.

A layer holds parameters under names of its own. Adapters arrive as an argument: ``adapters[target]`` is
anything that ``flora_jax.weights.product.apply`` takes. Knows nothing of attention or of a family.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.model import LayerAdapters
from flora_jax.weights.dense import Dense
from flora_jax.weights.held import Held
from flora_jax.weights.product import apply

# By the names that flora_jax.models.config_fields allows.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Linear(nnx.Module):
    """Holds ``kernel``, a weight in whatever way, and ``bias [O]``; :func:`project` computes with it."""

    def __init__(self, kernel: Held, bias_O: jax.Array | None):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias_O is None else nnx.Param(bias_O)


def random_weight(widths: tuple[int, int], std: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> Dense:
    """A weight of ``(inputs, outputs)`` normally distributed numbers, for a projection or a head."""
    return Dense(nnx.initializers.normal(std)(rngs.params(), widths, dtype).T)


def linear(
    widths: tuple[int, int], std: float, dtype: jnp.dtype, rngs: nnx.Rngs, *, bias: bool = True
) -> Linear:
    """A linear projection with a random kernel.

    Args:
        widths: inputs and outputs.
        std: standard deviation of the random kernel; the bias is zero.
        dtype: of both.
        rngs: for the kernel.
        bias: whether there is one.
    """
    kernel = random_weight(widths, std, dtype, rngs)
    return Linear(
        kernel, nnx.initializers.zeros(rngs.params(), widths[1:], dtype) if bias else None
    )


def project(x_BTI: jax.Array, holder: Linear, adapters: LayerAdapters, target: str) -> jax.Array:
    """A projection under the layer's adapter for ``target``, if it has one: ``[B, T, I] → [B, T, O]``."""
    bias_O = None if holder.bias is None else holder.bias[...]
    return apply(adapters.get(target), x_BTI, holder.kernel[...], bias_O)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis in float32, rounded to the input's dtype.

    Args:
        width: of the axis.
        epsilon: added to the variance.
        dtype: of ``scale`` and ``bias``.
    """

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))

    def __call__(self, x_xD: jax.Array) -> jax.Array:
        wide = x_xD.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(
            jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon
        )
        scale, bias = (
            _along_last(p[...].astype(jnp.float32), x_xD) for p in (self.scale, self.bias)
        )
        return (centred * inverse * scale + bias).astype(x_xD.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis in float32.

    The normalised numbers are rounded to the input's dtype before they are scaled, as in Llama.

    Args:
        width: of the axis.
        epsilon: added to the mean square.
        dtype: of ``scale``.
    """

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x_xD: jax.Array) -> jax.Array:
        wide = x_xD.astype(jnp.float32)
        size = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        narrow = (wide * jax.lax.rsqrt(size + self.epsilon)).astype(x_xD.dtype)
        return narrow * _along_last(self.scale[...].astype(x_xD.dtype), x_xD)


def _along_last(values_D: jax.Array, x_xD: jax.Array) -> jax.Array:
    """The same with an axis of one for each leading axis of ``x``."""
    return values_D[(None,) * (x_xD.ndim - 1)]
