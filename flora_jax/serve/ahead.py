"""Every program that an engine can need, by name: compiled side by side before the first request, or
for a device that is not there; and a counter of the programs that XLA builds or fetches from its cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.kind import KINDS
from flora_jax.mixing.bank import Count
from flora_jax.models.model import Definition, Model
from flora_jax.platforms import Platform
from flora_jax.serve.device import Call, Device
from flora_jax.serve.lattice import DecodeShape, Lattice, PrefillShape
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.placement import placement_of
from flora_jax.serve.residency import Residency
from flora_jax.serve.sampling import Draw
from flora_jax.serve.state import pack

_EVENT = "/jax/core/compile/backend_compile_duration"
_total = 0


def _listen(event: str, duration_secs: float, **kwargs: Any) -> None:
    global _total
    _total += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


class Compilations:
    """How many programs were compiled since this counter was made or last reset, by whomever."""

    def __init__(self) -> None:
        self._before = _total

    @property
    def count(self) -> int:
        return _total - self._before

    def reset(self) -> int:
        """Starts again from 0; returns what was counted, so that a caller can see that it counts."""
        counted, self._before = self.count, _total
        return counted


class Program(NamedTuple):
    """A program by name: a ``call`` of it with nothing to do, and what runs that without any effect.

    ``call`` is ``None`` for those too small to be compiled side by side.
    """

    name: str
    call: Callable[[], Call] | None
    rehearse: Callable[[], Any]


def programs(device: Device) -> list[Program]:
    """Everything that the device's verbs can ask for, the longest to compile first."""
    found = [_prefilling(device, shape) for shape in device.lattice.prefill_shapes()]
    decoding = _looping if device.platform.steps_on_device else _forwarding
    found += [decoding(device, shape) for shape in device.lattice.decode_shapes()]
    if not device.platform.steps_on_device:
        ways: tuple[Draw, ...] = ("digits", "plain", "greedy")
        found += [_drawing(device, rows, how) for rows in device.lattice.rows for how in ways]
    found += [_beginning(device, count) for count in _entering(device)]
    if device.options.max_logprobs:
        sizes = {(s.rows, s.length) for s in device.lattice.prefill_shapes()}
        found += [_scoring(device, *size) for size in sorted(sizes)]
        if not device.platform.steps_on_device:
            found += [_scoring_drawn(device, rows) for rows in device.lattice.rows]
    found += _reading(device)
    if device.options.prefix_caching:
        found.append(Program("copy blocks", None, partial(_copy_no_block, device)))
    found.append(Program("write an adapter", None, device.residency.write_nothing))
    if device.may_preempt:
        found.append(Program("insert", None, partial(device.insert, [], [0])))
        found.append(Program("blocks out and in", None, partial(_copy_nothing, device)))
    return found


