"""DoRA: LoRA whose rows of the weight are scaled to learned lengths (weight-decomposed LoRA).

``W_i = (W + s · down_iᵀ up_i) ∘ (1 gᵀ)`` with ``g_o = m_o / ‖(W + s · down_iᵀ up_i)_o‖``, the norm over
the inputs of output ``o``. The bias is added after, unscaled. As components: one multiplicative pair
``(1, g)`` and additive pairs ``(down_r, s · up_r ∘ g)``. An output whose norm is zero, to rounding, has
``g = 0``.

The norm needs the base weight, but not ``W_i``:
``‖·‖² = ‖w_o‖² + 2s Σ_r up_ro (down_r · w_o) + s² Σ_rq up_ro up_qo (down_r · down_q)``,
one product with ``R`` rows and one pass over ``W``. It gets no gradient, as in PEFT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import fits, lora
from flora_jax.adapters.kind import (
    Components,
    Kind,
    Side,
    WeightOf,
    additive_part,
    ones,
    widths_of_sides,
    zeros,
)
from flora_jax.shapes import check_shapes
from flora_jax.weights import product
from flora_jax.weights.held import BaseWeight
from flora_jax.weights.slices import join_columns, slices

# A squared norm below this share of its parts is what rounding leaves of zero.
_ROUNDING = 1e-6
# Of finding the nearest: the scales have settled by then.
_TURNS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoRA:
    """``down [R, I]``, ``up [R, O]`` and ``magnitude [O]``, or all with a leading batch axis."""

    down_RI: jax.Array
    up_RO: jax.Array
    magnitude_O: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))

    @property
    def low_rank(self) -> lora.LoRA:
        """Its LoRA, before the lengths are set."""
        return lora.LoRA(self.down_RI, self.up_RO, self.scale)


def _of_weight(down_RI: jax.Array, W_IO: product.Weight) -> tuple[jax.Array, jax.Array]:
    """``‖w_o‖² [O]`` and ``down · W [R, O]``, float32; of a large weight by slices of its outputs."""

    def part(W_Io: BaseWeight) -> tuple[jax.Array, jax.Array]:
        wide_Io = product.explicit(W_Io, jnp.float32)
        return jnp.sum(jnp.square(wide_Io), axis=0), jnp.matmul(
            down_RI, wide_Io, precision="highest"
        )

    weight = product.as_weight(W_IO)
    count = slices(weight.shape)
    if count == 1:
        return part(weight)
    found = jax.lax.map(lambda number: part(weight.columns(number, count)), jnp.arange(count))
    return jax.tree.map(join_columns, found)


def _norm(down_RI: jax.Array, up_RO: jax.Array, W_IO: product.Weight) -> jax.Array:
    """``‖(W + downᵀ up)_o‖``, float32 ``[O]`` of float32 factors; ``up`` has the scale in it."""
    squares_O, product_RO = _of_weight(down_RI, W_IO)
    gram_RR = jnp.matmul(down_RI, down_RI.T, precision="highest")
    own_O = jnp.sum(up_RO * jnp.matmul(gram_RR, up_RO, precision="highest"), axis=0)
    total_O = squares_O + 2 * jnp.sum(up_RO * product_RO, axis=0) + own_O
    return jnp.sqrt(jnp.where(total_O > _ROUNDING * (squares_O + own_O), total_O, 0))


def _over(magnitude_O: jax.Array, norm_O: jax.Array) -> jax.Array:
    """``m / norm``, 0 where the norm is."""
    gain_O = magnitude_O.astype(jnp.float32) / jnp.where(norm_O > 0, norm_O, 1)
    return jnp.where(norm_O > 0, gain_O, 0)


def gain(params: DoRA, W_IO: product.Weight) -> jax.Array:
    """``g [O]`` of one adapter, float32; its gradient is that of the magnitude alone."""
    wide = (params.down_RI.astype(jnp.float32), params.scale * params.up_RO.astype(jnp.float32))
    norm_O = _norm(*jax.lax.stop_gradient(wide), jax.lax.stop_gradient(W_IO))
    return _over(params.magnitude_O, norm_O)


# Of a weight and an adapter that is read or starts: a program for each weight's shape and padded rank.
_norm_at_once = jax.jit(_norm)


def _padded_rank(rank: int) -> int:
    """A power of four: a row more costs next to nothing beside the pass over the weight."""
    size = 4
    while size < rank:
        size *= 4
    return size


def _norm_on_host(down_RI: Any, up_RO: Any, W_IO: product.Weight) -> np.ndarray:
    """:func:`_norm` of factors on the host, by the program for their padded rank."""
    padding = ((0, _padded_rank(len(down_RI)) - len(down_RI)), (0, 0))
    return np.asarray(_norm_at_once(np.pad(down_RI, padding), np.pad(up_RO, padding), W_IO))


def _required(weight: WeightOf | None) -> product.Weight:
    if weight is None:
        raise ValueError("a DoRA depends on the base's weights, and none were given")
    return weight()


def init(
    key: jax.Array,
    inputs: int,
    outputs: int,
    rank: int,
    *,
    weight: WeightOf | None = None,
    alpha: float | None = None,
) -> DoRA:
    """The identity at the start: LoRA's, and the lengths that the rows of ``weight`` have.

    Raises:
        ValueError: there is no ``weight``.
    """
    start = lora.init(key, inputs, outputs, rank, alpha=alpha)
    none = jnp.zeros((1, inputs)), jnp.zeros((1, outputs))
    magnitude_O = _norm_at_once(*none, _required(weight))
    return DoRA(start.down_RI, start.up_RO, magnitude_O.astype(jnp.float32), start.scale)


def apply(
    params: DoRA, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """``g ∘ (x W + s · (x downᵀ) up) + bias`` with one adapter per row: ``[B, T, O]``, dtype of ``x``."""
    check_shapes(
        "dora.apply", x_BTI=x_BTI, W_IO=W_IO, down_BRI=params.down_RI, up_BRO=params.up_RO,
        magnitude_BO=params.magnitude_O,
    )  # fmt: skip
    gain_BO = jax.vmap(gain, (0, None))(params, W_IO)
    delta_BTO = jax.vmap(lora.branch)(params.low_rank, x_BTI.astype(jnp.float32))
    y_BTO = (product.product(x_BTI, W_IO) + delta_BTO) * gain_BO[:, None]
    return product.finish(y_BTO, bias_O, x_BTI.dtype)


def apply_one(
    params: DoRA, x_TI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """One example: ``[T, O]``."""
    return train_one(params, x_TI, W_IO, bias_O, None, False)


def train_one(
    params: DoRA,
    x_XI: jax.Array,
    W_IO: product.Weight,
    bias_O: jax.Array | None,
    own_XI: jax.Array | None,
    rounded: bool,
) -> jax.Array:
    """``[X, O]``, see ``Kind.train_one``. With inputs that were dropped, as in PEFT,
    ``x W + (g - 1) ∘ (own W) + g ∘ s · (own downᵀ) up + bias``.
    """
    gain_O = gain(params, W_IO)[None]
    multiply = product.rounded if rounded else product.product
    branch = lora.rounded_branch if rounded else lora.branch
    part_XI = (x_XI if own_XI is None else own_XI).astype(x_XI.dtype)
    adapted_XI = part_XI if rounded else part_XI.astype(jnp.float32)
    delta_XO = branch(params.low_rank, adapted_XI).astype(jnp.float32)
    y_XO = multiply(x_XI, W_IO).astype(jnp.float32)
    if own_XI is None:
        y_XO = gain_O * (y_XO + delta_XO)
    else:
        part_XO = multiply(part_XI, W_IO).astype(jnp.float32)
        y_XO = y_XO + (gain_O - 1) * part_XO + gain_O * delta_XO
    return product.finish(y_XO, bias_O, x_XI.dtype)


def merge(
    params: DoRA, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The explicit ``W_i`` in the dtype of ``W``, and the unchanged bias."""
    delta_IO = params.down_RI.astype(jnp.float32).T @ params.up_RO.astype(jnp.float32)
    wide_IO = product.explicit(W_IO, jnp.float32) + params.scale * delta_IO
    return (wide_IO * gain(params, W_IO)[None]).astype(W_IO.dtype), bias_O


