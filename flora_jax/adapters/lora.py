"""LoRA with an adapter per example, as two batched products (bmm-LoRA, the paper's appendix A.2).

``W_i = W + scale · down_iᵀ up_i``. PEFT's ``lora_A`` is ``down``, its ``lora_B`` the transpose of
``up``; ``scale`` is ``alpha/r``, or ``alpha/sqrt(r)`` for rsLoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import fits
from flora_jax.adapters.kind import (
    ROUNDING,
    Components,
    Kind,
    WeightOf,
    additive_part,
    constant_part,
    ones,
    uniform_fan_in,
)
from flora_jax.shapes import check_shapes
from flora_jax.weights import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """``down [R, I]`` and ``up [R, O]``, or both with a leading batch axis."""

    down_RI: jax.Array
    up_RO: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))


def init(
    key: jax.Array,
    inputs: int,
    outputs: int,
    rank: int,
    *,
    weight: WeightOf | None = None,
    alpha: float | None = None,
) -> LoRA:
    """The identity at the start: ``down`` random, ``up`` zero. ``alpha`` defaults to the rank."""
    down_RI = uniform_fan_in(key, (rank, inputs))
    scale = 1.0 if alpha is None else alpha / rank
    return LoRA(down_RI, jnp.zeros((rank, outputs), jnp.float32), scale)


def apply(
    params: LoRA, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """``x W + scale · (x downᵀ) up + bias`` with one adapter per row; ``[B, T, O]``, dtype of ``x``."""
    check_shapes("lora.apply", x_BTI=x_BTI, W_IO=W_IO, down_BRI=params.down_RI, up_BRO=params.up_RO)
    h_BTR = jnp.einsum(
        "bti,bri->btr", x_BTI.astype(jnp.float32), params.down_RI.astype(jnp.float32)
    )
    delta_BTO = jnp.einsum("btr,bro->bto", h_BTR, params.up_RO.astype(jnp.float32))
    return product.finish(
        product.product(x_BTI, W_IO) + params.scale * delta_BTO, bias_O, x_BTI.dtype
    )


def apply_one(
    params: LoRA, x_TI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """One example: ``[T, O]``."""
    delta_TO = branch(params, x_TI.astype(jnp.float32))
    return product.finish(product.product(x_TI, W_IO) + delta_TO, bias_O, x_TI.dtype)


def branch(params: LoRA, x_TI: jax.Array) -> jax.Array:
    """What one adapter adds for float32 ``x``, before the bias: float32 ``[T, O]``."""
    h_TR = x_TI @ params.down_RI.astype(jnp.float32).T
    return params.scale * (h_TR @ params.up_RO.astype(jnp.float32))


def merge(
    params: LoRA, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The explicit ``W_i`` in the dtype of ``W``, and the unchanged bias."""
    delta_IO = params.down_RI.astype(jnp.float32).T @ params.up_RO.astype(jnp.float32)
    return (product.explicit(W_IO, jnp.float32) + params.scale * delta_IO).astype(
        W_IO.dtype
    ), bias_O


def components(
    params: LoRA, inputs: int, outputs: int, weight: WeightOf | None = None
) -> Components:
    return Components(
        ones(1, inputs),
        ones(1, outputs),
        np.asarray(params.down_RI, np.float32),
        np.float32(params.scale) * np.asarray(params.up_RO, np.float32),
    )


def redraw(params: LoRA, draw: Callable[..., Any], spread: float) -> LoRA:
    """So that the change is about ``spread`` of the size of a weight of unit rows."""
    rank, inputs = params.down_RI.shape
    size = (spread / (rank * inputs**0.5)) ** 0.5
    return jax.tree.map(lambda leaf: draw(leaf, 0.0, size), params)


def train_one(
    params: LoRA,
    x_XI: jax.Array,
    W_IO: product.Weight,
    bias_O: jax.Array | None,
    own_XI: jax.Array | None,
    rounded: bool,
) -> jax.Array:
    """``[X, O]``: :func:`apply_one` with the branch of ``own``, see ``Kind.train_one``."""
    own_XI = x_XI if own_XI is None else own_XI
    if not rounded:
        y_XO = product.product(x_XI, W_IO) + branch(params, own_XI.astype(jnp.float32))
    else:
        y_XO = product.rounded(x_XI, W_IO) + rounded_branch(params, own_XI.astype(x_XI.dtype))
    return product.finish(y_XO, bias_O, x_XI.dtype)


def rounded_branch(params: LoRA, x_XI: jax.Array) -> jax.Array:
    """:func:`branch` of which every product takes and gives the dtype of ``x``: ``[X, O]``."""
    h_XR = jnp.matmul(x_XI, params.down_RI.astype(x_XI.dtype).T)
    up_RO = (params.scale * params.up_RO.astype(jnp.float32)).astype(x_XI.dtype)
    return jnp.matmul(h_XR, up_RO)


def apply_narrow(
    params: LoRA, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """:func:`apply` of factors in the dtype of ``x``: sums in float32, rounded between the products."""
    wide = dict(preferred_element_type=jnp.float32)
    h_BTR = jnp.einsum("bti,bri->btr", x_BTI, params.down_RI, **wide).astype(x_BTI.dtype)
    delta_BTO = jnp.einsum("btr,bro->bto", h_BTR, params.up_RO, **wide)
    y_BTO = product.product(x_BTI, W_IO) + params.scale * delta_BTO
    return product.finish(y_BTO, bias_O, x_BTI.dtype)


def of_components(components: Components, weight: WeightOf) -> LoRA:
    """What is added, where the weight itself stays.

    Raises:
        ValueError: the weight is multiplied with something.
    """
    constant, pre_RI, _ = constant_part(components)
    if len(pre_RI) or abs(constant - 1.0) > ROUNDING:
        raise ValueError("it multiplies the weight, and a LoRA only adds to it")
    down_RI, up_RO = additive_part(components)
    return LoRA(jnp.asarray(down_RI), jnp.asarray(up_RO))


def nearest(
    W_IO: jax.Array, wanted_IO: jax.Array, rank: int, moments_I: jax.Array, key: jax.Array
) -> LoRA:
    """The best there is, by singular values."""
    fit = fits.sum_of(wanted_IO - W_IO, rank, moments_I)
    return LoRA(fit.down_RI, fit.up_RO)


KIND = Kind(
    "lora", LoRA, init, apply, apply_one, merge, components, redraw,
    train_one=train_one, apply_narrow=apply_narrow, of_components=of_components, nearest=nearest,
)  # fmt: skip
