"""From problems to generations, whoever completes them; a run that was killed goes on.

A completer is a function, see :class:`Complete`. Knows nothing of models, adapters and servers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flora_jax.errors import InputError, RunError
from flora_jax.evaluate.generations import Generation, parse, read_generations
from flora_jax.evaluate.jsonl import Journal
from flora_jax.evaluate.problems import Problem
from flora_jax.files import whole_file

GENERATIONS, PARTIAL, SETTINGS = (
    "generations.jsonl",
    "generations.partial.jsonl",
    "generation.json",
)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; MultiPL-E's values. ``max_tokens`` are new tokens.

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


class Complete(Protocol):
    """Completes problems in any order, all of a problem's samples at once.

    It gives ``model_prompt`` to a model and makes what comes back a generation with
    :meth:`Generation.of`, which cuts it.
    """

    def __call__(self, problems: Sequence[Problem], sampling: Sampling) -> Iterator[Generation]: ...


def complete_all(
    problems: Sequence[Problem],
    complete: Complete,
    sampling: Sampling,
    output: Path,
    *,
    source: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Generation]:
    """Completes the problems that ``output`` has no generation for yet, and writes them there.

    ``generations.partial.jsonl`` has them as they come, ``generations.jsonl`` in the order of
    ``problems`` once all are there, ``generation.json`` how they were made.

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
    _same_settings(output, {**source, **dataclasses.asdict(sampling)})
    known = {_key(problem): problem for problem in problems}
    with Journal(output / PARTIAL) as journal:
        done = [parse(raw, str(journal.path)) for raw in journal.read()]
        if (output / GENERATIONS).is_file():
            done += read_generations(output / GENERATIONS)
        found = {(one.language, one.name): one for one in done}
        for key, one in found.items():
            problem = known.get(key)
            if problem and (problem.prompt, problem.tests) != (one.prompt, one.tests):
                raise InputError(f"{output}: {key[1]} in {key[0]} was generated for another prompt")
        missing = [problem for key, problem in known.items() if key not in found]
        progress(len(known) - len(missing), len(known))
        for one in complete(missing, sampling) if missing else ():
            journal.append(one.to_dict())
            found[one.language, one.name] = one
            progress(sum(key in found for key in known), len(known))
        left = [key for key in known if key not in found]
        if left:
            raise RunError(f"{left[0][1]} in {left[0][0]} was not completed, of {len(left)}")
        # Generations of languages that this call does not ask for stay.
        rest = [one for key, one in found.items() if key not in known]
        with whole_file(output / GENERATIONS) as file:
            for one in [*(found[key] for key in known), *rest]:
                file.write(json.dumps(one.to_dict()) + "\n")
        journal.path.unlink()
    return [found[key] for key in known]


def _key(problem: Problem) -> tuple[str, str]:
    return problem.language, problem.name


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