def components(
    params: DoRA, inputs: int, outputs: int, weight: WeightOf | None = None
) -> Components:
    """``g`` is computed on the weight's device, by a program that :func:`rehearse` has compiled.

    Raises:
        ValueError: there is no ``weight``.
    """
    down_RI, up_RO, magnitude_O = (
        np.asarray(x, np.float32) for x in (params.down_RI, params.up_RO, params.magnitude_O)
    )
    up_RO = np.float32(params.scale) * up_RO
    norm_O = _norm_on_host(down_RI, up_RO, _required(weight))
    gain_O = np.divide(magnitude_O, norm_O, out=np.zeros_like(norm_O), where=norm_O > 0)
    return Components(ones(1, inputs), gain_O[None], down_RI, up_RO * gain_O)


def rehearse(W_IO: product.Weight, rank: int) -> None:
    """Runs the programs of :func:`components` for this weight's shape and every rank up to ``rank``."""
    inputs, outputs = W_IO.shape
    for size in sorted({_padded_rank(number) for number in range(1, rank + 1)}):
        _norm_on_host(zeros(size, inputs), zeros(size, outputs), W_IO)


def redraw(params: DoRA, draw: Callable[..., Any], spread: float) -> DoRA:
    """LoRA's, and lengths around one."""
    own = lora.redraw(params.low_rank, draw, spread)
    return DoRA(own.down_RI, own.up_RO, draw(params.magnitude_O, 1.0, spread), params.scale)


