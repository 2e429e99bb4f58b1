"""From problems to generations, whoever completes them; a run that was killed goes on.

A completer is a function, see :class:`Complete`. Knows nothing of models, adapters and servers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flora_jax.errors import InputError, RunError
from flora_jax.evaluate.generations import Generation, parse, read_generations
from flora_jax.evaluate.problems import Problem
from flora_jax.files import whole_file
from flora_jax.jsonl import Journal

GENERATIONS, PARTIAL, SETTINGS = (
    "generations.jsonl",
    "generations.partial.jsonl",
    "generation.json",
)


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
            output: the directory.
            settings: what decides the completions.

        Raises:
            InputError: it has generations made in another way or of other problems, or another
                process is writing to it.
        """
        self.output = output
        _same_settings(output, settings)
        self._known = {(problem.language, problem.name): problem for problem in problems}
        self._journal = Journal(output / PARTIAL)
        try:
            done = [parse(raw, str(self._journal.path)) for raw in self._journal.read()]
            if (output / GENERATIONS).is_file():
                done += read_generations(output / GENERATIONS)
            self._found = {(one.language, one.name): one for one in done}
            for key, one in self._found.items():
                problem = self._known.get(key)
                if problem and (problem.prompt, problem.tests) != (one.prompt, one.tests):
                    raise InputError(
                        f"{output}: {key[1]} in {key[0]} was generated for another prompt"
                    )
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
        output: an existing directory.
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


def _same_settings(output: Path, settings: Mapping[str, Any]) -> None:
    path = output / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        with whole_file(path) as file:
            json.dump(wanted, file, indent=1)
            file.write("\n")
        return
    had = json.loads(path.read_text(encoding="utf-8"))
    for name in {**had, **wanted}:
        if had.get(name) != wanted.get(name):
            raise InputError(
                f"{path}: generated with {name} {had.get(name)!r}, now {wanted.get(name)!r}"
            )
