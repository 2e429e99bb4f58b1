"""Completes problems with the engine: samples of all problems and adapters are one stream of requests.

Rows that end are filled from the stream at once, so that the batch stays full until the last few.
Samples are the same bits in any order and after any interruption: each has its own seed, and the
engine's shapes are fixed (``batch_invariant``), which costs little where the batch is full anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flora_jax.checkpoints import Opened, open_checkpoint
from flora_jax.errors import InputError, RunError
from flora_jax.evaluate.completions import Generation, Sampling
from flora_jax.evaluate.problems import Problem
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import run as run_requests
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Reader, Request, RequestError, SamplingParams

_STEP = 64  # The longest sequence is rounded up to it.


class Job(NamedTuple):
    """A problem under an adapter, by the engine's name for it; ``None`` is the base."""

    problem: Problem
    adapter: str | None = None


@dataclass
class _Open:
    """A job in the engine: its texts by sample, ``None`` where one still runs."""

    job: Job
    texts: list[str | None]


@dataclass(frozen=True)
class Local:
    """A model directory and how it is run. ``adapters`` are folders by language or by any name.

    ``problems`` are all that a run is about, whatever part of them is asked for: the lengths that the
    engine is made for follow from them. ``rows`` is how many samples run at once.
    """

    directory: Path
    problems: Sequence[Problem]
    adapters: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    rows: int = 16
    dtype: str | None = None
    quantize: Literal["int8", "int4"] | None = None

    def __call__(self, problems: Sequence[Problem], sampling: Sampling) -> Iterator[Generation]:
        """Completes ``problems``, each under its language's adapter; generations as they come.

        Raises:
            InputError: the model or an adapter cannot be loaded, or has no tokenizer.
            RunError: logits that are not finite.
        """
        named = [Job(p, p.language if p.language in self.adapters else None) for p in problems]
        return (one for _, one in self.stream(named, sampling))

    def stream(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[tuple[Job, Generation]]:
        """The same for any mix of problems and adapters."""
        with self._engine(sampling) as engine:
            yield from run(engine, jobs, sampling)

    def beyond(self) -> list[Problem]:
        """Those of ``problems`` whose prompt leaves no room for a token in the model's context."""
        opened, tokenizer = self._opened()
        return [p for p in self.problems if _length(tokenizer, p) >= opened.config.n_positions]

    def context(self, sampling: Sampling) -> int:
        """Positions of the longest sequence that the engine is made for."""
        opened, tokenizer = self._opened()
        longest = max(_length(tokenizer, problem) for problem in self.problems)
        return min(-(-(longest + sampling.max_tokens) // _STEP) * _STEP, opened.config.n_positions)

    def _opened(self) -> tuple[Opened, Any]:
        """The checkpoint and its tokenizer."""
        opened = open_checkpoint(self.directory)
        if opened.tokenizer is None:
            raise InputError(f"{self.directory}: no tokenizer.json, which problems are read with")
        return opened, opened.tokenizer

    def _engine(self, sampling: Sampling) -> Engine:
        opened, tokenizer = self._opened()
        options = EngineOptions(
            max_num_seqs=self.rows,
            max_model_len=self.context(sampling),
            batch_invariant=True,
        )
        model = opened.load(self.dtype, quantize=self.quantize)
        return Engine(model, self.adapters, tokenizer=tokenizer, options=options)


def run(
    engine: Engine, jobs: Iterable[Job], sampling: Sampling
) -> Iterator[tuple[Job, Generation]]:
    """Feeds an engine that has nothing else to do; each job's generation as soon as it is whole.

    A prompt that leaves no room for a token in the engine's context has empty completions.

    Raises:
        InputError: an adapter that the engine does not know.
        RunError: a sample failed (logits that are not finite).
    """
    opened: dict[int, tuple[_Open, int]] = {}
    beyond: list[Job] = []

    def requests() -> Iterator[Request]:
        number = 0
        for one, sample, request in _samples(engine, jobs, sampling):
            if request is None:
                beyond.append(one.job)
                continue
            opened[number] = one, sample
            number += 1
            yield request

    def empty() -> Iterator[tuple[Job, Generation]]:
        while beyond:
            job = beyond.pop()
            yield job, _generation(_Open(job, [""] * sampling.n_samples))

    # Enough for every row to be filled again in one iteration.
    for update in run_requests(engine, requests(), 2 * engine.options.max_num_seqs):
        assert update.index is not None
        if update.error is not None:
            problem = opened[update.index][0].job.problem
            raise RunError(f"{problem.name} in {problem.language}: {update.error}")
        if update.completion is not None:
            one, sample = opened.pop(update.index)
            one.texts[sample] = update.completion.text
            if None not in one.texts:
                yield one.job, _generation(one)
        yield from empty()
    yield from empty()


def _samples(
    engine: Engine, jobs: Iterable[Job], sampling: Sampling
) -> Iterator[tuple[_Open, int, Request | None]]:
    """Every sample's request, or a job without requests where its prompt does not fit."""
    params = SamplingParams(
        max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p
    )
    reader = Reader(engine.limits, frozenset(engine.adapters), params)
    longest = engine.max_model_len
    for job in jobs:
        problem = job.problem
        if _length(engine.tokenizer, problem) >= longest:
            yield _Open(job, [""] * sampling.n_samples), 0, None
            continue
        raw = {
            "prompt": problem.model_prompt, "adapter": job.adapter, "stop": [*problem.stop_tokens]
        }  # fmt: skip
        try:
            request = reader.request(raw)
        except RequestError as error:
            raise InputError(f"{problem.name} in {problem.language}: {error}") from None
        one = _Open(job, [None] * sampling.n_samples)
        for sample in range(sampling.n_samples):
            seed = sampling.seed_of(problem, sample)
            params = dataclasses.replace(request.sampling_params, seed=seed)
            yield one, sample, dataclasses.replace(request, sampling_params=params, request_id=None)


def _generation(one: _Open) -> Generation:
    return Generation.of(one.job.problem, [text or "" for text in one.texts])


def _length(tokenizer: Any, problem: Problem) -> int:
    return len(tokenizer.encode(problem.model_prompt).ids)