def widths(params: DoRA) -> list[tuple[Side, int]]:
    return [*widths_of_sides(params), ("output", params.magnitude_O.shape[-1])]


def of_components(components: Components, weight: WeightOf) -> DoRA:
    """Lengths ``g · ‖W + down · up / g‖`` where the weight's outputs are scaled by ``g``, one for a LoRA.

    Raises:
        ValueError: inputs are scaled, or something is added to an output that is scaled by zero.
    """
    pre_RI, post_RO = components.pre_RI, components.post_RO
    if np.ptp(pre_RI, axis=1).any():
        raise ValueError("it scales inputs, and a DoRA scales outputs alone")
    gain_O = pre_RI[:, 0] @ post_RO
    down_RI, up_RO = additive_part(components)
    if up_RO[down_RI.any(axis=1)][:, gain_O == 0].any():
        raise ValueError("it adds to an output that it scales by zero, and a DoRA scales both")
    up_RO = up_RO / np.where(gain_O == 0, np.float32(1), gain_O)[None]
    magnitude_O = gain_O * _norm_on_host(down_RI, up_RO, weight())
    return DoRA(jnp.asarray(down_RI), jnp.asarray(up_RO), jnp.asarray(magnitude_O))


def nearest(
    W_IO: jax.Array, wanted_IO: jax.Array, rank: int, moments_I: jax.Array, key: jax.Array
) -> DoRA:
    """The best LoRA for given scales of the outputs, and the best scales for it, a few times in turn.

    Both together have no closed form: the better of two starts, no scales and the best ones alone.
    """
    starts = jnp.ones(W_IO.shape[1]), _best_gain(W_IO, wanted_IO, moments_I)
    found = (_in_turn(W_IO, wanted_IO, gain_O, moments_I, rank) for gain_O in starts)
    _, down_RI, up_RO, gain_O = min(found, key=lambda one: float(one[0]))
    return DoRA(down_RI, up_RO, gain_O * _norm(down_RI, up_RO, W_IO))


def _best_gain(near_IO: jax.Array, wanted_IO: jax.Array, moments_I: jax.Array) -> jax.Array:
    """``g [O]`` for which ``near ∘ g`` is nearest."""
    own_I1 = moments_I[:, None]
    square_O = jnp.sum(own_I1 * jnp.square(near_IO), axis=0)
    shared_O = jnp.sum(own_I1 * near_IO * wanted_IO, axis=0)
    return jnp.where(square_O > 0, shared_O / jnp.where(square_O > 0, square_O, 1.0), 1.0)


@partial(jax.jit, static_argnames="rank")
def _in_turn(
    W_IO: jax.Array, wanted_IO: jax.Array, gain_O: jax.Array, moments_I: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``Σ m (W_i - wanted)²``, ``down``, ``up`` and ``g`` after some turns from ``g``."""

    def turn(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gain_O = state[-1]
        # ``(W + downᵀ up) ∘ g - wanted``: the sum of singular values for ``up ∘ g`` is the least.
        fit = fits.sum_of(wanted_IO - W_IO * gain_O[None], rank, moments_I)
        none_1O = (gain_O == 0)[None]
        up_RO = jnp.where(none_1O, 0.0, fit.up_RO / jnp.where(none_1O, 1.0, gain_O[None]))
        near_IO = W_IO + jnp.matmul(fit.down_RI.T, up_RO, precision="highest")
        gain_O = _best_gain(near_IO, wanted_IO, moments_I)
        left = jnp.sum(moments_I[:, None] * jnp.square(near_IO * gain_O[None] - wanted_IO))
        return left, fit.down_RI, up_RO, gain_O

    inputs, outputs = W_IO.shape
    start = jnp.inf, jnp.zeros((rank, inputs)), jnp.zeros((rank, outputs)), gain_O
    left, down_RI, up_RO, gain_O = jax.lax.fori_loop(0, _TURNS, turn, start)
    return left, down_RI, up_RO, gain_O


KIND = Kind(
    "dora", DoRA, init, apply, apply_one, merge, components, redraw,
    widths=widths, train_one=train_one, rehearse=rehearse,
    of_components=of_components, nearest=nearest,
)  # fmt: skip
