"""IA3: a learned vector scales a projection's output, or its input (feed-forward modules).

On an output it scales the whole output of the layer, bias included, as PEFT does; on an input the
bias stays. FLoRA of rank 1 with one side ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.kind import Components, Kind, Side, WeightOf, ones, zeros
from flora_jax.adapters.multiplicative import scale_inputs
from flora_jax.shapes import check_shapes
from flora_jax.weights import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IA3:
    """``l [O]`` (output) or ``[I]`` (input), or with a leading batch axis."""

    l: jax.Array  # noqa: E741 - the paper's and PEFT's name
    side: Side = dataclasses.field(default="output", metadata=dict(static=True))

    def __post_init__(self) -> None:
        if self.side not in ("output", "input"):
            raise ValueError(f"IA3's side is {self.side!r}, expected 'output' or 'input'")


def init(
    key: jax.Array | None,
    inputs: int,
    outputs: int,
    rank: int = 1,
    *,
    weight: WeightOf | None = None,
    side: Side = "output",
) -> IA3:
    """The identity at the start: ones. ``key`` is not used and the only rank is 1."""
    if rank != 1:
        raise ValueError(f"IA3's rank is {rank}, expected 1")
    return IA3(jnp.ones(outputs if side == "output" else inputs, jnp.float32), side)


def apply(
    params: IA3, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """One adapter per row: ``[B, T, O]`` in the dtype of ``x``."""
    if params.side == "input":
        check_shapes("ia3.apply", x_BTI=x_BTI, W_IO=W_IO, l_BI=params.l)
        scaled_BTI = scale_inputs(x_BTI, params.l[:, None])
        return product.finish(product.product(scaled_BTI, W_IO), bias_O, x_BTI.dtype)
    check_shapes("ia3.apply", x_BTI=x_BTI, W_IO=W_IO, l_BO=params.l)
    y_BTO = product.finish(product.product(x_BTI, W_IO), bias_O, jnp.float32)
    return (y_BTO * params.l.astype(jnp.float32)[:, None]).astype(x_BTI.dtype)


def apply_one(
    params: IA3, x_TI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """One example: ``[T, O]``."""
    if params.side == "input":
        y_TO = product.product(scale_inputs(x_TI, params.l[None]), W_IO)
        return product.finish(y_TO, bias_O, x_TI.dtype)
    y_TO = product.finish(product.product(x_TI, W_IO), bias_O, jnp.float32)
    return (y_TO * params.l.astype(jnp.float32)[None]).astype(x_TI.dtype)


def merge(
    params: IA3, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The explicit weight in the dtype of ``W``; an output's scale goes into the bias as well."""
    factor = params.l.astype(jnp.float32)
    wide_IO = product.explicit(W_IO, jnp.float32)
    if params.side == "input":
        return (wide_IO * factor[:, None]).astype(W_IO.dtype), bias_O
    if bias_O is not None:
        bias_O = (bias_O.astype(jnp.float32) * factor).astype(bias_O.dtype)
    return (wide_IO * factor[None]).astype(W_IO.dtype), bias_O


def components(
    params: IA3, inputs: int, outputs: int, weight: WeightOf | None = None
) -> Components:
    factor = np.asarray(params.l, np.float32)
    none = zeros(0, inputs), zeros(0, outputs)
    if params.side == "input":
        return Components(factor[None], ones(1, outputs), *none)
    return Components(ones(1, inputs), factor[None], *none, bias_scale_O=factor - 1.0)


def redraw(params: IA3, draw: Callable[..., Any], spread: float) -> IA3:
    """Around one, so that the adapted weights keep their size."""
    return jax.tree.map(lambda leaf: draw(leaf, 1.0, spread), params)


KIND = Kind(
    "ia3", IA3, init, apply, apply_one, merge, components, redraw,
    rank=lambda params: 1,
    widths=lambda params: [(params.side, params.l.shape[-1])],
    is_batched=lambda params: params.l.ndim == 2,
    placed=lambda on_inputs: {"side": "input" if on_inputs else "output"},
)  # fmt: skip
