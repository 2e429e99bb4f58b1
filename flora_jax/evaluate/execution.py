"""Runs programs by the table of languages, each distinct one once, and remembers the outcomes.

Knows nothing of problems and models: a program is a text in a language, its outcome a status.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from flora_jax.evaluate.languages import (
    ARTEFACT,
    EXCEPTION,
    LANGUAGES,
    MEMORY_LIMIT,
    OK,
    OUTPUT_LIMIT,
    SYNTAX_ERROR,
    TIMEOUT,
    Language,
    Toolchain,
    check_status,
)
from flora_jax.jsonl import Journal, text
from flora_jax.sandbox import supervise
from flora_jax.sandbox.sandbox import Sandbox

_ENDINGS = {
    "timeout": TIMEOUT, "starved": TIMEOUT, "output": OUTPUT_LIMIT, "memory": MEMORY_LIMIT
}  # fmt: skip
# Programs that share caches and halves of cores with others take less than so many times as long.
_CROWD = 2.0
_TAIL = 500  # Characters of an error message that are kept.
_T = TypeVar("_T")


@dataclass(frozen=True)
class Task:
    """A program and all that running it takes; it can be sent to another process."""

    language: str
    program: str
    toolchain: Toolchain
    sandbox: Sandbox

    def key(self, version: str) -> str:
        """Names what decides the outcome: program, toolchain, limits, and the rule that judges."""
        said = _setting(LANGUAGES[self.language], self.toolchain, version, self.sandbox).copy()
        said.update(_bytes(self.program))
        return said.hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """``status`` is a class of the table; ``seconds`` of wall time over all steps.

    ``machine`` is there where a program ran out of time and would by itself too, on that machine.
    """

    status: str
    exit_code: int
    seconds: float
    stderr: str
    machine: str = ""


def execute(task: Task) -> Outcome:
    """Runs the steps of one program up to the first that fails.

    Raises:
        RunError: the sandbox itself failed.
    """
    return _run_steps(task, 1.0)[0]


def execute_beside(task: Task) -> Outcome | None:
    """The outcome that :func:`execute` has on a machine at rest, found beside other programs.

    Running out of twice the time is running out of time, and what ended within its time by the clock
    has done so by its own; of anything between, None.

    Raises:
        RunError: the sandbox itself failed.
    """
    outcome, late = _run_steps(task, _CROWD)
    if late:
        return None
    return replace(outcome, machine=machine()) if outcome.status == TIMEOUT else outcome


def _run_steps(task: Task, times: float) -> tuple[Outcome, bool]:
    """The outcome with so many times the time, and whether other programs may have a part in it."""
    language = LANGUAGES[task.language]
    files = {language.file: _bytes(task.program)}
    seconds, late = 0.0, False
    *builds, last = task.toolchain.steps
    for step in builds:
        ran, content = task.sandbox.run(
            step.command, files, times * step.seconds, ARTEFACT if step.keeps else None
        )
        seconds += ran.seconds
        late |= ran.seconds > step.seconds and ran.ending != "timeout"
        if ran.ending != "exited" or ran.exit_code != 0:
            status = _ENDINGS.get(ran.ending, SYNTAX_ERROR)
            return Outcome(status, ran.exit_code, seconds, _tail(ran)), late
        files = {ARTEFACT: content} if step.keeps else files
    ran, _ = task.sandbox.run(last.command, files, times * last.seconds)
    seconds += ran.seconds
    late |= ran.seconds > last.seconds and ran.ending != "timeout"
    if ran.ending != "exited":
        status = _ENDINGS[ran.ending]
    elif language.passes(ran.exit_code, ran.stdout, ran.stderr):
        status = OK
    else:
        found = language.syntax is not None and language.syntax.search(ran.stderr)
        status = SYNTAX_ERROR if found else EXCEPTION
    return Outcome(status, ran.exit_code, seconds, "" if status == OK else _tail(ran)), late


@functools.cache
def machine() -> str:
    """What says how fast programs run here: the processor's name, or its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@functools.lru_cache
