"""Serving on a simulated clock: the engine's own scheduler and lattice, and for every dispatch the time
that the roofline gives it.

What it says is a model's, not a measurement. It follows the engine's iteration with a GPU's choices:
sequences enter, prompts are prefilled within the budget of tokens, the others draw a number of tokens,
and what was dispatched before is read while the device works on. Adapters are always on the device;
swapping blocks of the cache and sampling take no time, and the host none but what ``host_ms`` says.
Knows nothing of tokens' values or of arrays.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence as Many
from typing import Any, NamedTuple, cast

from flora_jax.errors import InputError
from flora_jax.mixing.ragged import GROUP
from flora_jax.plan import prompts, roofline
from flora_jax.plan.programs import Residents, options_of
from flora_jax.plan.setting import Setting
from flora_jax.platforms import GPU
from flora_jax.serve.engine import bounds_of
from flora_jax.serve.lattice import DecodeShape, Lattice
from flora_jax.serve.scheduler import Admission, Plan, Scheduler
from flora_jax.serve.sequence import Chunk, Sequence


class Arrival(NamedTuple):
    """A request: when it comes, in seconds, tokens of its prompt, and tokens that it draws."""

    at_s: float
    prompt: int
    output: int


class Served(NamedTuple):
    """A request that ended, times in seconds from the start; ``drawn`` tokens."""

    arrival: Arrival
    first_s: float
    end_s: float
    drawn: int


class Outcome(NamedTuple):
    """What a simulated run brought.

    ``output_throughput``: tokens a second; ``tpot_ms``: mean time per token after a request's first;
    ``ttft_ms``: mean time to the first; ``dispatches`` of decoding and prefill, ``steps`` of decoding.
    """

    served: list[Served]
    duration_s: float
    output_throughput: float
    tpot_ms: float
    ttft_ms: float
    dispatches: int
    steps: int
    preemptions: int


class _Flown(NamedTuple):
    """An iteration's plan, the tokens that its rows draw in it, and when the device is through."""

    plan: Plan
    took: list[int]
    end_s: float


class _Resident:
    """Adapters that are always on the device."""

    def claim(self, version: Any) -> Admission:
        return "ready"

    def is_resident(self, version: Any) -> bool:
        return True

    is_read = is_resident


