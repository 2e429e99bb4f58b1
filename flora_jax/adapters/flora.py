"""FLoRA: the base weight times a low-rank matrix per example (the paper's Eq. 4 to 6).

``W_i = W ∘ s · (down_iᵀ up_i)`` and so ``y = s · Σ_r up_r ∘ ((x ∘ down_r) W)``, one product for the
whole batch. The paper's ``B`` is ``down``, its ``A`` is ``up``; ``s`` is ``1/r`` for the reduction
``mean`` (the paper's) and 1 for ``sum``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import fits, multiplicative
from flora_jax.adapters.kind import Components, Kind, WeightOf, adds, uniform_fan_in, zeros
from flora_jax.shapes import check_shapes
from flora_jax.weights import product

Reduction = Literal["mean", "sum"]
Init = Literal["zero_sum", "ones", "frozen_ones"]
# A change is small that is less than this share of the weight.
_SMALL = 1e-2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FLoRA:
    """``down [R, I]`` scales the inputs (the paper's ``B``), ``up [R, O]`` the outputs (its ``A``); both
    may have a leading batch axis.

    The same numbers under another reduction are another adapter. The first ``frozen`` components
    get no gradient.
    """

    down_RI: jax.Array
    up_RO: jax.Array
    reduction: Reduction = dataclasses.field(default="mean", metadata=dict(static=True))
    frozen: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"FLoRA's reduction is {self.reduction!r}, expected 'mean' or 'sum'")


def init(
    key: jax.Array,
    inputs: int,
    outputs: int,
    rank: int,
    *,
    weight: WeightOf | None = None,
    reduction: Reduction = "mean",
    init: Init = "zero_sum",
    noise: float = 0.1,
) -> FLoRA:
    """The identity at the start, by one of three ways.

    - ``zero_sum``: ``up = 1/(s·r)``, ``down_r = 1 + ε_r`` with normal ``ε`` of standard deviation about
      ``noise`` that sums to zero over the components: the identity to rounding, components differ.
    - ``ones``: every component is ones. They then get the same gradient for ever, so that an
      adapter of rank above 1 stays one of rank 1.
    - ``frozen_ones``: the first component is ones and frozen, the others start as LoRA's do: the
      identity to the bit (HiRA's way).

    Raises:
        ValueError: another name of ``init``, or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"FLoRA's rank is {rank}, expected at least 1")
    share = 1.0 if reduction == "mean" else 1.0 / rank
    down_RI = jnp.ones((rank, inputs), jnp.float32)
    up_RO = jnp.full((rank, outputs), share, jnp.float32)
    if init == "zero_sum":
        epsilon_RI = noise * jax.random.normal(key, (rank, inputs), jnp.float32)
        down_RI = down_RI + epsilon_RI - jnp.mean(epsilon_RI, axis=0, keepdims=True)
        return FLoRA(down_RI, up_RO, reduction)
    if init == "frozen_ones":
        down_RI = down_RI.at[1:].set(uniform_fan_in(key, (rank, inputs))[1:])
        up_RO = jnp.zeros_like(up_RO).at[0].set(rank * share)
        return FLoRA(down_RI, up_RO, reduction, frozen=1)
    if init == "ones":
        return FLoRA(down_RI, up_RO, reduction)
    raise ValueError(f"FLoRA's init is {init!r}, expected one of {', '.join(get_args(Init))}")


def _scale(params: FLoRA) -> float:
    return 1.0 / params.down_RI.shape[-2] if params.reduction == "mean" else 1.0


def _factors(params: FLoRA) -> tuple[jax.Array, jax.Array]:
    """``down`` and ``s·up`` in float32, gradients of the frozen components stopped."""

    def freeze(factor: jax.Array) -> jax.Array:
        if not params.frozen:
            return factor
        held, free = jnp.split(factor, [params.frozen], axis=-2)
        return jnp.concatenate([jax.lax.stop_gradient(held), free], axis=-2)

    return (
        freeze(params.down_RI).astype(jnp.float32),
        _scale(params) * freeze(params.up_RO).astype(jnp.float32),
    )


def apply(
    params: FLoRA, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """Eq. 6 with one adapter per row: ``[B, T, O]`` in the dtype of ``x``; the bias comes after."""
    check_shapes(
        "flora.apply", x_BTI=x_BTI, W_IO=W_IO, down_BRI=params.down_RI, up_BRO=params.up_RO
    )
    y_BTO = multiplicative.apply_batch(*_factors(params), x_BTI, W_IO)
    return product.finish(y_BTO, bias_O, x_BTI.dtype)


def apply_one(
    params: FLoRA, x_TI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """One example (Eq. 5): ``[T, O]``."""
    y_TO = multiplicative.apply_one(*_factors(params), x_TI, W_IO)
    return product.finish(y_TO, bias_O, x_TI.dtype)


def merge(
    params: FLoRA, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The explicit ``W_i`` (Eq. 4) in the dtype of ``W``, and the unchanged bias."""
    return multiplicative.merge(*_factors(params), W_IO), bias_O


def components(
    params: FLoRA, inputs: int, outputs: int, weight: WeightOf | None = None
) -> Components:
    up_RO = np.float32(_scale(params)) * np.asarray(params.up_RO, np.float32)
    none = zeros(0, inputs), zeros(0, outputs)
    return Components(np.asarray(params.down_RI, np.float32), up_RO, *none)


def redraw(params: FLoRA, draw: Callable[..., Any], spread: float) -> FLoRA:
    """Around one, so that the adapted weights keep their size."""
    return jax.tree.map(lambda leaf: draw(leaf, 1.0, spread), params)


def freeze(updates: FLoRA) -> FLoRA:
    """Zeros for the frozen components."""
    if not updates.frozen:
        return updates
    return jax.tree.map(lambda leaf: leaf.at[..., : updates.frozen, :].set(0.0), updates)


def of_components(components: Components, weight: WeightOf) -> FLoRA:
    """Its pairs as they are, summed.

    Raises:
        ValueError: something is added to the weight.
    """
    if adds(components):
        raise ValueError("it adds to the weight, and a FLoRA only multiplies it")
    return FLoRA(jnp.asarray(components.pre_RI), jnp.asarray(components.post_RO), "sum")


def nearest(
    W_IO: jax.Array, wanted_IO: jax.Array, rank: int, moments_I: jax.Array, key: jax.Array
) -> FLoRA:
    """By alternating least squares, see :func:`flora_jax.adapters.fits.product_of`.

    Of a small change the equations for the whole weight leave little in float32: where those for the
    change alone, beside a component of ones, do better, they count.
    """
    fit = fits.product_of(W_IO, wanted_IO, rank, moments_I, key=key)
    whole, change = (
        jnp.sum(moments_I[:, None] * jnp.square(x)) for x in (wanted_IO, wanted_IO - W_IO)
    )
    if rank > 1 and change < _SMALL**2 * whole:
        part = fits.product_of(W_IO, wanted_IO - W_IO, rank - 1, moments_I, key=key)
        if part.left * change < fit.left * whole:
            one = ((1, 0), (0, 0))
            down_RI, up_RO = (jnp.pad(x, one, constant_values=1.0) for x in part[:2])
            return FLoRA(down_RI, up_RO, "sum")
    return FLoRA(fit.down_RI, fit.up_RO, "sum")


KIND = Kind(
    "flora", FLoRA, init, apply, apply_one, merge, components, redraw,
    freeze=freeze, of_components=of_components, nearest=nearest,
)  # fmt: skip