def _setting(language: Language, toolchain: Toolchain, version: str, sandbox: Sandbox) -> Any:
    rule = [language.passes.__name__, language.syntax and language.syntax.pattern]
    setting = [language.name, rule, asdict(toolchain), version, asdict(sandbox)]
    return hashlib.sha256(json.dumps(setting).encode())


def _bytes(program: str) -> bytes:
    # A half of a pair, which JSON may hold, becomes bytes that no compiler takes for a text.
    return program.encode("utf-8", "surrogatepass")


def _tail(ran: supervise.Ran) -> str:
    return (ran.stderr.strip() or ran.stdout.strip())[-_TAIL:]


@dataclass(frozen=True)
class Runner:
    """What runs programs: ``workers`` threads, one for each core by default, or any ``executor``.

    ``in_flight`` tasks at most wait in the executor, by default four for each core.
    """

    sandbox: Sandbox
    workers: int | None = None
    executor: Executor | None = None
    in_flight: int | None = None

    def run(
        self, tasks: Iterable[tuple[str, Task]], slow: Iterable[tuple[str, Task]] = ()
    ) -> Iterator[tuple[str, Outcome]]:
        """Outcomes of named tasks as they come, the same however many run at once.

        A program that takes longer beside others may be right: at the end it runs again with at least
        eight cores to itself (or all there are), and that outcome counts. One that does not end within
        twice its time is not run again. The programs of ``slow`` have run out of time before, and run
        alone at once.

        Raises:
            RunError: the sandbox failed.
        """
        own = ThreadPoolExecutor(self.workers or cores()) if self.executor is None else None
        executor: Executor | None = self.executor or own
        assert executor is not None
        quiet = max(1, cores() // 8)
        alone = own is not None and (self.workers or cores()) <= quiet
        bound = self.in_flight or max(4 * cores(), 2 * (self.workers or 0))
        again = [*slow]
        try:
            first = execute if alone else execute_beside
            for name, task, outcome in _run_all(first, tasks, executor, bound):
                if outcome is None:
                    again.append((name, task))
                else:
                    yield name, outcome
            for name, _, outcome in _run_all(execute, again, executor, quiet):
                yield name, outcome
        except BaseException:
            if own is not None:  # Threads wait for their programs, up to minutes each.
                own.shutdown(wait=False, cancel_futures=True)
                supervise.kill_running()
            raise
        if own is not None:
            own.shutdown()


def _run_all(
    call: Callable[[Task], _T], tasks: Iterable[tuple[str, Task]], executor: Executor, bound: int
) -> Iterator[tuple[str, Task, _T]]:
    """Results of ``call`` as they come; ``bound`` tasks at most are in the executor."""
    waiting = iter(tasks)
    pending: dict[Future[_T], tuple[str, Task]] = {}
    try:
        while True:
            for name, task in islice(waiting, bound - len(pending)):
                pending[executor.submit(call, task)] = name, task
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield *pending.pop(future), future.result()
    finally:
        for future in pending:
            future.cancel()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Memory:
    """Outcomes by :meth:`Task.key`, in a journal that a killed run leaves readable.

    That a program ran out of time says as much of the machine as of the program. It is written down, but
    known again on the same kind of machine only, and only where the time was more than enough: ``slow``
    has the keys of other such programs.
    """

    def __init__(self, journal: Journal) -> None:
        """Reads what the journal has.

        Raises:
            InputError: a line that is no outcome.
        """
        self._journal = journal
        self._statuses: dict[str, str] = {}
        self.slow: set[str] = set()
        for number, raw in enumerate(journal.read(), 1):
            where = f"{journal.path}, line {number}"
            key, status = text(raw, "key", where), text(raw, "status", where)
            check_status(status, where)
            if status == TIMEOUT and raw.get("machine") != machine():
                self.slow.add(key)
            else:
                self._statuses[key] = status

    def __contains__(self, key: str) -> bool:
        return key in self._statuses

    def status(self, key: str) -> str:
        return self._statuses[key]

    def add(self, key: str, language: str, outcome: Outcome) -> None:
        self._statuses[key] = outcome.status
        raw: dict[str, Any] = {"key": key, "language": language, **asdict(outcome)}
        self._journal.append(raw)


Progress = Callable[[int, int], None]
"""Called with how many of how many programs are done."""
