"""What the next iteration does: plans of chunks and decode rows; plain Python, without arrays.

First come, first served among adapters; the one with the fewest running sequences goes first, so that
none is starved by another's flood. Where the cache is full the youngest sequence is preempted. It comes
back, before anything new enters, when there are blocks for it. Knows nothing of JAX, tokens or text.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from flora_jax.errors import InputError
from flora_jax.serve.blocks import Blocks
from flora_jax.serve.prefixes import Found, Prefixes
from flora_jax.serve.sequence import Chunk, Sequence, Stage

if TYPE_CHECKING:
    from flora_jax.serve.registry import Version

# What stands in the way of a sequence: nothing, its adapter's read, or no slots for its adapter.
Admission = Literal["ready", "loading", "full"]


class LoadError(InputError):
    """An adapter could not be made ready; the message says which and why."""


class Adapters(Protocol):
    """What the scheduler asks about adapters; ``None`` is the base model, which is always there."""

    def claim(self, version: Version) -> Admission:
        """Claims an adapter for a sequence; "ready" holds until the sequence ends.

        Raises:
            LoadError: it cannot be read, or can have no slots.
        """
        ...

    def is_resident(self, version: Version) -> bool:
        """Whether it has slots."""
        ...

    def is_read(self, version: Version) -> bool:
        """Whether it has slots, or can be given some without being read."""
        ...


class Bounds(NamedTuple):
    """The fixed sizes that plans keep to.

    ``rows`` sequences run at once over ``blocks`` blocks of ``block`` positions. Prompts are cut into
    chunks of ``chunk`` tokens, up to ``chunks`` in a dispatch, or of ``long_chunk``, one in a dispatch;
    an iteration has about ``budget`` tokens. A decode dispatch has up to ``steps`` steps,
    ``steps_while_waiting`` where a sequence could go on sooner, and ``steps_while_reading`` where one
    waits for an adapter that is being read. Prompts share their beginnings in multiples of
    ``shared_stride`` positions.
    """

    rows: int
    blocks: int
    block: int
    chunk: int = 64
    long_chunk: int = 64
    chunks: int = 4
    budget: int = 2048
    steps: int = 16
    steps_while_waiting: int = 1
    steps_while_reading: int = 4
    shared_stride: int = 1


class Decode(NamedTuple):
    """A decode dispatch: up to ``steps`` tokens for each sequence, or until one ends where ``eager``.

    ``most``: how many each one may draw. ``longest``: positions that any of them can reach.
    """

    sequences: list[Sequence]
    steps: int
    eager: bool
    most: list[int]
    longest: int

    @classmethod
    def of(cls, sequences: list[Sequence], steps: int, eager: bool) -> Decode:
        """The dispatch for sequences as they stand."""
        most = [min(steps, max(1, sequence.left)) for sequence in sequences]
        longest = max((sequence.reach for sequence in sequences), default=0) + steps
        return cls(sequences, steps, eager, most, longest)


class Start(NamedTuple):
    """A sequence that draws its first token from what another's prefill left, which is known by ``key``,
    after its last prompt tokens were copied from block ``source`` to ``own``, where these fill none.
    """

    sequence: Sequence
    key: bytes
    source: int | None
    own: int | None


class Withdrawn(NamedTuple):
    """The part of a plan that a sequence was taken out of, and the ``key`` of its :class:`Start`."""

    part: Literal["started", "swapped_in", "chunks"] | None
    key: bytes | None = None


@dataclasses.dataclass
class Plan:
    """What one iteration does, in the order of the fields.

    Args:
        refused: sequences whose adapters could not be loaded, and why; they are out.
        started: new sequences whose whole prompts are in the cache.
        swapped_in: sequences that go on decoding: their blocks' contents come back.
        admitted: new sequences that run from now on.
        chunks: prefill dispatches; the chunks of one have one form.
        swapped_out: sequences that were preempted while they decoded, with the blocks that hold what
            they have cached: to be copied before the rows below write.
        decode: the decode dispatch, if there is one.
        unread: there is no decode dispatch because a sequence has to be preempted, and how much of the
            cache it holds is known only when the tokens in flight are read.
    """

    refused: list[tuple[Sequence, str]] = dataclasses.field(default_factory=list)
    started: list[Start] = dataclasses.field(default_factory=list)
    swapped_in: list[Sequence] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    chunks: list[list[Chunk]] = dataclasses.field(default_factory=list)
    swapped_out: list[tuple[Sequence, list[int]]] = dataclasses.field(default_factory=list)
    decode: Decode | None = None
    unread: bool = False

    def withdraw(self, sequence: Sequence) -> Withdrawn:
        """Undoes what was to be dispatched of a sequence before it decodes: one part at most has it."""
        for start in self.started:
            if start.sequence is sequence:
                self.started.remove(start)
                return Withdrawn("started", start.key)
        if sequence in self.swapped_in:
            self.swapped_in.remove(sequence)
            return Withdrawn("swapped_in")
        kept = [[c for c in chunks if c.sequence is not sequence] for chunks in self.chunks]
        if kept == self.chunks:
            return Withdrawn(None)
        self.chunks = [chunks for chunks in kept if chunks]
        return Withdrawn("chunks")


class Scheduler:
    """Rows, blocks and queues.

    Args:
        bounds: the fixed sizes.
        form_of: in which compiled form a running sequence's prompt is prefilled.
    """

    def __init__(
        self, bounds: Bounds, form_of: Callable[[Sequence], Hashable] = lambda sequence: None
    ):
        self.bounds = bounds
        self.blocks = Blocks(bounds.blocks)
        self.prefixes = Prefixes(self.blocks, bounds.block, bounds.shared_stride)
        self.free_rows = list(range(bounds.rows - 1, -1, -1))
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []
        self.preemptions = 0
        self._form_of = form_of
        self._waiting: dict[Hashable, collections.deque[Sequence]] = {}
        self._share: collections.Counter[Hashable] = collections.Counter()

    @property
    def waiting(self) -> int:
        """Sequences that have no row; any thread may ask."""
        return sum(map(len, list(self._waiting.values()))) + len(self.swapped)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.swapped or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence behind its owner's others."""
        self._waiting.setdefault(sequence.owner, collections.deque()).append(sequence)

    def queued(self, owner: Hashable) -> Iterable[Sequence]:
        """The owner's sequences that wait, first in line first."""
        return self._waiting.get(owner, ())

    def heads(self) -> list[Sequence]:
        """The first in line of each owner, of so many owners that the next to run is most likely among
        them; their adapters are worth reading.
        """
        return [queue[0] for queue in itertools.islice(self._waiting.values(), self._looked_at)]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, with its row and blocks."""
        if sequence.stage == "waiting":
            queue = self._waiting[sequence.owner]
            queue.remove(sequence)
            if not queue:
                del self._waiting[sequence.owner]
        elif sequence.stage == "swapped":
            self.swapped.remove(sequence)
        else:
            self.running.remove(sequence)
            self.prefixes.publish(sequence)  # All that was planned is dispatched by now.
            self._leave(sequence)
        sequence.stage = "ended"

    def plan(self, adapters: Adapters, most_steps: int | None = None) -> Plan:
        """Decides what the next iteration does; what it says is taken for done.

        A plan can be made before the tokens of the one before are read. ``most_steps`` bounds those of
        its decode dispatch further.
        """
        plan = Plan()
        for sequence in self.running:
            self.prefixes.publish(sequence)  # What the plan before said is dispatched.
        self._resume(plan)
        due, reading = self._admit(plan, adapters)
        if not self.running:
            return plan
        self._cut_prompts(plan)
        # Nobody should wait for long who has, or could have, a row; how long a read takes nobody knows.
        hurry = plan.chunks or due or any(s.stage == "prefill" for s in self.running)
        bounds = self.bounds
        most = bounds.steps_while_reading if reading else bounds.steps
        if hurry:
            most = bounds.steps_while_waiting
        self._grow(plan, min(most, bounds.steps, most_steps or bounds.steps))
        return plan

    def landed(self, decode: Decode) -> None:
        """The tokens of a decode dispatch are read."""
        for sequence, number in zip(decode.sequences, decode.most, strict=True):
            sequence.in_flight -= number

    def drew(self, sequence: Sequence, total: int) -> None:
        """A sequence has so many tokens."""
        sequence.drawn = total

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.free_rows.append(sequence.row)
        self.blocks.release(sequence.blocks)
        self._share[sequence.owner] -= 1
        if not self._share[sequence.owner]:
            del self._share[sequence.owner]
        sequence.row, sequence.blocks, sequence.published = None, [], 0

    def _enter(self, sequence: Sequence, stage: Stage) -> None:
        sequence.row, sequence.stage = self.free_rows.pop(), stage
        self._share[sequence.owner] += 1
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.number)

    def _blocks_for(self, positions: int) -> int:
        return -(-positions // self.bounds.block)

    def reserve(self, sequence: Sequence, positions: int) -> bool:
        """Gives a sequence blocks for its first ``positions``; false, and nothing done, if there are
        too few.
        """
        more = self._blocks_for(positions) - len(sequence.blocks)
        if not self.blocks.can_take((), more):
            return False
        sequence.blocks += self.blocks.take(max(0, more))
        return True

    def _fits(self, sequence: Sequence, found: Found) -> bool:
        """Whether there are blocks for a sequence's prompt and a token, beside those that it shares."""
        more = self._blocks_for(sequence.prompt + 1) - len(found.blocks)
        return self.blocks.can_take(found.blocks, more)

    def _start(self, plan: Plan, sequence: Sequence, found: Found) -> None:
        """Lets a sequence that fits begin, with what it shares: to be prefilled, or to decode at once."""
        shared = len(found.blocks)
        self.blocks.share(found.blocks)
        fresh = self.blocks.take(self._blocks_for(sequence.prompt + 1) - shared)
        sequence.blocks = [*found.blocks, *fresh]
        sequence.prefilled = sequence.prompt if found.whole else shared * self.bounds.block
        sequence.published = shared
        self.prefixes.count(sequence)
        self._enter(sequence, "decode" if found.whole else "prefill")
        if found.whole:
            sequence.drawn = 1
            own = sequence.blocks[shared] if found.source is not None else None
            keys = sequence.keys
            assert keys is not None
            assert keys.whole is not None
            plan.started.append(Start(sequence, keys.whole, found.source, own))
            sequence.keys = keys._replace(whole=None)  # It is another's to be found.

    def _resume(self, plan: Plan) -> None:
        """Gives rows and blocks to preempted sequences, oldest first."""
        while self.swapped and self.free_rows:
            oldest = self.swapped[0]
            if oldest.drawn:
                if not self.reserve(oldest, oldest.cached + 1):
                    break
                self._enter(self.swapped.pop(0), "decode")
                plan.swapped_in.append(oldest)
                continue
            found = self.prefixes.find(oldest)
            if not self._fits(oldest, found):
                break
            self._start(plan, self.swapped.pop(0), found)

    def _admit(self, plan: Plan, adapters: Adapters) -> tuple[bool, bool]:
        """Lets new sequences in, with a row and blocks for their prompts.

        Returns:
            Whether one waits for the next iteration, for its adapter to be written or for a beginning
            that it shares, and whether one waits for an adapter that is being read.
        """
        due = reading = False
        coming = self.prefixes.coming(self.running)
        # A write delays those who decode: one in an iteration.
        decoding = any(sequence.stage == "decode" for sequence in self.running)
        written = 0

        def claim(sequence: Sequence) -> Admission | None:
            nonlocal due, reading, written
            if self.prefixes.will_grow(sequence, coming):
                due = True
                return "loading"
            version = sequence.version
            if version is None:
                return "ready"
            resident = adapters.is_resident(version)
            if decoding and written and not resident:
                due = True
                return "loading"
            try:
                found = adapters.claim(version)
            except LoadError as error:
                self.remove(sequence)
                plan.refused.append((sequence, str(error)))
                return None
            written += found == "ready" and not resident
            reading = reading or found == "loading"
            return found

        while self.free_rows and not self.swapped:
            choice = self._choose(claim, adapters)
            if choice is None:
                break
            chosen, shared = choice
            queue = self._waiting.pop(chosen.owner)
            queue.popleft()
            if queue:  # Behind the others, who have as much right.
                self._waiting[chosen.owner] = queue
            self._start(plan, chosen, shared)
            coming |= self.prefixes.coming([chosen])
            plan.admitted.append(chosen)
        return due, reading

    def _choose(
        self, claim: Callable[[Sequence], Admission | None], adapters: Adapters
    ) -> tuple[Sequence, Found] | None:
        """The next one to run, and what it shares; none where the first in line lacks blocks or was
        overtaken enough.
        """
        heads = sorted(self.heads(), key=lambda sequence: self._share[sequence.owner])
        for number, sequence in enumerate(itertools.chain(heads, self._behind(adapters))):
            shared = self.prefixes.find(sequence)
            if not self._fits(sequence, shared):
                return None
            found = claim(sequence)
            if found == "ready":
                for passed in heads[:number]:
                    passed.overtaken += 1
                return sequence, shared
            # No slots for its adapter until a running one ends: do not let others take them for ever.
            if found == "full" and sequence.overtaken >= self.bounds.rows:
                return None
        return None

    def _behind(self, adapters: Adapters) -> Iterator[Sequence]:
        """Who is first in line behind the heads and needs no read; looked for only when asked."""
        for queue in list(self._waiting.values())[self._looked_at :]:
            version = queue[0].version
            if version is None or adapters.is_read(version):
                yield queue[0]

    @property
    def _looked_at(self) -> int:
        return 4 * self.bounds.rows

    def _cut_prompts(self, plan: Plan) -> None:
        """Chunks of prompts within the iteration's budget of tokens."""
        budget = self.bounds.budget - sum(s.stage == "decode" for s in self.running)
        while chunks := self._next_chunks(budget):
            for chunk in chunks:
                sequence = chunk.sequence
                sequence.prefilled = chunk.start + chunk.length
                if chunk.last:
                    sequence.stage, sequence.drawn = "decode", 1
            budget -= sum(chunk.length for chunk in chunks)
            plan.chunks.append(chunks)

    def _next_chunks(self, budget: int) -> list[Chunk]:
        """The oldest prompt's next long chunk, or its short ones beside others of the same form; none
        where no prompt is left, or the ``budget`` of tokens does not reach for one.
        """
        found: list[Chunk] = []
        bounds = self.bounds
        shared: Hashable = None
        for sequence in self.running:
            if sequence.stage != "prefill":
                continue
            start, form = sequence.prefilled, self._form_of(sequence)
            if sequence.prompt - start >= bounds.long_chunk:
                if not found:
                    return [Chunk(sequence, start, bounds.long_chunk)] if budget > 0 else []
                continue
            if shared not in (None, form):
                continue
            shared = form
            while start < sequence.prompt and len(found) < bounds.chunks:
                count = min(bounds.chunk, sequence.prompt - start)
                if count > budget:
                    return found
                found.append(Chunk(sequence, start, count))
                start, budget = start + count, budget - count
        return found

    def _grow(self, plan: Plan, steps: int) -> None:
        """The decode dispatch, with blocks for its tokens; preempts the youngest where there are none."""
        while True:
            for tried in dict.fromkeys((steps, 1)):
                decode = self._fitting(tried)
                if decode is not None:
                    self._dispatch(plan, decode)
                    return
            if any(sequence.in_flight for sequence in self.running):
                plan.unread = True
                return
            self._preempt(plan, self.running[-1])

    def _fitting(self, steps: int) -> Decode | None:
        """The decode dispatch of so many steps; ``None`` for want of blocks."""
        rows = [s for s in self.running if s.stage == "decode" and (s.left > 0 or not s.in_flight)]
        decode = Decode.of(rows, steps, self.waiting > 0)
        more = sum(
            max(0, self._blocks_for(sequence.reach + number) - len(sequence.blocks))
            for sequence, number in zip(rows, decode.most)
        )
        return decode if more <= self.blocks.available else None

    def _dispatch(self, plan: Plan, decode: Decode) -> None:
        for sequence, number in zip(decode.sequences, decode.most):
            self.reserve(sequence, sequence.reach + number)
            sequence.in_flight += number
        plan.decode = decode if decode.sequences else None

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        """Takes a running sequence's row and blocks; one that is not through its prompt starts over."""
        blocks = sequence.blocks[: self._blocks_for(sequence.cached)]
        self.running.remove(sequence)
        self._leave(sequence)
        part, key = plan.withdraw(sequence)
        if part == "swapped_in":
            pass  # The host still has its copy.
        elif part is None and sequence.stage == "decode":
            plan.swapped_out.append((sequence, blocks))
            if sequence.keys is not None:  # When it is back, nothing of its prefill is left.
                sequence.keys = sequence.keys._replace(whole=None)
        else:
            sequence.prefilled = sequence.drawn = 0
            if key is not None:  # Once more it is another's that it starts from.
                assert sequence.keys is not None
                sequence.keys = sequence.keys._replace(whole=key)
        sequence.stage = "swapped"
        self.swapped.append(sequence)
        self.swapped.sort(key=lambda s: s.number)
        self.preemptions += 1