class Simulation:
    """An engine whose device is a clock.

    Args:
        setting: model, card, adapters, sizes.
        ways: implementations that its times are for; the platform table's where it is ``None``.
        max_num_batched_tokens: of one iteration.
        cache_tokens: positions of the cache; room for all rows' whole contexts where it is ``None``.
        host_ms: what a decode step, or a prefill dispatch, takes on the host.
    """

    def __init__(
        self,
        setting: Setting,
        ways: roofline.Ways | None = None,
        *,
        max_num_batched_tokens: int | None = None,
        cache_tokens: int | None = None,
        host_ms: float = 0.0,
    ):
        self.setting, self.host_ms = setting, host_ms
        self.ways = ways or roofline.DEFAULT
        self.options = options_of(
            setting, max_num_batched_tokens=max_num_batched_tokens, cache_tokens=cache_tokens
        )
        self.lattice = Lattice(Residents(setting), self.options, setting.context, GPU)
        blocks = self.options.cache_blocks(setting.context)
        bounds = bounds_of(self.lattice, self.options, GPU, blocks)
        # All adapters have one form.
        self.scheduler = Scheduler(bounds)
        self.dispatches = self.steps = 0
        self._host_s = self._device_s = 0.0
        self._flown: _Flown | None = None
        self._arrivals: dict[int, Arrival] = {}
        self._first_s: dict[int, float] = {}
        self._served: list[Served] = []
        self._gone: set[int] = set()
        self._cached_ms: dict[Any, float] = {}

    def _prefill(self, chunks: Many[Chunk]) -> None:
        """What the engine's device does with chunks, on the clock."""
        lattice = self.lattice
        rows, length = 1, lattice.long
        if max(chunk.length for chunk in chunks) <= lattice.short:
            rows, length = lattice.chunk_rows(len(chunks)), lattice.short
        span = lattice.prompt_span(max(chunk.start + length for chunk in chunks))
        key = (rows, length, span)
        if key not in self._cached_ms:
            terms = prompts.prefill(self.setting, rows, length, span, self.ways)
            self._cached_ms[key] = roofline.total(terms)
        self._pass(self._cached_ms[key], 1)

    def run(self, arrivals: Many[Arrival]) -> Outcome:
        """Serves all requests; each draws exactly its tokens.

        Raises:
            InputError: a request that the context or the cache cannot hold, or none at all.
        """
        bounds = self.scheduler.bounds
        most = min(self.setting.context, bounds.blocks * bounds.block)
        for number, arrival in enumerate(arrivals):
            if arrival.prompt < 1 or arrival.output < 1 or arrival.prompt + arrival.output > most:
                raise InputError(
                    f"request {number}: {arrival.prompt} tokens and {arrival.output} more, expected "
                    f"at least one each and {most} together at most"
                )
        if not arrivals:
            raise InputError("the workload has no requests, expected some")
        ordered = collections.deque(sorted(arrivals))
        request_ids = itertools.count()
        while ordered or self._flown or self.scheduler.has_work:
            if not self._flown and not self.scheduler.has_work:
                self._host_s = max(self._host_s, ordered[0].at_s)
            while ordered and ordered[0].at_s <= self._host_s:
                number, own = next(request_ids), ordered.popleft()
                self._arrivals[number] = own
                # Every request is under an adapter of its own; there are no tokens.
                version, nothing = cast(Any, number), cast(Any, None)
                self.scheduler.add(
                    Sequence(number, number, own.prompt, own.output, nothing, version, nothing)
                )
            self._iterate()
        return self._outcome()

    def _iterate(self) -> None:
        if self.scheduler.swapped:
            self._land()
        plan = self.scheduler.plan(_Resident())
        for chunks in plan.chunks:
            self._prefill(chunks)
        took: list[int] = []
        decode = plan.decode
        if decode is not None:
            steps = max(decode.most)
            shape, _ = self.lattice.decode([s.version for s in decode.sequences], decode.longest)
            self._pass(steps * self._step_ms(shape), steps)
            self.steps += steps
            # Sequences that are through, as far as the host knows, draw nothing.
            took = [min(n, s.left + n) for s, n in zip(decode.sequences, decode.most)]
        before, self._flown = self._flown, None
        if decode is not None or plan.chunks:
            self._flown = _Flown(plan, took, self._device_s)
        self._read(before)
        if plan.unread or not GPU.pipelined:
            self._land()

    def _pass(self, device_ms: float, programs: int) -> None:
        """A dispatch of so many programs: the host's time, and the device's after what it has begun."""
        self.dispatches += 1
        self._host_s += 1e-3 * self.host_ms * programs
        # The device goes on as soon as the first of them is there.
        start_s = max(self._device_s, self._host_s - 1e-3 * self.host_ms * (programs - 1))
        self._device_s = max(start_s + 1e-3 * device_ms, self._host_s)

    def _land(self) -> None:
        flown, self._flown = self._flown, None
        self._read(flown)

    def _read(self, flown: _Flown | None) -> None:
        """The host waits for what was dispatched; sequences that are through leave."""
        if flown is None:
            return
        self._host_s = max(self._host_s, flown.end_s)
        for chunk in itertools.chain(*flown.plan.chunks):
            if chunk.last:
                self._first_s.setdefault(chunk.sequence.number, self._host_s)
                self._end_if_done(chunk.sequence)
        decode = flown.plan.decode
        if decode is None:
            return
        self.scheduler.landed(decode)
        for sequence, number in zip(decode.sequences, flown.took, strict=True):
            if sequence.number not in self._gone:
                self.scheduler.drew(sequence, sequence.drawn + number)
                self._end_if_done(sequence)

    def _end_if_done(self, sequence: Sequence) -> None:
        if sequence.drawn == sequence.budget:
            self.scheduler.remove(sequence)
            number = sequence.number
            self._gone.add(number)
            first_s = self._first_s.pop(number)
            arrival = self._arrivals.pop(number)
            self._served.append(Served(arrival, first_s, self._host_s, sequence.drawn))

    def _step_ms(self, shape: DecodeShape) -> float:
        if shape not in self._cached_ms:
            sizes = self.lattice.pair_sizes(shape)
            work = roofline.Work(
                {target: pairs for target, (pairs, _) in sizes.items()},
                {
                    target: shape.rows * groups.width + GROUP * groups.more
                    for target, (_, groups) in sizes.items()
                },
            )
            terms = roofline.decode(self.setting, shape.rows, shape.span, work, self.ways)
            self._cached_ms[shape] = roofline.total(terms)
        return self._cached_ms[shape]

    def _outcome(self) -> Outcome:
        served = sorted(self._served, key=lambda one: one.arrival)
        drawn = sum(one.drawn for one in served)
        longer = [one for one in served if one.drawn > 1]
        per_token = [(one.end_s - one.first_s) / (one.drawn - 1) for one in longer]
        waits = [one.first_s - one.arrival.at_s for one in served]
        return Outcome(
            served=served,
            duration_s=self._host_s,
            output_throughput=drawn / self._host_s,
            tpot_ms=1e3 * sum(per_token) / len(per_token) if per_token else 0.0,
            ttft_ms=1e3 * sum(waits) / len(waits),
            dispatches=self.dispatches,
            steps=self.steps,
            preemptions=self.scheduler.preemptions,
        )
