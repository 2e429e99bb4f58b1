"""A base weight in 8 or 4 bits, and the product with it that never keeps it dequantised.

Symmetric, by the largest magnitude of a group of inputs of one output: all of them for int8, 64 for
int4, whose values lie two to a byte. Knows nothing of models or of which weights are quantised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.weights.dense import Dense
from flora_jax.weights.held import Held, Reading
from flora_jax.weights.product import Weight, as_weight
from flora_jax.weights.slices import RUN, columns, slices, slices_of

Method = Literal["int8", "int4"]
GROUP = 64
_LEAST_GROUP = 8
_LARGEST = {"int8": 127, "int4": 7}
# What a product reads: the values of int8, or values and scale of int4.
Stored = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Held):
    """Stands in the place of a weight ``[I, O]`` of the given ``dtype``.

    ``values`` is int8 ``[I, O]``, or uint8 ``[I/2, O]``: in every group of inputs the first half in
    the low four bits, the second in the high, plus 8. ``scale [G, O]`` is float32; int8 has one group.
    """

    values: jax.Array
    scale_GO: jax.Array
    dtype: np.dtype = dataclasses.field(metadata=dict(static=True))

    @property
    def method(self) -> Method:
        return "int8" if self.values.dtype == jnp.int8 else "int4"

    @property
    def shape(self) -> tuple[int, int]:
        rows, outputs = self.values.shape
        return (rows if self.method == "int8" else 2 * rows), outputs

    def matmul(self, x_xI: jax.Array) -> jax.Array:
        """See :func:`matmul`."""
        return matmul(x_xI, self)

    def explicit(self, dtype: Any = None) -> jax.Array:
        """See :func:`dequantize`."""
        return dequantize(self, dtype)

    def specs(self, spec: Any) -> Quantized:
        """The values have the weight's axes; so has the scale, but int8 has one for all inputs."""
        scale = spec if self.method == "int4" else type(spec)(None, *spec[1:])
        return Quantized(spec, scale, self.dtype)

    @property
    def input_units(self) -> int:
        """The groups of int4; any number of inputs has the same scale in int8."""
        return self.shape[0] if self.method == "int8" else self.scale_GO.shape[0]

    def reading(self, placed: Any) -> Reading:
        """Quantised from the precision that is stored, where its values will lie."""
        make = quantizer(self.method, np.dtype(self.dtype).name, placed)
        first = None if placed is None else _by_outputs_too(placed.values)
        return Reading(None, first, lambda W_OI: make(Dense(W_OI)))

    def stored(self) -> jax.Array:
        """There is none."""
        raise ValueError(self.method)

    def columns(self, number: jax.Array, count: int) -> Quantized:
        """See :meth:`BaseWeight.columns`."""
        return cast(Quantized, jax.tree.map(lambda leaf: columns(leaf, number, count), self))

    @property
    def slices_to_merge(self) -> int:
        """So many that a slice is small in float32."""
        return slices(self.shape)


