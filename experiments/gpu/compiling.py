"""Cases whose programs compile beside each other before the first of them runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from experiments.gpu.items import Skip, Stage


class Ready(NamedTuple):
    """What a case made; ``compiled_s`` is the longest that one of its programs took to compile."""

    made: Any
    compiled_s: float


def compiled_first(
    own: Stage,
    cases: Sequence[tuple[Any, ...]],
    begin: Callable[..., tuple[Any, Sequence[Any]]],
    threads: int,
    need_s: float,
) -> Iterator[tuple[tuple[Any, ...], Callable[[], Ready]]]:
    """Begins all cases, waits for their programs, and gives each case with what it has made.

    Nothing runs while others compile: two threads that launch at a time break each other's CUDA graphs,
    which may end the process. Only where time runs out the cases that are done run beside those that are
    not.

    Args:
        cases: what ``begin`` is called with; it returns what it made and its lowered programs.
        threads: that compile; XLA does so without the interpreter. One in a rehearsal.
        need_s: seconds that running everything takes; no program is waited for longer than that allows.

    Yields:
        a case, and a function that gives what it made. That raises what ``begin`` or a compilation did,
        or :class:`.items.Skip` where a program was still compiling.
    """
    pool = ThreadPoolExecutor(1 if own.rehearse else threads)

    def begun(case: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        try:
            made, lowered = begin(*case)
            return made, [pool.submit(_seconds_to_compile, one) for one in lowered]
        except Exception as error:
            return error, []

    waiting = [begun(case) for case in cases]
    wait([future for _, own_ones in waiting for future in own_ones], timeout=own.left - need_s)
    for case in cases:
        made, compiling = waiting.pop(0)
        if not all(future.done() for future in compiling):
            made = Skip("it was still compiling")

        def ready(made: Any = made, compiling: list[Any] = compiling) -> Ready:
            if isinstance(made, Exception):
                raise made
            return Ready(made, max((future.result() for future in compiling), default=0.0))

        yield case, ready
        del made, compiling, ready  # With the bank and the cache.


def _seconds_to_compile(lowered: Any) -> float:
    began = time.time()
    lowered.compile()
    return round(time.time() - began, 1)
