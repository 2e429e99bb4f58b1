"""One evaluation: generations in, programs run, results and their summary out.

An output directory holds ``executions.jsonl`` (every distinct program's outcome, as they come),
and in the end ``results.jsonl``, ``summary.json`` and ``run.json`` (by what and within what the
programs ran). A run that was killed goes on from the outcomes that are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError
from flora_jax.evaluate import toolchains
from flora_jax.evaluate.completions import GENERATIONS, PARTIAL, SETTINGS, Generation
from flora_jax.evaluate.execution import Memory, Progress, Runner, Task, cores
from flora_jax.evaluate.languages import LANGUAGES, limits
from flora_jax.evaluate.results import RESULTS, RUN, Result, summarise
from flora_jax.files import directory_lock, entries, is_part, whole_file
from flora_jax.jsonl import Journal
from flora_jax.sandbox.sandbox import Sandbox

EXECUTIONS, SUMMARY = "executions.jsonl", "summary.json"
_OURS = {EXECUTIONS, RESULTS, SUMMARY, RUN, GENERATIONS, PARTIAL, SETTINGS}


@contextlib.contextmanager
def claim(output: Path) -> Iterator[Path]:
    """The directory of a run, made if it is not there, for this process alone until the end.

    Raises:
        InputError: another process uses it, it cannot be written to, or it holds something that no
            evaluation writes.
    """
    with directory_lock(output):
        strange = [
            path.name for path in entries(output) if path.name not in _OURS and not is_part(path)
        ]
        if strange:
            raise InputError(
                f"{output}: holds {strange[0]}, expected a new directory or that of an evaluation"
            )
        yield output


def evaluate(
    generations: Sequence[Generation],
    output: Path,
    runner: Runner,
    *,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    source: str = "",
    executions: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs every completion of ``generations`` and writes the results.

    Args:
        generations: one for each problem.
        output: a directory that the caller has claimed, see :func:`claim`.
        runner: where programs run, and how many at once.
        seed: of the bootstrap.
        progress: called after each program.
        source: where the generations came from, for the record.
        executions: the outcomes' file, ``executions.jsonl`` of ``output`` by default; evaluations that
            share one, in turn, run what they have in common once.

    Returns:
        The summary by language; see :func:`flora_jax.evaluate.results.summarise`.

    Raises:
        InputError: no sandbox, a missing toolchain, or a damaged file of outcomes.
        RunError: the sandbox failed in the middle.
    """
    started = time.monotonic()
    sandbox = runner.sandbox
    sandbox.check()
    languages = [key for key in LANGUAGES if any(one.language == key for one in generations)]
    found = toolchains.require(languages, sandbox)
    digest = _digest(generations)
    _forget_others(output, digest)
    with Journal(executions or output / EXECUTIONS) as journal:
        memory = Memory(journal)
        keys = [
            tuple(
                _task(one, index, found, sandbox).key(found[one.language].version)
                for index in range(len(one.completions))
            )
            for one in generations
        ]
        wanted = {key for row in keys for key in row}
        slow = wanted & memory.slow - {key for key in wanted if key in memory}
        before, total = sum(key in memory for key in wanted), len(wanted)
        done = before
        progress(done, total)
        new = _tasks(generations, keys, wanted - slow, memory, found, sandbox)
        for name, outcome in runner.run(
            new, _tasks(generations, keys, slow, memory, found, sandbox)
        ):
            language, key = name.split()
            memory.add(key, language, outcome)
            done += 1
            progress(done, total)
        results = [
            Result(one.name, one.language, tuple(map(memory.status, row)))
            for one, row in zip(generations, keys, strict=True)
        ]
        summary = summarise(results, seed)
        _write(output, results, summary, {
            "source": source,
            "generations_sha256": digest,
            "toolchains": {key: f"{one.path} {one.version}" for key, one in found.items()},
            "stop_tokens": _stop_tokens(generations),
            "seconds_allowed": {key: limits(one.toolchain) for key, one in found.items()},
            "sandbox": asdict(sandbox),
            "programs": total,
            "programs_run_before": before,
            "seconds": round(time.monotonic() - started, 3),
            "workers": (runner.workers or cores()) if runner.executor is None else None,
        })  # fmt: skip
    return summary


def _stop_tokens(generations: Sequence[Generation]) -> dict[str, list[list[str]]]:
    """By language the lists that its completions were cut by; in general one."""
    found: dict[str, list[list[str]]] = {}
    for one in generations:
        own = found.setdefault(one.language, [])
        if (stops := [*one.stop_tokens]) not in own:
            own.append(stops)
    return found


def _task(
    one: Generation, index: int, found: dict[str, toolchains.Found], sandbox: Sandbox
) -> Task:
    return Task(one.language, one.program(index), found[one.language].toolchain, sandbox)


def _tasks(
    generations: Sequence[Generation],
    keys: Sequence[Sequence[str]],
    chosen: set[str],
    memory: Memory,
    found: dict[str, toolchains.Found],
    sandbox: Sandbox,
) -> Iterator[tuple[str, Task]]:
    """A task for every distinct program of ``chosen`` without an outcome, made when it is asked for."""
    given: set[str] = set()
    for one, row in zip(generations, keys, strict=True):
        for index, key in enumerate(row):
            if key in chosen and key not in memory and key not in given:
                given.add(key)
                yield f"{one.language} {key}", _task(one, index, found, sandbox)


def _forget_others(output: Path, digest: str) -> None:
    """Removes the results of other generations, which a run that is killed would leave as its own."""
    try:
        known = json.loads((output / RUN).read_text(encoding="utf-8"))
        same = isinstance(known, dict) and known.get("generations_sha256") == digest
    except (OSError, ValueError):
        same = False
    if not same:
        for name in (SUMMARY, RESULTS, RUN):
            (output / name).unlink(missing_ok=True)


def _digest(generations: Iterable[Generation]) -> str:
    said = hashlib.sha256()
    for one in generations:
        said.update(json.dumps(one.to_dict()).encode() + b"\n")
    return said.hexdigest()


def _write(
    output: Path, results: Sequence[Result], summary: dict[str, Any], run: dict[str, Any]
) -> None:
    with whole_file(output / RESULTS) as file:
        for result in results:
            file.write(json.dumps(result.to_dict()) + "\n")
    for name, content in ((RUN, run), (SUMMARY, summary)):  # The summary last: it says all is done.
        with whole_file(output / name) as file:
            json.dump(content, file, indent=1)
            file.write("\n")
