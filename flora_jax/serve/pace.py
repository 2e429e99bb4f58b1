"""How many steps a decode dispatch has, so that whoever arrives does not wait long for its end."""

from __future__ import annotations

import math


class Pace:
    """Steps that take about a given time, by what those of the last dispatch took.

    Args:
        seconds: of a dispatch; ``None`` sets no bound.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._step_s = math.inf
        self._last_s = -math.inf

    def steps(self, most: int) -> int:
        """Steps of the next dispatch: at least one, at most so many; one where nothing is known yet."""
        if self._seconds is None:
            return most
        return max(1, min(most, int(self._seconds / self._step_s)))

    def took(self, steps: int, began_s: float, ended_s: float) -> None:
        """A dispatch had so many steps; with 0 its time is not that of steps alone, and does not count.

        Args:
            steps: those that were run.
            began_s: when it was dispatched. One that was still under way then came first.
            ended_s: when its tokens were read.
        """
        own_s = ended_s - max(began_s, self._last_s)
        self._last_s = ended_s
        if steps:
            self._step_s = max(own_s / steps, 1e-9)