def compile_all(device: Device, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compiles all of them, as many at a time as there are cores, then runs each.

    XLA lets go of the interpreter while it compiles; tracing is what takes turns. Nothing runs meanwhile:
    what one thread launches is not to end up in the CUDA graph that another makes. ``progress`` gets the
    name of a program that is done, how many are, and of how many.
    """
    wanted = programs(device)
    done = 0

    def tell(program: Program) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(program.name, done, len(wanted))

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        compiling = [
            (program, threads.submit(program.call().lower().compile))
            for program in wanted if program.call is not None
        ]  # fmt: skip
        for program, future in compiling:
            future.result()
            tell(program)
    for program in wanted:
        # Finds what was compiled: the traced program is the same object.
        program.rehearse()
        if program.call is None:
            tell(program)


def lower_for(device: Device, sharding: Any) -> dict[str, Callable[[], Any]]:
    """By name what lowers each program for the devices of a sharding, whatever runs here.

    ``device`` may come from :func:`abstract_device`; what it has placed already stays where it is.
    """

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        own = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=own or sharding)

    def lower(call: Callable[[], Call]) -> Any:
        function, arguments, static = call()
        placed = (
            own if isinstance(own, Definition | Platform) else jax.tree.map(place, own)
            for own in arguments
        )
        return function.lower(*placed, **static)

    return {p.name: partial(lower, p.call) for p in programs(device) if p.call is not None}


def abstract_device(
    model: Model,
    options: EngineOptions,
    platform: Platform,
    most: Mapping[str, Count],
    residents: int,
) -> Device:
    """A device with shapes in place of arrays: nothing is allocated, and its programs can be lowered.

    Args:
        model: as of :func:`flora_jax.models.model.abstract_model`, or of
            :func:`flora_jax.models.sharding.place_abstract`.
        options: the engine's.
        platform: whose choices the programs follow.
        most: by target the most components of one adapter.
        residents: how many of those the bank holds.
    """
    config = model.config
    context = options.longest(config.n_positions)
    dtype = model.embedding.dtype
    placement = placement_of(model, allocate=False)
    residency = Residency.of_size(
        config, most, residents, additive=platform.additive(dtype), placement=placement
    )
    lattice = Lattice(residency, options, context, platform)
    return Device(model, residency, lattice, options, platform, placement=placement)


def _entering(device: Device) -> list[int]:
    """How many sequences may begin to decode in one dispatch."""
    lattice = device.lattice
    return [lattice.chunks[-1]] if lattice.few else sorted({1, *lattice.chunks})


def _prefilling(device: Device, shape: PrefillShape) -> Program:
    call = partial(device.prefill_call, shape, [])

    def run() -> None:
        device.cache, *_ = call().run()

    own = shape.form
    form = f"{own.multiplicative} + {own.additive} components"
    name = f"prefill {shape.rows} x {shape.length} tokens, {shape.span} positions, {form}"
    return Program(name + ("" if not own.targets else f" on {', '.join(own.targets)}"), call, run)


def in_words(shape: DecodeShape) -> str:
    """What follows the verb in the name of a program of this shape."""
    mul, add = shape.level
    return f"{shape.rows} rows, {shape.span} positions, adapters' levels {mul} and {add}"


def _looping(device: Device, shape: DecodeShape) -> Program:
    def call() -> Call:
        return device.decode_call(device.nothing(shape), 0, False)

    def run() -> None:
        device.cache, device.state_rows, *_ = call().run()

    return Program(f"decode {in_words(shape)}", call, run)


def _forwarding(device: Device, shape: DecodeShape) -> Program:
    def call() -> Call:
        return device.forward_call(device.sent(pack(device.nothing(shape))))

    def run() -> None:
        device.cache, _ = call().run()

    return Program(f"forward {in_words(shape)}", call, run)


def _drawing(device: Device, rows: int, how: Draw) -> Program:
    shape = rows, device.config.vocab_size
    abstract_BV = device.beside_parameters(jax.ShapeDtypeStruct(shape, jnp.float32))

    def call(logits_BV: Any = abstract_BV) -> Call:
        rows_B = device.sent(np.full(rows, device.rows, np.int32))
        return device.draw_call(logits_BV, rows_B, device.resting(rows), how)

    def run() -> None:
        logits_BV = device.beside_parameters(jnp.zeros(shape, jnp.float32))
        device.state_rows, _ = call(logits_BV).run()

    return Program(f"draw {rows} tokens, {how}", call, run)


def _beginning(device: Device, count: int) -> Program:
    shape = count, device.config.hidden_size
    abstract_BD = device.beside_parameters(jax.ShapeDtypeStruct(shape, device.dtype))

    def call(hidden_BD: Any = abstract_BD) -> Call:
        return device.begin_call([], hidden_BD)

    def run() -> None:
        hidden_BD = device.beside_parameters(jnp.zeros(shape, device.dtype))
        device.state_rows, *_ = call(hidden_BD).run()

    return Program(f"begin {count} sequences", call, run)


def _scoring(device: Device, rows: int, length: int) -> Program:
    shape = rows, length, device.config.hidden_size
    abstract_BTD = device.beside_parameters(jax.ShapeDtypeStruct(shape, device.dtype))

    def call(hidden_BTD: Any = abstract_BTD) -> Call:
        return device.score_call(hidden_BTD, [])

    def run() -> None:
        call(device.beside_parameters(jnp.zeros(shape, device.dtype))).run()

    return Program(f"score {rows} x {length} tokens", call, run)


def _scoring_drawn(device: Device, rows: int) -> Program:
    shape = rows, device.config.vocab_size
    abstract_BV = device.beside_parameters(jax.ShapeDtypeStruct(shape, jnp.float32))

    def call(logits_BV: Any = abstract_BV) -> Call:
        return device.score_drawn_call(logits_BV, device.resting(rows))

    def run() -> None:
        call(device.beside_parameters(jnp.zeros(shape, jnp.float32))).run()

    return Program(f"score {rows} drawn tokens", call, run)


def _reading(device: Device) -> Iterator[Program]:
    """What an adapter's reading runs, of a kind that asks for the base's weights, at any rank."""
    residency = device.residency
    if residency.weights is None:
        return
    for kind in KINDS.values():
        for target in residency.targets:
            if kind.rehearse is not None:
                run = partial(
                    kind.rehearse, residency.weights(0, target), residency.most(target)[1]
                )
                yield Program(f"read {target} of a {kind.name} adapter", None, run)


def _copy_no_block(device: Device) -> None:
    device.cache = device.copy_call([]).run()


def _copy_nothing(device: Device) -> None:
    device.copy_in([], device.copy_out([]))
