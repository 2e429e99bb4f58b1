"""Which sequences run, with which rows and pages of the cache; plain Python, without arrays.

First come, first served among adapters; the one with the fewest running sequences goes first, so that
none is starved by another's flood. Where the cache is full the youngest sequence is set aside and comes
back, before anything new, when there is room. Knows nothing of JAX, tokens or text.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Literal

Stage = Literal["waiting", "prefill", "decode", "aside"]
# What stands in the way of a sequence: nothing, its adapter's load, or no room for its adapter.
Admission = Literal["ready", "loading", "full"]


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request on its way: ``prompt`` and ``room`` count tokens, ``drawn`` those it has so far.

    ``flying`` counts further ones that may have been drawn and nobody has read yet. ``owner`` is whose
    share of the rows it takes; ``content`` is the caller's.
    """

    ticket: int
    owner: Hashable
    prompt: int
    room: int
    content: Any = None
    stage: Stage = "waiting"
    row: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    prefilled: int = 0
    drawn: int = 0
    flying: int = 0
    overtaken: int = 0

    @property
    def cached(self) -> int:
        """Positions in the cache: the last drawn token is not among them yet."""
        return self.prompt + self.drawn - 1 if self.drawn else self.prefilled

    @property
    def reach(self) -> int:
        """Positions in the cache at most, with those of tokens that nobody has read yet."""
        return self.cached + self.flying

    @property
    def left(self) -> int:
        return self.room - self.drawn - self.flying


