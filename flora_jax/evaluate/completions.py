"""What models wrote for each problem: as files, in another harness's layout, and made anew.

A completer is a function, see :class:`Complete`; a run that was killed goes on. Knows nothing of models,
adapters and servers, nor of how programs are run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flora_jax.errors import InputError, RunError
from flora_jax.evaluate.languages import LANGUAGES
from flora_jax.evaluate.problems import Problem
from flora_jax.files import whole_directory, whole_file
from flora_jax.jsonl import Journal, read_objects, text, texts

GENERATIONS, PARTIAL, SETTINGS = (
    "generations.jsonl",
    "generations.partial.jsonl",
    "generation.json",
)


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


def export_bigcode(
    generations: Iterable[Generation], directory: Path, overwrite: bool = False
) -> list[Path]:
    """Writes what bigcode-evaluation-harness reads with ``--load_generations_path``.

    A file ``generations_multiple-LANGUAGE.json`` each: of every problem, in order, the list of
    prompts with their completions. The harness takes problems by their place, so that the
    generations have to be those of the first problems of its data set, in its order.

    Raises:
        InputError: ``directory`` is there and not empty; with ``overwrite``, only if it holds anything
            but an older export.
    """
    by_language: dict[str, list[list[str]]] = {}
    for one in generations:
        texts = [one.prompt + completion for completion in one.completions]
        by_language.setdefault(one.language, []).append(texts)
    with whole_directory(directory, (_bigcode_name("*"),) if overwrite else ()) as part:
        for language, texts_of_problems in by_language.items():
            with (part / _bigcode_name(language)).open("w", encoding="utf-8") as file:
                json.dump(texts_of_problems, file)
    return [directory / _bigcode_name(language) for language in by_language]


def _bigcode_name(language: str) -> str:
    return f"generations_multiple-{language}.json"


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; the defaults are MultiPL-E's. ``max_tokens`` are new tokens.

    Raises:
        InputError: a value out of its range.
    """

    n_samples: int = 100
    temperature: float = 0.1
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n_samples", 1), ("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {getattr(self, name)}, expected {least} or more")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p}, expected above 0, at most 1")

    def seed_of(self, problem: Problem, sample: int) -> int:
        """The sample's own seed, below 2^31: the same in any order, and after any interruption.

        It does not depend on who completes: models and adapters that agree draw the same tokens, and
        are compared with less noise where they nearly do.
        """
        place = f"{self.seed}/{problem.language}/{problem.name}/{sample}"
        return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4]) >> 1


class Complete(Protocol):
    """Completes problems in any order, all of a problem's samples at once.

    It gives ``model_prompt`` to a model and makes what comes back a generation with
    :meth:`Generation.of`, which cuts it.
    """

    def __call__(self, problems: Sequence[Problem], sampling: Sampling) -> Iterator[Generation]: ...


class Store:
    """The generations of one directory: those that are there, and those that still come.

    ``generations.partial.jsonl`` has them as they come, ``generations.jsonl`` in the order of
    ``problems`` once all are there, ``generation.json`` how they were made.
    """

    def __init__(self, problems: Sequence[Problem], output: Path, settings: Mapping[str, Any]):
        """Opens an existing directory.

        Args:
            problems: all that the directory is to have generations of.
            output: the directory, which the caller keeps to itself (``directory_lock``).
            settings: what decides the completions.

        Raises:
            InputError: it has generations made in another way or of other problems.
        """
        self.output = output
        self._known = {(problem.language, problem.name): problem for problem in problems}
        self._journal = Journal(output / PARTIAL)
        try:
            _same_settings(output, settings)
            done = [
                parse(raw, f"{self._journal.path}, line {number}")
                for number, raw in enumerate(self._journal.read(), 1)
            ]
            if (output / GENERATIONS).is_file():
                done += read_generations(output / GENERATIONS)
            self._found = {(one.language, one.name): one for one in done}
            for key, one in self._found.items():
                problem = self._known.get(key)
                if problem is not None:
                    _check_same(problem, one, output)
        except BaseException:
            self._journal.close()
            raise

    @property
    def missing(self) -> list[Problem]:
        return [problem for key, problem in self._known.items() if key not in self._found]

    @property
    def total(self) -> int:
        return len(self._known)

    def add(self, generation: Generation) -> None:
        self._journal.append(generation.to_dict())
        self._found[generation.language, generation.name] = generation

    def finish(self) -> list[Generation]:
        """Writes all in order, those of languages that this run does not ask for behind.

        Raises:
            RunError: some are missing.
        """
        if left := self.missing:
            raise RunError(
                f"{left[0].name} in {left[0].language} was not completed, of {len(left)}"
            )
        rest = [one for key, one in self._found.items() if key not in self._known]
        own = [self._found[key] for key in self._known]
        with whole_file(self.output / GENERATIONS) as file:
            for one in [*own, *rest]:
                file.write(json.dumps(one.to_dict()) + "\n")
        self._journal.path.unlink()
        return own

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def complete_all(
    problems: Sequence[Problem],
    complete: Complete,
    sampling: Sampling,
    output: Path,
    *,
    source: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Generation]:
    """Completes the problems that ``output`` has no generation for yet; see :class:`Store`.

    Args:
        problems: what to complete.
        complete: asked only for what is missing.
        sampling: for ``complete``.
        output: an existing directory, see :class:`Store`.
        source: what else decides the completions (model, adapters), for the record.
        progress: called with how many of how many problems are done.

    Raises:
        InputError: ``output`` has generations made in another way or of other problems.
        RunError: ``complete`` left problems out.
    """
    with Store(problems, output, {**source, **dataclasses.asdict(sampling)}) as store:
        missing = store.missing
        done = store.total - len(missing)
        progress(done, store.total)
        for one in complete(missing, sampling) if missing else ():
            store.add(one)
            done += 1
            progress(done, store.total)
        return store.finish()


def _check_same(problem: Problem, one: Generation, output: Path) -> None:
    """What was generated is of this problem, and cut where it would be cut now."""
    for field in ("prompt", "tests", "stop_tokens"):
        had, wanted = getattr(one, field), getattr(problem, field)
        if had != wanted:
            raise InputError(
                f"{output}: {one.name} in {one.language} was generated with another {field}, "
                f"{had!r:.80}, expected {wanted!r:.80}"
            )


def _same_settings(output: Path, settings: Mapping[str, Any]) -> None:
    path = output / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        with whole_file(path) as file:
            json.dump(wanted, file, indent=1)
            file.write("\n")
        return
    had = json.loads(path.read_text(encoding="utf-8"))
    # Where the content is known, it does not matter by which path it was found.
    named = {"model"} if "model_sha256" in wanted else set()
    for name in [name for name in {**had, **wanted} if name not in named]:
        if had.get(name) != wanted.get(name):
            raise InputError(
                f"{path}: generated with {name} {had.get(name)!r}, now {wanted.get(name)!r}"
            )
