"""Completes problems through a server with OpenAI's interface of completions."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from flora_jax.errors import InputError, RunError
from flora_jax.evaluate.completions import Generation, Sampling
from flora_jax.evaluate.problems import Problem

_MOST_STOPS = 4  # What OpenAI takes; more are cut off here, after the fact.
_TRIES = 4


@dataclass(frozen=True)
class Client:
    """``url`` ends where ``/completions`` begins; ``adapters`` are other models' names by language.

    ``at_once`` requests are under way, each for ``per_request`` samples at most; ``timeout`` is in
    seconds, for one of them.
    """

    url: str
    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    at_once: int = 16
    per_request: int = 20
    timeout: float = 600.0

    def __call__(self, problems: Sequence[Problem], sampling: Sampling) -> Iterator[Generation]:
        """Completes ``problems``; generations as they come.

        Raises:
            InputError: the server refuses a request.
            RunError: it does not answer, or not as it should.
        """
        executor = ThreadPoolExecutor(self.at_once)
        try:
            futures = [executor.submit(self._complete, problem, sampling) for problem in problems]
            for future in as_completed(futures):
                yield future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _complete(self, problem: Problem, sampling: Sampling) -> Generation:
        texts: list[str] = []
        while len(texts) < sampling.n_samples:
            count = min(self.per_request, sampling.n_samples - len(texts))
            answer = self._post(self._request(problem, sampling, count, len(texts)))
            try:
                got = [choice["text"] for choice in answer["choices"]]
            except (KeyError, TypeError):
                raise RunError(f"{self.url}: expected choices with text: {answer!r:.200}") from None
            if len(got) != count or not all(isinstance(text, str) for text in got):
                raise RunError(f"{self.url}: {len(got)} choices, expected {count} texts")
            texts += got
        return Generation.of(problem, texts)

    def _request(
        self, problem: Problem, sampling: Sampling, count: int, first: int
    ) -> dict[str, Any]:
        return {
            "model": self.adapters.get(problem.language, self.model),
            "prompt": problem.model_prompt,
            "n": count,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(problem.stop_tokens)[:_MOST_STOPS],
            # The same for the same place, whatever was done before a run was killed.
            "seed": sampling.seed_of(problem, first),
        }

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/completions", json.dumps(body).encode(), headers
        )
        trouble = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(2.0 ** (attempt - 2))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    trouble = f"{error.code} {error.read(500).decode('utf-8', 'replace')}"
                if error.code < 500 and error.code != 429:
                    raise InputError(f"{self.url}: {trouble}") from None
            except http.client.InvalidURL as error:
                raise InputError(f"--server is {self.url!r}: {error}") from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                trouble = str(error) or type(error).__name__
        raise RunError(f"{self.url}: no answer after {_TRIES} tries: {trouble}")