class Scheduler:
    """Rows, pages and queues.

    Args:
        rows: sequences that run at once.
        pages: pages of the cache.
        page: positions of a page.
    """

    def __init__(self, rows: int, pages: int, page: int):
        self.rows = rows
        self.page = page
        self.pages = pages
        self.free_pages = list(range(pages - 1, -1, -1))
        self.free_rows = list(range(rows - 1, -1, -1))
        self.running: list[Sequence] = []
        self.aside: list[Sequence] = []
        self.preemptions = 0
        self._waiting: dict[Hashable, collections.deque[Sequence]] = {}
        self._share: collections.Counter[Hashable] = collections.Counter()

    @property
    def waiting(self) -> int:
        # Another thread may ask: a list is taken of them at once.
        return sum(map(len, list(self._waiting.values()))) + len(self.aside)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.aside or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence behind its owner's others."""
        self._waiting.setdefault(sequence.owner, collections.deque()).append(sequence)

    def queued(self, owner: Hashable) -> Iterable[Sequence]:
        """The owner's sequences that wait, first in line first."""
        return self._waiting.get(owner, ())

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, with its row and pages."""
        if sequence.stage == "waiting":
            queue = self._waiting[sequence.owner]
            queue.remove(sequence)
            if not queue:
                del self._waiting[sequence.owner]
        elif sequence.stage == "aside":
            self.aside.remove(sequence)
        else:
            self.running.remove(sequence)
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.free_rows.append(sequence.row)
        self.free_pages += reversed(sequence.pages)
        self._share[sequence.owner] -= 1
        sequence.row, sequence.pages = None, []

    def _enter(self, sequence: Sequence, stage: Stage) -> None:
        sequence.row, sequence.stage = self.free_rows.pop(), stage
        self._share[sequence.owner] += 1
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.ticket)

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page)

    def reserve(self, sequence: Sequence, positions: int) -> bool:
        """Gives a sequence pages for its first ``positions``; false, and nothing done, if there are
        too few.
        """
        more = self._pages_for(positions) - len(sequence.pages)
        if more > len(self.free_pages):
            return False
        sequence.pages += [self.free_pages.pop() for _ in range(more)]
        return True

    def resume(self) -> list[Sequence]:
        """Sequences set aside that run again, oldest first; their stages and pages are set."""
        found = []
        while self.aside and self.free_rows:
            oldest = self.aside[0]
            if not self.reserve(oldest, max(oldest.cached + 1, oldest.prompt)):
                break
            self._enter(self.aside.pop(0), "decode" if oldest.drawn else "prefill")
            found.append(oldest)
        return found

    def admit(
        self,
        admission: Callable[[Sequence], Admission],
        at_once: Callable[[Sequence], bool] = lambda _: False,
    ) -> list[Sequence]:
        """New sequences that run from now on, with a row and pages for their prompts.

        ``admission`` says whether a sequence's adapter is there; "ready" must stay true for as long as
        the sequence runs. It may remove the sequence from the scheduler. It is asked about the heads,
        and where none of them can run about those behind them of which ``at_once`` is true: theirs
        need not be read.
        """
        found: list[Sequence] = []
        while self.free_rows and not self.aside:
            chosen = self._choose(admission, at_once)
            if chosen is None:
                break
            queue = self._waiting.pop(chosen.owner)
            queue.popleft()
            if queue:  # Behind the others, who have as much right.
                self._waiting[chosen.owner] = queue
            self._enter(chosen, "prefill")
            found.append(chosen)
        return found

    def _choose(
        self, admission: Callable[[Sequence], Admission], at_once: Callable[[Sequence], bool]
    ) -> Sequence | None:
        """The next one to run; none where the first in line lacks pages or has been passed enough."""
        heads = sorted(self.heads(), key=lambda sequence: self._share[sequence.owner])
        for number, sequence in enumerate(itertools.chain(heads, self._behind(at_once))):
            if self._pages_for(sequence.prompt + 1) > len(self.free_pages):
                return None
            found = admission(sequence)
            if found == "ready":
                self.reserve(sequence, sequence.prompt + 1)
                for passed in heads[:number]:
                    passed.overtaken += 1
                return sequence
            # No room for its adapter until a running one ends: do not let others take it for ever.
            if found == "full" and sequence.overtaken >= self.rows:
                return None
        return None

    def _behind(self, at_once: Callable[[Sequence], bool]) -> Iterator[Sequence]:
        """Who is first in line behind the heads and can run at once; looked for only when asked."""
        for queue in list(self._waiting.values())[4 * self.rows :]:
            if at_once(queue[0]):
                yield queue[0]

    def heads(self) -> list[Sequence]:
        """The first in line of each owner, of so many owners that the next to run is most likely among
        them; their adapters are worth reading.
        """
        return [queue[0] for queue in itertools.islice(self._waiting.values(), 4 * self.rows)]

    def _wanted(self, steps: int) -> list[tuple[Sequence, int]] | None:
        """Who decodes, and the positions each needs for so many steps; ``None`` for want of pages."""
        rows = [s for s in self.running if s.stage == "decode" and (s.left > 0 or not s.flying)]
        wanted = [(s, s.reach + min(steps, max(1, s.left))) for s in rows]
        more = sum(max(0, self._pages_for(n) - len(s.pages)) for s, n in wanted)
        return wanted if more <= len(self.free_pages) else None

    def can_grow(self) -> bool:
        """Whether all decoding sequences have, or can have, pages for a token more."""
        return self._wanted(1) is not None

    def grow(self, steps: int) -> tuple[list[Sequence], int, list[tuple[Sequence, list[int]]]]:
        """Pages for the next tokens of all decoding sequences.

        Returns:
            Who decodes, for how many steps at most, and who was set aside for it, with the pages that
            hold what they have cached: to be copied before anybody writes.
        """
        set_aside: list[tuple[Sequence, list[int]]] = []
        while True:
            for tried in dict.fromkeys((steps, 1)):
                wanted = self._wanted(tried)
                if wanted is not None:
                    for sequence, positions in wanted:
                        self.reserve(sequence, positions)
                    return [sequence for sequence, _ in wanted], tried, set_aside
            youngest = self.running[-1]
            set_aside.append((youngest, self.preempt(youngest)))

    def preempt(self, sequence: Sequence) -> list[int]:
        """Sets a running sequence aside; one that is not through its prompt starts over.

        Returns the pages that hold what it has cached, which are no longer its own.
        """
        pages = sequence.pages[: self._pages_for(sequence.cached)]
        self.running.remove(sequence)
        self._leave(sequence)
        if sequence.stage == "prefill":
            sequence.prefilled, pages = 0, []
        sequence.stage = "aside"
        self.aside.append(sequence)
        self.aside.sort(key=lambda s: s.ticket)
        self.preemptions += 1
        return pages
