"""MultiPL-E's problems, from a directory or the hub. Knows nothing of models and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError
from flora_jax.evaluate.languages import LANGUAGES
from flora_jax.jsonl import read_objects, text, texts

DATASET = "nuprl/MultiPL-E"
STOP_TOKENS = ("given", "current")


@dataclass(frozen=True)
class Problem:
    """``prompt`` is what a program starts with; ``language`` is a key of the table of languages."""

    name: str
    language: str
    prompt: str
    tests: str
    stop_tokens: tuple[str, ...]

    @property
    def model_prompt(self) -> str:
        """What a model continues: MultiPL-E strips it, so that no token ends in loose white space."""
        return self.prompt.strip()


def read_problems(source: str, languages: Iterable[str]) -> list[Problem]:
    """The problems of ``humaneval-LANGUAGE.jsonl`` in a directory, or of the hub for ``hub``.

    Raises:
        InputError: a file is missing or malformed, or the hub is out of reach.
    """
    problems: list[Problem] = []
    for language in languages:
        if source == "hub":
            problems += _from_hub(language)
        else:
            problems += _from_file(Path(source, f"humaneval-{language}.jsonl"), language)
    return problems


def first(problems: Iterable[Problem], limit: int | None) -> list[Problem]:
    """The first ``limit`` problems of every language, or all."""
    count: Counter[str] = Counter()
    chosen = []
    for problem in problems:
        count[problem.language] += 1
        if limit is None or count[problem.language] <= limit:
            chosen.append(problem)
    return chosen


def with_stop_tokens(problems: Iterable[Problem], which: str) -> list[Problem]:
    """The problems with their own stop tokens, or those of the data set's current release.

    A release may withdraw some, as 3.3 does the blank line that ended Lua's bodies; files of older ones,
    and figures that were published with them, have them still.

    Raises:
        InputError: ``which`` is none of ``STOP_TOKENS``.
    """
    if which not in STOP_TOKENS:
        raise InputError(f"stop tokens are {which!r}, expected one of {', '.join(STOP_TOKENS)}")
    if which == "given":
        return list(problems)
    return [
        replace(one, stop_tokens=tuple(
            stop for stop in one.stop_tokens if stop not in LANGUAGES[one.language].withdrawn_stops
        ))
        for one in problems
    ]  # fmt: skip


def _from_file(path: Path, language: str) -> list[Problem]:
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such directory, expected one with {path.name}, or hub")
    problems = [_parse(raw, where, language) for where, raw in read_objects(path)]
    if not problems:
        raise InputError(f"{path}: no problems")
    names = [problem.name for problem in problems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: {twice[0]} is given twice")
    return problems


def _from_hub(language: str) -> list[Problem]:
    import datasets

    where = f"{DATASET}, humaneval-{language}"
    try:
        rows = datasets.load_dataset(DATASET, f"humaneval-{language}", split="test")
    except Exception as error:  # The clients of the hub raise whatever their transports do.
        raise InputError(f"{where}: cannot be loaded from the hub: {error}") from None
    return [_parse(dict(row), f"{where}, row {i}", language) for i, row in enumerate(rows)]


def _parse(raw: dict[str, Any], where: str, language: str) -> Problem:
    if raw.get("language", language) != language:
        raise InputError(f"{where}: language is {raw['language']!r}, expected {language!r}")
    prompt, tests, name = (text(raw, field, where) for field in ("prompt", "tests", "name"))
    return Problem(name, language, prompt, tests, texts(raw, "stop_tokens", where))
