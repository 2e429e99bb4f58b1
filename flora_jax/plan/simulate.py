"""Serving on a simulated clock: the engine's own scheduler, lattice and choice of pieces, and for every
dispatch the time that the roofline gives it.

What it says is a model's, not a measurement. It follows the engine's iteration: sequences enter,
prompts are prefilled within the budget of tokens, the others draw. Adapters are always on the device;
swapping pages of the cache takes no time; the host's work is hidden behind the device's unless
``host_ms`` says what a dispatch takes there. Knows nothing of tokens' values or of arrays.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

from flora_jax.adapters.bank import Slots
from flora_jax.adapters.pairs import BASE_FORM, Form, padded_additive, padded_multiplicative
from flora_jax.adapters.ragged import GROUP
from flora_jax.errors import InputError
from flora_jax.plan import memory, prompts, roofline
from flora_jax.plan.setting import Setting
from flora_jax.platforms import GPU
from flora_jax.serve.dispatch import Piece
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.pieces import next_pieces
from flora_jax.serve.programs import DecodeShape, Lattice
from flora_jax.serve.scheduler import Scheduler, Sequence


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


class _Bank:
    """Adapters that are all alike, each resident; a row is one of them by any name."""

    def __init__(self, setting: Setting):
        self.targets = setting.adapted
        self._counts = {target: setting.count(target)[:2] for target in self.targets}

    def most(self, target: str) -> tuple[int, int]:
        return self._counts[target]

    def of(self, name: Any, target: str) -> Slots:
        multiplicative, additive = self._counts[target]
        return Slots(tuple(range(2, 2 + multiplicative)), tuple(range(1, 1 + additive)))


class Simulation:
    """An engine whose device is a clock.

    Args:
        setting: model, card, adapters, sizes.
        ways: implementations that its times are for; the platform table's where it is ``None``.
        max_num_batched_tokens: of one iteration.
        cache_tokens: positions of the cache; room for all rows' whole contexts where it is ``None``.
        host_ms: what a dispatch takes on the host, while the device runs the one before.
    """

    def __init__(
        self,
        setting: Setting,
        ways: roofline.Ways | None = None,
        *,
        max_num_batched_tokens: int = 8192,
        cache_tokens: int | None = None,
        host_ms: float = 0.0,
    ):
        self.setting, self.host_ms = setting, host_ms
        self.ways = ways or roofline.Ways()
        self.options = EngineOptions(
            max_num_seqs=setting.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=setting.context,
            cache_tokens=cache_tokens,
            page=setting.page,
            chunk=GPU.chunk,
            pieces=GPU.pieces,
            row_buckets=(setting.max_num_seqs,),
        )
        self.lattice = Lattice(_Bank(setting), self.options, setting.context, dynamic=False)
        pages = memory.pages(setting)
        if cache_tokens is not None:
            pages = -(-cache_tokens // setting.page)
        self.scheduler = Scheduler(setting.max_num_seqs, pages, setting.page)
        self.clock_s = 0.0
        self.dispatches = self.steps = 0
        self._first_s: dict[int, float] = {}
        self._served: list[Served] = []
        self._cached_ms: dict[Any, float] = {}

    def form_of(self, sequence: Sequence) -> Form:
        """In which form a prompt is prefilled; all adapters have one."""
        if not self.setting.adapted:
            return BASE_FORM
        counts = [self.setting.count(target) for target in self.setting.adapted]
        return Form(
            padded_multiplicative(max(count[0] for count in counts)),
            padded_additive(max(count[1] for count in counts)),
            self.setting.adapted,
            self.options.merge_prompts,
        )

    def run(self, arrivals: Many[Arrival]) -> Outcome:
        """Serves all requests; each draws exactly its tokens.

        Raises:
            InputError: a request that the context or the cache cannot hold, or none at all.
        """
        most = min(self.setting.context, self.scheduler.pages * self.setting.page)
        for number, arrival in enumerate(arrivals):
            if arrival.prompt < 1 or arrival.output < 1 or arrival.prompt + arrival.output > most:
                raise InputError(
                    f"request {number}: {arrival.prompt} tokens and {arrival.output} more, expected "
                    f"at least one each and {most} together at most"
                )
        if not arrivals:
            raise InputError("the workload has no requests, expected some")
        ordered = collections.deque(sorted(arrivals))
        tickets = itertools.count()
        while ordered or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self.clock_s = max(self.clock_s, ordered[0].at_s)
            while ordered and ordered[0].at_s <= self.clock_s:
                ticket, own = next(tickets), ordered.popleft()
                self.scheduler.add(Sequence(ticket, ticket, own.prompt, own.output, own))
            self._iterate()
        return self._outcome()

    def _iterate(self) -> None:
        self.scheduler.resume()
        self.scheduler.admit(lambda _: "ready")
        prefilled = self._prefill()
        hurry = prefilled or any(s.stage == "prefill" for s in self.scheduler.running)
        wanted = GPU.steps_while_waiting if hurry else self.options.decode_steps
        rows, steps, _ = self.scheduler.grow(min(wanted, self.options.decode_steps))
        if rows:
            self._decode(rows, steps)

    def _prefill(self) -> bool:
        decoding = sum(sequence.stage == "decode" for sequence in self.scheduler.running)
        budget = self.options.max_num_batched_tokens - decoding
        any_ended = False
        device: Any = self  # What next_pieces asks of one: its lattice, and a sequence's form.
        while pieces := next_pieces(self.scheduler.running, device, budget):
            self._pass(self._prefill_ms(pieces))
            for piece in pieces:
                piece.sequence.prefilled = piece.start + piece.length
                if piece.last:
                    any_ended = True
                    piece.sequence.stage, piece.sequence.drawn = "decode", 1
                    self._first_s.setdefault(piece.sequence.ticket, self.clock_s)
                    self._end_if_done(piece.sequence)
            budget -= sum(piece.length for piece in pieces)
        return any_ended

    def _decode(self, rows: list[Sequence], steps: int) -> None:
        least, most = min(s.left for s in rows), max(s.left for s in rows)
        # Who waits for a row gets it as soon as one ends.
        steps = min(steps, least if self.scheduler.waiting else most)
        longest = max(sequence.cached for sequence in rows) + steps
        shape = self.lattice.decode([sequence.ticket for sequence in rows], longest)
        self._pass(steps * self._step_ms(shape))
        self.steps += steps
        for sequence in rows:
            sequence.drawn += min(steps, sequence.left)
            self._end_if_done(sequence)

    def _pass(self, device_ms: float) -> None:
        self.dispatches += 1
        self.clock_s += 1e-3 * max(device_ms, self.host_ms)

    def _end_if_done(self, sequence: Sequence) -> None:
        if sequence.left == 0:
            self.scheduler.remove(sequence)
            first_s = self._first_s.pop(sequence.ticket)
            self._served.append(Served(sequence.content, first_s, self.clock_s, sequence.drawn))

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

    def _prefill_ms(self, pieces: list[Piece]) -> float:
        lattice = self.lattice
        rows, length = 1, lattice.long
        if max(piece.length for piece in pieces) <= lattice.short:
            rows, length = lattice.piece_rows(len(pieces)), lattice.short
        span = lattice.span(max(piece.start + length for piece in pieces))
        key = (rows, length, span)
        if key not in self._cached_ms:
            terms = prompts.prefill(self.setting, rows, length, span, self.ways)
            self._cached_ms[key] = roofline.total(terms)
        return self._cached_ms[key]

    def _outcome(self) -> Outcome:
        served = sorted(self._served, key=lambda one: one.arrival)
        drawn = sum(one.drawn for one in served)
        longer = [one for one in served if one.drawn > 1]
        per_token = [(one.end_s - one.first_s) / (one.drawn - 1) for one in longer]
        waits = [one.first_s - one.arrival.at_s for one in served]
        return Outcome(
            served=served,
            duration_s=self.clock_s,
            output_throughput=drawn / self.clock_s,
            tpot_ms=1e3 * sum(per_token) / len(per_token) if per_token else 0.0,
            ttft_ms=1e3 * sum(waits) / len(waits),
            dispatches=self.dispatches,
            steps=self.steps,
            preemptions=self.scheduler.preemptions,
        )
