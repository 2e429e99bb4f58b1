"""Runs programs by the table of languages, each distinct one once, and remembers the outcomes.

Knows nothing of problems and models: a program is a text in a language, its outcome a status.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from flora_jax.evaluate.languages import (
    ARTEFACT,
    EXCEPTION,
    LANGUAGES,
    MEMORY_LIMIT,
    OK,
    OUTPUT_LIMIT,
    SYNTAX_ERROR,
    TIMEOUT,
    Toolchain,
)
from flora_jax.jsonl import Journal
from flora_jax.sandbox import supervise
from flora_jax.sandbox.sandbox import Sandbox

_ENDINGS = {"timeout": TIMEOUT, "output": OUTPUT_LIMIT, "memory": MEMORY_LIMIT}
_TAIL = 500  # Characters of an error message that are kept.


@dataclass(frozen=True)
class Task:
    """A program and all that running it takes; it can be sent to another process."""

    language: str
    program: str
    toolchain: Toolchain
    sandbox: Sandbox

    def key(self, version: str) -> str:
        """Names what decides the outcome: the program, and by what and within what it runs."""
        said = _setting(self.language, self.toolchain, version, self.sandbox).copy()
        said.update(_bytes(self.program))
        return said.hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """``status`` is a class of the table; ``seconds`` of wall time over all steps."""

    status: str
    exit_code: int
    seconds: float
    stderr: str


def execute(task: Task) -> Outcome:
    """Runs the steps of one program up to the first that fails.

    Raises:
        RunError: the sandbox itself failed.
    """
    language = LANGUAGES[task.language]
    files = {language.file: _bytes(task.program)}
    seconds = 0.0
    *builds, last = task.toolchain.steps
    for step in builds:
        ran, content = task.sandbox.run(
            step.command, files, step.seconds, ARTEFACT if step.keeps else None
        )
        seconds += ran.seconds
        if ran.ending != "exited" or ran.exit_code != 0:
            status = _ENDINGS.get(ran.ending, SYNTAX_ERROR)
            return Outcome(status, ran.exit_code, seconds, _tail(ran))
        files = {ARTEFACT: content} if step.keeps else files
    ran, _ = task.sandbox.run(last.command, files, last.seconds)
    seconds += ran.seconds
    if ran.ending != "exited":
        status = _ENDINGS[ran.ending]
    elif language.passes(ran.exit_code, ran.stdout, ran.stderr):
        status = OK
    else:
        found = language.syntax is not None and language.syntax.search(ran.stderr)
        status = SYNTAX_ERROR if found else EXCEPTION
    return Outcome(status, ran.exit_code, seconds, "" if status == OK else _tail(ran))


@functools.lru_cache
def _setting(language: str, toolchain: Toolchain, version: str, sandbox: Sandbox) -> Any:
    setting = [language, asdict(toolchain), version, asdict(sandbox)]
    return hashlib.sha256(json.dumps(setting).encode())


def _bytes(program: str) -> bytes:
    # A half of a pair, which JSON may hold, becomes bytes that no compiler takes for a text.
    return program.encode("utf-8", "surrogatepass")


def _tail(ran: supervise.Ran) -> str:
    return (ran.stderr.strip() or ran.stdout.strip())[-_TAIL:]


def run_all(
    tasks: Mapping[str, Task] | Iterable[tuple[str, Task]],
    executor: Executor,
    in_flight: int | None = None,
) -> Iterator[tuple[str, Outcome]]:
    """Runs tasks by name on any executor of ``concurrent.futures``; outcomes as they come.

    ``in_flight`` tasks at most, by default four for each core, wait in the executor.

    Raises:
        RunError: the sandbox failed.
    """
    items = tasks.items() if isinstance(tasks, Mapping) else tasks
    waiting = iter(items)
    bound = in_flight or 4 * cores()
    pending: dict[Future[Outcome], str] = {}
    try:
        while True:
            for name, task in islice(waiting, bound - len(pending)):
                pending[executor.submit(execute, task)] = name
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
    finally:
        for future in pending:
            future.cancel()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Memory:
    """Outcomes by :meth:`Task.key`, in a journal that a killed run leaves readable."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._statuses: dict[str, str] = {
            raw["key"]: raw["status"] for raw in journal.read() if {"key", "status"} <= raw.keys()
        }

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
