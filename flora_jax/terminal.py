"""What a user sees on standard error while work is done: notes, and bars that say how far it is.

Knows nothing of the work. Where standard error is no terminal, no bars are drawn.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def say(message: str) -> None:
    """A line for the user."""
    print(message, file=sys.stderr)


class Bar:
    """One bar: what is done, how much of how much, how long it may still take, and a note."""

    def __init__(self, shown: Progress, task: TaskID) -> None:
        self._shown, self._task = shown, task

    def advance(self, steps: int = 1) -> None:
        """``steps`` more are done."""
        self._shown.advance(self._task, steps)

    def show(self, done: int, total: int | None = None, note: str = "") -> None:
        """``done`` of ``total`` are done; ``None`` leaves the total as it is."""
        if total is None:
            self._shown.update(self._task, completed=done, note=note)
        else:
            self._shown.update(self._task, completed=done, total=total, note=note)


class Add(Protocol):
    """Adds a bar under the others: its name, and how many steps it has, if that is known."""

    def __call__(self, what: str, total: int | None = None) -> Bar: ...


@contextlib.contextmanager
def bars(keep: bool = False) -> Iterator[Add]:
    """What adds bars on standard error, one under the other.

    Args:
        keep: leave the bars on the screen at the end, and print them once where standard error is no
            terminal; else they go away.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        # Names are the user's own text, never markup.
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    quiet = not keep and not console.is_terminal
    with Progress(*columns, console=console, transient=not keep, disable=quiet) as shown:

        def add(what: str, total: int | None = None) -> Bar:
            return Bar(shown, shown.add_task(what, total=total, note=""))

        yield add


@contextlib.contextmanager
def progress(what: str, total: int | None = None, keep: bool = False) -> Iterator[Bar]:
    """One bar, see :func:`bars`; without a ``total`` it only shows that there is work."""
    with bars(keep) as add:
        yield add(what, total)
