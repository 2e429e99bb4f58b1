"""The compiled programs of ``flora-jax bench layer``: a kind in a form at a rank, on random arrays.

Forms: ``einsum`` and ``vmap`` are the uniform batch (``kind.apply``, ``apply_vmap``), ``ragged`` the pair
lists of a mixed batch, ``merged`` one product a row with explicit weights ``W_i`` that were built before.
Every row has an adapter of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from flora_jax.adapters import KINDS, apply, apply_vmap, kind_of, stack
from flora_jax.adapters.bank import build_bank
from flora_jax.adapters.model_adapter import ModelAdapter, init_adapter, randomise
from flora_jax.adapters.pairs import list_pairs
from flora_jax.adapters.product import finish, product
from flora_jax.adapters.quantized import quantize
from flora_jax.adapters.ragged import Ragged
from flora_jax.adapters.transposed import Transposed
from flora_jax.bench import machine
from flora_jax.bench.layer_options import PLAIN, Case, LayerOptions
from flora_jax.errors import InputError

# Adapters want a projection's name; which one it is makes no difference here.
TARGET = "attn.c_attn"
_GIB = 2**30


def make_adapters(
    kind: str, rank: int, inputs: int, outputs: int, count: int, seed: int = 0
) -> dict[str, ModelAdapter]:
    """``count`` different random adapters of one projection, float32, by the names "0", "1", …"""
    fresh = init_adapter(jax.random.key(seed), kind, {TARGET: (inputs, outputs)}, 1, rank=rank)
    return {str(number): randomise(fresh, seed + number) for number in range(count)}


def weights(options: LayerOptions) -> tuple[jax.Array, Any, jax.Array]:
    """Random ``x [B, T, I]``, ``W [I, O]``, quantised or held by outputs, and ``bias [O]``.

    Raises:
        InputError: int4 cannot take so many inputs.
    """
    keys = jax.random.split(jax.random.key(options.seed), 3)
    dtype = jnp.dtype(options.dtype)
    x_BTI = jax.random.normal(keys[0], (options.batch, options.length, options.inputs), dtype)
    W_IO = jax.random.normal(keys[1], (options.inputs, options.outputs), dtype)
    bias_O = jax.random.normal(keys[2], (options.outputs,), dtype)
    if options.quantize == "none":
        by_outputs = options.layout == "outputs" or (
            options.layout == "auto" and jax.default_backend() == "cpu"
        )
        return x_BTI, Transposed(W_IO.T) if by_outputs else W_IO, bias_O
    try:
        return x_BTI, quantize(W_IO, cast(Any, options.quantize)), bias_O
    except ValueError as error:
        raise InputError(f"--inputs does not fit --quantize: {error}") from None


@jax.jit
def merge_rows(params_B: Any, W_IO: Any, bias_O: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's explicit ``W_i`` and bias, ``[B, I, O]`` and ``[B, O]``, one row after the other."""
    merge = kind_of(params_B).merge
    return cast(Any, jax.lax.map(lambda own: merge(own, W_IO, bias_O), params_B))


@jax.jit
def apply_merged(x_BTI: jax.Array, W_BIO: jax.Array, bias_BO: jax.Array) -> jax.Array:
    """Each row's product with its own explicit weight: ``[B, T, O]`` in the dtype of ``x``."""
    y_BTO = jax.vmap(product)(x_BTI, W_BIO) + bias_BO.astype(jnp.float32)[:, None]
    return finish(y_BTO, None, x_BTI.dtype)


