"""What a model wrote for each problem, as lines of JSON, and in the layout of another harness.

Knows nothing of models, nor of how programs are run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError
from flora_jax.evaluate.languages import LANGUAGES
from flora_jax.evaluate.problems import Problem
from flora_jax.files import whole_directory
from flora_jax.jsonl import read_objects, text, texts


@dataclass(frozen=True)
class Generation:
    """All completions of one problem; each is already cut at the problem's stop tokens."""

    name: str
    language: str
    prompt: str
    tests: str
    stop_tokens: tuple[str, ...]
    completions: tuple[str, ...]

    @staticmethod
    def of(problem: Problem, texts: Sequence[str]) -> Generation:
        """A problem with what a model wrote after its prompt, cut as MultiPL-E does."""
        cut = tuple(truncate(text, problem.stop_tokens) for text in texts)
        return Generation(
            problem.name, problem.language, problem.prompt, problem.tests, problem.stop_tokens, cut
        )

    def program(self, index: int) -> str:
        """The program of one completion."""
        return f"{self.prompt}{self.completions[index]}\n{self.tests}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def truncate(text: str, stop_tokens: Iterable[str]) -> str:
    """``text`` (without the prompt) up to the first place where any of ``stop_tokens`` begins."""
    return text[: min((at for stop in stop_tokens if (at := text.find(stop)) >= 0), default=None)]


def parse(raw: dict[str, Any], where: str) -> Generation:
    """One line of a file.

    Raises:
        InputError: a field is missing or wrong, or the language unknown.
    """
    language = text(raw, "language", where)
    if language not in LANGUAGES:
        raise InputError(
            f"{where}: language is {language!r}, expected one of {', '.join(LANGUAGES)}"
        )
    name, prompt, tests = (text(raw, field, where) for field in ("name", "prompt", "tests"))
    # Only who generates needs them; other harnesses leave them out.
    stop_tokens = texts(raw, "stop_tokens", where) if "stop_tokens" in raw else ()
    completions = texts(raw, "completions", where)
    if not completions:
        raise InputError(f"{where}: completions is empty, expected at least one")
    return Generation(name, language, prompt, tests, stop_tokens, completions)


def read_generations(path: Path, languages: Iterable[str] | None = None) -> list[Generation]:
    """The lines of a file, of some ``languages`` if given, in their order.

    Raises:
        InputError: no such file, a line that is no generation, a problem given twice, or nothing.
    """
    chosen = None if languages is None else set(languages)
    found: dict[tuple[str, str], Generation] = {}
    places: dict[tuple[str, str], str] = {}
    for where, raw in read_objects(path):
        generation = parse(raw, where)
        key = generation.language, generation.name
        if key in places:
            raise InputError(
                f"{where}: {key[1]} in {key[0]} is given twice, first at {places[key]}"
            )
        places[key] = where
        if chosen is None or generation.language in chosen:
            found[key] = generation
    if not found:
        of = "" if chosen is None else f" in {', '.join(sorted(chosen))}"
        raise InputError(f"{path}: no generations{of}")
    return list(found.values())


def export_bigcode(generations: Iterable[Generation], directory: Path) -> list[Path]:
    """Writes what bigcode-evaluation-harness reads with ``--load_generations_path``.

    A file ``generations_multiple-LANGUAGE.json`` each: of every problem, in order, the list of
    prompts with their completions. The harness takes problems by their place, so that the
    generations have to be those of the first problems of its data set, in its order.

    Raises:
        InputError: ``directory`` is there and not empty.
    """
    by_language: dict[str, list[list[str]]] = {}
    for one in generations:
        texts = [one.prompt + completion for completion in one.completions]
        by_language.setdefault(one.language, []).append(texts)
    with whole_directory(directory) as part:
        for language, texts_of_problems in by_language.items():
            with (part / _bigcode_name(language)).open("w", encoding="utf-8") as file:
                json.dump(texts_of_problems, file)
    return [directory / _bigcode_name(language) for language in by_language]


def _bigcode_name(language: str) -> str:
    return f"generations_multiple-{language}.json"
