"""What a user sees on standard error while work is done: notes, and bars that say how far it is.

Knows nothing of the work. Where standard error is no terminal, a bar is a plain line every so often.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# Between two lines about a bar in a log: soon enough to see that work goes on, and a day of it is no
# more to read than a file of source.
LINE_SECONDS = 20.0


def say(message: str) -> None:
    """A line for the user."""
    print(message, file=sys.stderr)


class Bar(Protocol):
    """One bar: what is done, how much of how much, how long it may still take, and a note."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more are done."""

    def show(self, done: int, total: int | None = None, note: str = "") -> None:
        """``done`` of ``total`` are done; ``None`` leaves the total as it is."""


class Add(Protocol):
    """Adds a bar under the others: its name, and how many steps it has, if that is known."""

    def __call__(self, what: str, total: int | None = None) -> Bar: ...


@contextlib.contextmanager
def bars(keep: bool = False) -> Iterator[Add]:
    """What adds bars on standard error, one under the other.

    Where standard error is no terminal, each one that is not at its end is a line every
    ``LINE_SECONDS``, so that short work leaves none.

    Args:
        keep: leave the bars on the screen at the end, and say where they ended in a line where standard
            error is no terminal; else they go away.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with _drawn(console, keep) if console.is_terminal else _told(keep) as add:
        yield add


@contextlib.contextmanager
def progress(what: str, total: int | None = None, keep: bool = False) -> Iterator[Bar]:
    """One bar, see :func:`bars`; without a ``total`` it only shows that there is work."""
    with bars(keep) as add:
        yield add(what, total)


class _Drawn:
    """A bar on a terminal."""

    def __init__(self, shown: Progress, task: TaskID) -> None:
        self._shown, self._task = shown, task

    def advance(self, steps: int = 1) -> None:
        self._shown.advance(self._task, steps)

    def show(self, done: int, total: int | None = None, note: str = "") -> None:
        if total is None:
            self._shown.update(self._task, completed=done, note=note)
        else:
            self._shown.update(self._task, completed=done, total=total, note=note)


@contextlib.contextmanager
def _drawn(console: Console, keep: bool) -> Iterator[Add]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        # Names are the user's own text, never markup.
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=not keep) as shown:

        def add(what: str, total: int | None = None) -> Bar:
            return _Drawn(shown, shown.add_task(what, total=total, note=""))

        yield add


class _Told:
    """A bar in a log."""

    def __init__(
        self, what: str, total: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._done, self._note = 0, ""
        # What is done at a time: first, and last. What comes before the first is mostly compiling.
        self._first: tuple[float, int] | None = None
        self._last = (0.0, 0)

    def advance(self, steps: int = 1) -> None:
        self.show(self._done + steps, note=self._note)

    def show(self, done: int, total: int | None = None, note: str = "") -> None:
        self._total = self._total if total is None else total
        self._note = note
        if done != self._done:
            self._done, self._last = done, (self._clock(), done)
            self._first = self._first or self._last

    @property
    def ended(self) -> bool:
        return self._total is not None and self._done >= self._total

    def line(self, left: bool = True) -> str:
        """As ``step 40/200, loss 1.234, 4 min left``; without ``left`` not how long it may take."""
        remaining = self._remaining() if left else None
        if self._total is None:
            # A note then says what is counted.
            parts = [" ".join(filter(None, [f"{self._what} {self._done:,}", self._note]))]
        else:
            parts = [f"{self._what} {self._done}/{self._total}", *filter(None, [self._note])]
        return ", ".join([*parts, *([] if remaining is None else [f"{_span(remaining)} left"])])

    def _remaining(self) -> float | None:
        if self._total is None or self._first is None or self._last[1] <= self._first[1]:
            return None
        (began, before), (now, done) = self._first, self._last
        rest = (now - began) / (done - before) * (self._total - done) - (self._clock() - now)
        return max(rest, 1.0)


@contextlib.contextmanager
def _told(keep: bool) -> Iterator[Add]:
    told: list[_Told] = []
    over = threading.Event()

    def tell() -> None:
        # The stream may be closed before the work ends.
        with contextlib.suppress(OSError, ValueError):
            while not over.wait(LINE_SECONDS):
                for bar in [bar for bar in told if not bar.ended]:
                    say(bar.line())

    def add(what: str, total: int | None = None) -> Bar:
        told.append(_Told(what, total))
        return told[-1]

    # A thread, as a step may take longer than the time between two lines.
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield add
    finally:
        over.set()
        teller.join()
        for bar in told if keep else ():
            say(bar.line(left=False))


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