class Programs:
    """The arrays that the programs of one measurement share, and what they hold of memory.

    Raises:
        InputError: see :func:`weights`; or these arrays alone exceed the memory limit.
    """

    def __init__(self, options: LayerOptions):
        self.options = options
        self.limit = _limit(options)
        size = jnp.dtype(options.dtype).itemsize
        border = options.inputs + options.outputs
        # A weight is turned from one by inputs, or quantised from one of full width in float32.
        wide = (size + 4) if options.quantize != "none" else 2 * size
        least = wide * options.inputs * options.outputs + size * options.tokens * border
        if self.limit is not None and least > self.limit:
            raise InputError(
                f"the weight and the activations need {least / _GIB:.3g} GiB, "
                f"the limit is {self.limit / _GIB:.3g}"
            )
        self.base = weights(options)
        self.held = _bytes(self.base)
        self._params: dict[tuple[str, int], Any] = {}
        self._merged: Callable[[], Any] | str | None = None
        self._last: tuple[Any, dict[str, ModelAdapter]] = (None, {})

    def program(self, case: Case) -> Callable[[], Any] | str:
        """Computes a case's output ``[B, T, O]``; a string is the reason why it is left out.

        A merged product takes as long whatever its weights are made of, so all share one set of
        explicit weights, that of the case first asked for.
        """
        kind, form, rank = case
        if rank is None:
            return self._compiled(jax.jit(functools.partial(apply, None)), self.base)
        needed = self._arguments_bytes(kind, form, rank)
        if self._exceeds(needed):
            return self._reason(needed)
        if form == "merged":
            if self._merged is None:
                explicit = self.build(kind, rank)()
                self.held += _bytes(explicit)
                self._merged = self._compiled(apply_merged, (self.base[0], *explicit))
            return self._merged
        if form == "ragged":
            return self._compiled(jax.jit(apply), (self._ragged(kind, rank), *self.base))
        rule = KINDS[kind]
        uniform = rule.apply if form == "einsum" else functools.partial(apply_vmap, rule)
        return self._compiled(jax.jit(uniform), (self._uniform(kind, rank), *self.base))

    def build(self, kind: str, rank: int) -> Callable[[], Any]:
        """Makes all rows' explicit weights."""
        return functools.partial(merge_rows, self._uniform(kind, rank), *self.base[1:])

    def _compiled(self, function: Any, arguments: tuple[Any, ...]) -> Callable[[], Any] | str:
        compiled = function.lower(*arguments).compile()
        stats = compiled.memory_analysis()
        extra = 0 if stats is None else stats.temp_size_in_bytes + stats.output_size_in_bytes
        if self._exceeds(extra):
            return self._reason(extra)
        return functools.partial(compiled, *arguments)

    def adapters(self, kind: str, rank: int) -> dict[str, ModelAdapter]:
        """Of the rows in their order; only those last asked for are kept."""
        options = self.options
        if self._last[0] != (kind, rank):
            size = options.inputs, options.outputs
            made = make_adapters(kind, rank, *size, options.batch, 1000 * options.seed)
            self._last = ((kind, rank), made)
        return self._last[1]

    def _uniform(self, kind: str, rank: int) -> Any:
        if (kind, rank) not in self._params:
            adapters = self.adapters(kind, rank).values()
            own = stack([adapter.layers[0][TARGET] for adapter in adapters])
            self._params[kind, rank] = own
            self.held += _bytes(own)
        return self._params[kind, rank]

    def _ragged(self, kind: str, rank: int) -> Ragged:
        named = self.adapters(kind, rank)
        bank = build_bank(named, {TARGET: (self.options.inputs, self.options.outputs)}, 1)
        pairs = list_pairs(bank, list(named))[TARGET]
        hook = Ragged(bank.layers[0][TARGET], jax.tree.map(jnp.asarray, pairs))
        self.held += _bytes(hook)
        return hook

    def _arguments_bytes(self, kind: str, form: str, rank: int) -> int:
        """What making a case's arguments needs, told before they are made."""
        options = self.options
        factors = 4 * rank * (options.inputs + options.outputs) * options.batch
        if form == "ragged":
            return 2 * factors  # Written into a bank from copies.
        held = 0 if (kind, rank) in self._params else factors
        if form != "merged":
            return held
        explicit = options.inputs * options.outputs * options.batch
        # The shared set, one that is being built, and one row's in float32.
        sets = 1 if self._merged is not None else 2
        size = jnp.dtype(options.dtype).itemsize
        return held + sets * explicit * size + 8 * options.inputs * options.outputs

    def _exceeds(self, more: int) -> bool:
        return self.limit is not None and self.held + more > self.limit

    def _reason(self, more: int) -> str:
        assert self.limit is not None
        needed = (self.held + more) / _GIB
        return f"needs {needed:.3g} GiB, the limit is {self.limit / _GIB:.3g}"


def _limit(options: LayerOptions) -> float | None:
    if options.memory_gib is not None:
        return options.memory_gib * _GIB
    free = machine.memory_bytes()
    return None if free is None else free / 2


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def work(case: Case, options: LayerOptions) -> tuple[float, float]:
    """Bytes that a case has to read and write, and operations of its arithmetic as it is done.

    Weights, factors, inputs and outputs are each counted once.
    """
    kind, form, rank = case
    area, size = options.inputs * options.outputs, jnp.dtype(options.dtype).itemsize
    border = options.inputs + options.outputs
    moved = {"none": float(size), "int8": 1.0, "int4": 0.5}[options.quantize] * area
    operations = 2.0 * area * options.tokens
    if form == "merged":
        moved = float(size * area * options.batch)
    elif form != PLAIN and rank is not None:
        moved += 4.0 * rank * border * options.batch
        if kind == "lora":
            operations += 2.0 * rank * border * options.tokens
        else:
            operations *= rank + (kind == "hira")
    return moved + size * border * options.tokens, operations
