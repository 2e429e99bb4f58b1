"""The compiled programs of ``flora-jax bench layer``: a kind in a form at a rank, on random arrays.

Forms: ``einsum`` and ``vmap`` are the uniform batch (``kind.apply``, ``apply_vmap``), ``batched`` the
same with factors in the activations' dtype, as in the paper, ``ragged`` the pair lists of a mixed
batch, ``merged`` one product a row with explicit weights ``W_i`` that were built before. Every row has
an adapter of its own. A program has as many calls as the platform needs, see ``device_loop``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from flora_jax.adapters import KINDS, apply, apply_vmap, kind_of, stack
from flora_jax.adapters.model_adapter import ModelAdapter, abstract_adapter, randomise
from flora_jax.adapters.projections import ModuleNames, Projections
from flora_jax.adapters.registry import TRAITS
from flora_jax.bench.layer.options import BASE, PLAIN, Case, LayerOptions
from flora_jax.bench.receipts import device_loop, machine
from flora_jax.bench.receipts.device_loop import Calls
from flora_jax.bench.receipts.random_arrays import draw
from flora_jax.errors import InputError
from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import list_pairs
from flora_jax.mixing.ragged import Ragged
from flora_jax.platforms import platform
from flora_jax.weights.dense import Dense
from flora_jax.weights.product import finish, product
from flora_jax.weights.quantized import quantize

# Adapters want a projection's name; which one it is makes no difference here.
TARGET = "projection"
_NAMES = ModuleNames(
    blocks="blocks", embeddings=(), others=(), others_in_block=(), defaults={"lora": (TARGET,)},
    feedforward=(),
)  # fmt: skip
_GIB = 2**30


def make_adapters(
    kind: str, rank: int, inputs: int, outputs: int, count: int, seed: int = 0
) -> dict[str, ModelAdapter]:
    """``count`` different random adapters of one projection, float32, by the names "0", "1", …"""

    # Shapes alone: the start of a kind is of no use, and takes a compilation for each operation.
    projections = Projections({TARGET: (inputs, outputs)}, _NAMES)
    shapes = abstract_adapter(kind, projections, 1, rank=rank)
    return {str(number): randomise(shapes, seed + number) for number in range(count)}


def weights(options: LayerOptions) -> tuple[jax.Array, Any, jax.Array]:
    """Random ``x [B, T, I]``, ``W [I, O]``, quantised or held by outputs, and ``bias [O]``.

    Raises:
        InputError: int4 cannot take so many inputs.
    """
    size, dtype, seed = (options.inputs, options.outputs), options.dtype, 3 * options.seed
    x_BTI = draw((options.batch, options.length, options.inputs), dtype, seed)
    # An output is as large as an input, so that one may follow from the other.
    W_IO = draw(size, dtype, seed + 1, scale=options.inputs**-0.5)
    bias_O = draw((options.outputs,), dtype, seed + 2)
    if options.quantize == "none":
        return x_BTI, W_IO if options.layout == "inputs" else Dense(W_IO.T), bias_O
    try:
        return x_BTI, quantize(W_IO, cast(Any, options.quantize)), bias_O
    except ValueError as error:
        raise InputError(f"--inputs does not fit --quantize: {error}") from None


def apply_batched(params_B: Any, x_BTI: jax.Array, W_IO: Any, bias_O: jax.Array) -> jax.Array:
    """The paper's own arithmetic: factors in the dtype of ``x``, LoRA by two batched products.

    Sums are in float32, and rounded to that dtype between LoRA's two.
    """
    params_B = jax.tree.map(lambda leaf: leaf.astype(x_BTI.dtype), params_B)
    kind = kind_of(params_B)
    return (kind.apply_narrow or kind.apply)(params_B, x_BTI, W_IO, bias_O)


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
        self.pace = platform()
        self.sets = device_loop.sets_of(self.pace, _bytes(self.base[1]))
        # Said with the results: a call may then be faster than memory.
        self.from_cache = self.sets * _bytes(self.base[1]) < self.pace.timed_bytes
        self._bases = device_loop.several(self.base[1:], self.sets)
        self.held = _bytes((self.base[0], self._bases))
        self._compiler = device_loop.Compiler()
        self._params: dict[tuple[str, int], Any] = {}
        self._sets: dict[tuple[str, int], list[Any]] = {}
        self._merged: Callable[[], Calls | str] | str | None = None
        self._last: tuple[Any, dict[str, ModelAdapter]] = (None, {})

    def program(self, case: Case) -> Calls | str:
        """:meth:`start`, waited for."""
        started = self.start(case)
        return started if isinstance(started, str) else started()

    def start(self, case: Case) -> Callable[[], Calls | str] | str:
        """Begins to compile a case; the function waits for it and gives the program.

        It computes a case's output ``[B, T, O]``, of the last call where there are several; a string is
        the reason why the case is left out. A merged product takes as long whatever its weights are
        made of, so all share one set of explicit weights, that of the case first asked for.
        """
        kind, form, rank = case
        if rank is None:
            return self._compiled(case, functools.partial(apply, None), [*self._bases])
        needed = self._arguments_bytes(kind, form, rank)
        if self._exceeds(needed):
            return self._reason(needed)
        if form == "merged":
            if self._merged is None:
                explicit = self.build(kind, rank).run()
                sets = device_loop.sets_of(self.pace, _bytes(explicit))
                own = device_loop.several(explicit, sets)
                self.held += _bytes(own)
                self._merged = self._compiled(case, apply_merged, own)
            return self._merged
        if form == "ragged":
            return self._compiled(case, *self._ragged(kind, rank))
        params = self._several((kind, rank), self._uniform(kind, rank))
        rules: dict[str, Callable[..., jax.Array]] = {
            "einsum": KINDS[kind].apply,
            "vmap": functools.partial(apply_vmap, KINDS[kind]),
            "batched": apply_batched,
        }
        rule = rules[form]
        # The kinds take their parameters before the activations.
        return self._compiled(
            case,
            lambda x, own, *base: rule(own, x, *base),
            [(own, *base) for own, base in zip(params, self._bases)],
        )

    def build(self, kind: str, rank: int) -> Calls:
        """Makes all rows' explicit weights; a run is one call, whatever the platform."""
        own = self._uniform(kind, rank)
        return Calls(functools.partial(merge_rows, own, *self.base[1:]), 1)

    def overhead(self) -> Calls:
        """What is timed besides a case: a call that does nothing, or as many rounds of the loop."""
        x_BTI, outputs = self.base[0], self.options.outputs
        rounds = device_loop.rounds_of(
            self.pace, self.sets, *work((BASE, PLAIN, None), self.options)
        )
        if rounds * self.sets == 1:
            program, zero = jax.jit(lambda x: x + 1), jnp.float32(0)
            return Calls(lambda: program(zero), 1)

        def nothing(x_BTI: jax.Array, number: jax.Array) -> jax.Array:
            y_BTO = jnp.resize(x_BTI[:1, :1, :1], (*x_BTI.shape[:2], outputs))
            return y_BTO + number

        sets = [(jnp.ones((), x_BTI.dtype) * number,) for number in range(self.sets)]
        program = jax.jit(device_loop.looped(nothing, rounds))
        return Calls(functools.partial(program, x_BTI, sets), rounds * self.sets)

    def close(self) -> None:
        """Ends the threads."""
        self._compiler.close()

    def _compiled(
        self, case: Case, function: Any, sets: list[tuple[Any, ...]]
    ) -> Callable[[], Calls | str]:
        rounds = device_loop.rounds_of(self.pace, len(sets), *work(case, self.options))
        program, arguments = device_loop.looped(function, rounds), (self.base[0], sets)
        future = self._compiler.submit(jax.jit(program).lower(*arguments))

        def wait() -> Calls | str:
            compiled = future.result()
            stats = compiled.memory_analysis()
            extra = 0 if stats is None else stats.temp_size_in_bytes + stats.output_size_in_bytes
            if self._exceeds(extra):
                return self._reason(extra)
            return Calls(functools.partial(compiled, *arguments), rounds * len(sets))

        return wait

    def _several(self, key: tuple[str, int], tree: Any) -> list[Any]:
        """Sets of a kind's factors, made once for all forms; the first is in ``held`` already."""
        if key not in self._sets:
            self._sets[key] = device_loop.several(tree, self.sets)
            self.held += _bytes(self._sets[key][1:])
        return self._sets[key]

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
            # In one program, not one for each operation.
            own = jax.jit(lambda *each: stack(each))(*(a.layers[0][TARGET] for a in adapters))
            self._params[kind, rank] = own
            self.held += _bytes(own)
        return self._params[kind, rank]

    def _ragged(self, kind: str, rank: int) -> tuple[Any, list[tuple[Any, ...]]]:
        """The function over a bank, the weight and the pairs, and the sets of these."""
        named = self.adapters(kind, rank)
        size = self.options.inputs, self.options.outputs
        made = build_bank(named, {TARGET: size}, 1, lambda layer, target: self.base[1])
        pairs = jax.tree.map(jnp.asarray, list_pairs(made, list(named))[TARGET])
        if KINDS[kind].needs_weight:  # Each set's components belong to its own weight.
            factors = device_loop.several({n: a.layers for n, a in named.items()}, self.sets)
            banks = []
            for layers, (W, _) in zip(factors, self._bases):
                own = {n: dataclasses.replace(a, layers=layers[n]) for n, a in named.items()}
                bank = build_bank(own, {TARGET: size}, 1, lambda *_, W=W: W)
                banks.append(bank.layers[0][TARGET])
        else:
            banks = device_loop.several(made.layers[0][TARGET], self.sets)
        self.held += _bytes((pairs, banks))

        def ragged(x_BTI: jax.Array, bank: Any, W_IO: Any, bias_O: Any, pairs: Any) -> jax.Array:
            return apply(Ragged(bank, pairs), x_BTI, W_IO, bias_O)

        return ragged, [(bank, *base, pairs) for bank, base in zip(banks, self._bases)]

    def _arguments_bytes(self, kind: str, form: str, rank: int) -> int:
        """What making a case's arguments needs, told before they are made."""
        options = self.options
        factors = 4 * rank * (options.inputs + options.outputs) * options.batch
        if form == "ragged":
            return (1 + self.sets) * factors  # Written into a bank from copies.
        held = 0 if (kind, rank) in self._params else self.sets * factors
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
        moved += (size if form == "batched" else 4.0) * rank * border * options.batch
        multiplicative, additive = TRAITS[kind].pairs(rank)
        operations *= multiplicative
        operations += 2.0 * additive * border * options.tokens
    return moved + size * border * options.tokens, operations
