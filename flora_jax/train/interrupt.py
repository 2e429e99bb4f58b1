"""A request to end, by a signal, that a run answers where it loses nothing. Knows nothing of training.

A handler that raises is not enough: Python drops an exception that is raised while a callback of the
garbage collector or a finaliser runs, and the run goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from flora_jax.errors import RunError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class InterruptedRun(RunError):
    """The run was asked to end; ``number`` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Interrupt:
    """Whether the process has been asked to end."""

    def __init__(self) -> None:
        self._number: int | None = None

    def request(self, number: int) -> None:
        """Asks for the end in the name of a signal; sets a flag and nothing else."""
        self._number = number

    @property
    def requested(self) -> bool:
        return self._number is not None

    def check(self, where: str = "before the first step") -> None:
        """Raises :class:`InterruptedRun` once the end has been asked for; ``where`` completes it."""
        if self._number is not None:
            name = signal.Signals(self._number).name
            raise InterruptedRun(f"stopped by {name} {where}; --resume goes on", self._number)


@contextlib.contextmanager
def on_signals() -> Iterator[Interrupt]:
    """SIGTERM and SIGINT set the flag of what is yielded; a second one ends the process at once.

    Only for the main thread. The handlers from before are back at the end.
    """
    interrupt = Interrupt()

    def handle(number: int, _: FrameType | None) -> None:
        interrupt.request(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # Not print: the signal may have come inside another write to the same stream.
        os.write(2, b"stopping after this step; the same signal again ends at once\n")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