def quantize(W_IO: Weight, method: Method, *, dtype: Any = None, group: int = GROUP) -> Quantized:
    """The nearest multiples of each group's largest magnitude over 127 (int8) or 7 (int4).

    Computed in float32 from ``W``; a group with a NaN or an infinity becomes NaN. ``dtype`` is that of
    the weight that the result stands for, ``W``'s own by default. ``group`` inputs share a scale in
    int4; where that does not divide them, the largest even number below it that does.

    Raises:
        ValueError: another method, or inputs that no even group of 8 or more divides.
    """
    if method not in get_args(Method):
        raise ValueError(f"quantize: method is {method!r}, expected 'int8' or 'int4'")
    inputs, outputs = W_IO.shape
    most = _LARGEST[method]
    size = inputs if method == "int8" else _group_size(inputs, group)
    wide_GIO = as_weight(W_IO).explicit(jnp.float32).reshape(inputs // size, size, outputs)
    scale_GO = jnp.max(jnp.abs(wide_GIO), axis=1) * (1 / most)
    # Zeros alone have the scale zero.
    steps_GIO = jnp.round(wide_GIO / jnp.where(scale_GO == 0, 1, scale_GO)[:, None])
    steps_GIO = jnp.clip(steps_GIO, -most, most)
    if method == "int8":
        values = steps_GIO.astype(jnp.int8)
    else:
        low, high = jnp.split((steps_GIO + 8).astype(jnp.uint8), 2, axis=1)
        values = low | (high << 4)
    return Quantized(values.reshape(-1, outputs), scale_GO, np.dtype(dtype or W_IO.dtype))


@lru_cache
def quantizer(
    method: Method, dtype: str, placed: Quantized | None
) -> Callable[[Weight], Quantized]:
    """A jitted ``quantize``: one program for every shape, so that the same weight always gives the
    same bits. ``placed`` has a sharding for each of the result's arrays."""
    fixed = partial(quantize, method=method, dtype=dtype)
    return jax.jit(fixed) if placed is None else jax.jit(fixed, out_shardings=placed)


def _by_outputs_too(sharding: Any) -> Any:
    """A sharding of an array ``[I, O]`` for ``[O, I]``; one that splits nothing stays as it is."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = (*sharding.spec, None, None)[:2]
    return NamedSharding(sharding.mesh, PartitionSpec(*reversed(axes)))


def input_units(inputs: int, method: Method | None) -> int:
    """:attr:`Held.input_units` of a weight that is to be made so, ``None`` in full precision."""
    if method != "int4":
        return inputs
    # Inputs that no group divides are refused where the weight is made.
    return inputs // next((n for n in _group_sizes(inputs, GROUP)), 1)


def _group_sizes(inputs: int, group: int) -> list[int]:
    """Those that int4 can have, the largest first."""
    return [n for n in range(group - group % 2, _LEAST_GROUP - 1, -2) if inputs % n == 0]


def _group_size(inputs: int, group: int) -> int:
    sizes = _group_sizes(inputs, group)
    if not sizes:
        raise ValueError(
            f"int4: {inputs} input features, expected a multiple of an even number "
            f"from {_LEAST_GROUP} to {group}"
        )
    return sizes[0]


def dequantize(W_IO: Quantized, dtype: Any = None) -> jax.Array:
    """The explicit weight ``[I, O]`` in ``dtype`` (by default its own), rounded once."""
    groups, outputs = W_IO.scale_GO.shape
    steps_GIO = W_IO.values.reshape(groups, -1, outputs)
    if W_IO.method == "int4":
        both = jnp.concatenate([steps_GIO & 15, steps_GIO >> 4], axis=1)
        steps_GIO = both.astype(jnp.int8) - 8
    wide_GIO = steps_GIO.astype(jnp.float32) * W_IO.scale_GO[:, None]
    return wide_GIO.astype(dtype or W_IO.dtype).reshape(W_IO.shape)


def matmul(x_xI: jax.Array, W_IO: Quantized) -> jax.Array:
    """``x @ W`` over the last axis of ``x``, accumulated and returned in float32.

    The weight is dequantised to the dtype of ``x`` for the product alone, and again for the
    gradient of ``x``. The weight itself has no gradient.
    """
    return _matmul(x_xI.dtype, x_xI, W_IO)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(dtype: np.dtype, x_xI: jax.Array, W_IO: Quantized) -> jax.Array:
    if W_IO.method == "int4":
        return _by_outputs(x_xI, (W_IO.values, W_IO.scale_GO))
    stored = (W_IO.values,)
    y_xO = jax.lax.platform_dependent(x_xI, stored, cpu=_by_outputs, default=_at_once)
    return y_xO * _like(W_IO.scale_GO, y_xO)


def _forward(dtype: np.dtype, x_xI: jax.Array, W_IO: Quantized) -> tuple[jax.Array, Quantized]:
    return _matmul(dtype, x_xI, W_IO), W_IO


def _backward(dtype: np.dtype, W_IO: Quantized, dy_xO: jax.Array) -> tuple[jax.Array, None]:
    if W_IO.method == "int4":
        dx_xI = _by_inputs(dy_xO.astype(dtype), (W_IO.values, W_IO.scale_GO))
    else:
        scaled_xO = (dy_xO * _like(W_IO.scale_GO, dy_xO)).astype(dtype)
        dx_xI = jax.lax.platform_dependent(
            scaled_xO, (W_IO.values,), cpu=_by_inputs, default=_at_once_transposed
        )
    return dx_xI.astype(dtype), None


_matmul.defvjp(_forward, _backward)


def _like(scale_1O: jax.Array, y_xO: jax.Array) -> jax.Array:
    return scale_1O.reshape((1,) * (y_xO.ndim - 1) + (-1,))


def _times(x_xI: jax.Array, stored: Stored) -> jax.Array:
    """By int4 dequantised; by the whole numbers of int8, whose scale comes after the product."""
    return jnp.matmul(x_xI, _explicit(stored, x_xI.dtype), preferred_element_type=jnp.float32)


def _times_transposed(dy_xO: jax.Array, stored: Stored) -> jax.Array:
    weight_IO = _explicit(stored, dy_xO.dtype)
    return jnp.einsum("...o,io->...i", dy_xO, weight_IO, preferred_element_type=jnp.float32)


def _explicit(stored: Stored, dtype: np.dtype) -> jax.Array:
    if len(stored) == 1:
        return stored[0].astype(dtype)
    values, scale_GO = stored
    return dequantize(Quantized(values, scale_GO, dtype))


# A GPU's matrix product casts int8 as it reads it, so that nothing is kept. Tied to x, the cast
# cannot be taken out of a loop over tokens, nor be shared by the forward pass and the gradient.


def _at_once(x_xI: jax.Array, stored: Stored) -> jax.Array:
    return _times(*jax.lax.optimization_barrier((x_xI, stored)))


def _at_once_transposed(dy_xO: jax.Array, stored: Stored) -> jax.Array:
    return _times_transposed(*jax.lax.optimization_barrier((dy_xO, stored)))


# Elsewhere (XLA unpacks no int4 inside a product, and a CPU drops the barrier before it looks for
# what can be shared) a loop over slices bounds what is dequantised at any moment. A slice takes
# every n-th run of features: where a mesh splits them, each device has its share of every slice.


def _by_outputs(x_xI: jax.Array, stored: Stored) -> jax.Array:
    """``x @ W``, slice by slice of output features."""
    outputs = stored[0].shape[1]
    run = math.gcd(outputs, RUN)
    count = slices_of(x_xI.shape[-1] * outputs * x_xI.dtype.itemsize, outputs // run)
    split = tuple(leaf.reshape(leaf.shape[0], -1, count, run) for leaf in stored)

    def one(number: jax.Array) -> jax.Array:
        part = (jax.lax.dynamic_index_in_dim(leaf, number, 2, keepdims=False) for leaf in split)
        return _times(x_xI, tuple(leaf.reshape(leaf.shape[0], -1) for leaf in part))

    return _gather(one, x_xI, outputs // run, count)


def _by_inputs(dy_xO: jax.Array, stored: Stored) -> jax.Array:
    """``dy @ W.T``, slice by slice of input features; a run of int4 is a group."""
    rows, outputs = stored[0].shape
    inputs = rows if len(stored) == 1 else 2 * rows
    units = rows // math.gcd(rows, RUN) if len(stored) == 1 else stored[1].shape[0]
    count = slices_of(inputs * outputs * dy_xO.dtype.itemsize, units)
    split = tuple(
        leaf.reshape(units // count, count, leaf.shape[0] // units, outputs) for leaf in stored
    )

    def one(number: jax.Array) -> jax.Array:
        part = (jax.lax.dynamic_index_in_dim(leaf, number, 1, keepdims=False) for leaf in split)
        return _times_transposed(dy_xO, tuple(leaf.reshape(-1, outputs) for leaf in part))

    return _gather(one, dy_xO, units, count)


def _gather(
    one: Callable[[jax.Array], jax.Array], x_xI: jax.Array, units: int, count: int
) -> jax.Array:
    """``one(number)`` of every slice, each written at once to where its features belong."""
    *lead, part = jax.eval_shape(one, jnp.int32(0)).shape
    shape = (*lead, units // count, count, part * count // units)

    def write(number: jax.Array, y_xSNi: jax.Array) -> jax.Array:
        part_xSi = one(number).reshape(*lead, shape[-3], shape[-1])
        return jax.lax.dynamic_update_index_in_dim(y_xSNi, part_xSi, number, len(lead) + 1)

    # All of it is overwritten. Zeros would depend on nothing, and XLA makes those of every layer
    # when the program starts.
    anything_xSNi = jnp.broadcast_to(x_xI[..., :1, None, None].astype(jnp.float32), shape)
    y_xSNi = jax.lax.fori_loop(0, count, write, anything_xSNi)
    return y_xSNi.reshape(*lead, part * count)
