"""Times of programs, taken in turns so that a machine's drift falls on all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Name = TypeVar("Name")


def interleaved(
    programs: Mapping[Name, Callable[[], Any]],
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Seconds of every run, by program: ``repeats`` rounds of all in turn, after one untimed round.

    The order of a round is drawn anew, as a program may find the caches as the one before left
    them. A program's result is waited for (``block_until_ready``) and dropped within its time.
    ``advance`` is called after every run, ``(repeats + 1) · len(programs)`` times.

    Raises:
        ValueError: fewer than one repeat.
    """
    import jax

    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    seconds: dict[Name, list[float]] = {name: [] for name in programs}
    order, shuffle = list(programs), random.Random(0).shuffle
    for number in range(repeats + 1):
        shuffle(order)
        for name in order:
            run = programs[name]
            started = time.perf_counter()
            jax.block_until_ready(run())
            taken = time.perf_counter() - started
            if number:
                seconds[name].append(taken)
            advance()
    return seconds
