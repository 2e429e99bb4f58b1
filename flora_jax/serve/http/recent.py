"""The last requests and tokens, for people who look at a server now. Without HTTP."""

from __future__ import annotations

import collections
import time
from typing import NamedTuple

from flora_jax.serve.http.runner import Outcome, Timing
from flora_jax.serve.request import Request


class Finished(NamedTuple):
    """One request that has ended; times in seconds, ``ended_s`` by ``time.time``."""

    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    time_to_first_token_s: float | None
    time_per_output_token_s: float | None
    latency_s: float
    outcome: Outcome
    ended_s: float


class Recent:
    """An :class:`~flora_jax.serve.http.runner.Observer` that remembers a little.

    Args:
        requests: that are remembered.
        window_s: of the rate of tokens.
    """

    def __init__(self, requests: int = 256, window_s: int = 10):
        self.requests: collections.deque[Finished] = collections.deque(maxlen=requests)
        self.refused_requests = 0
        self._window_s = window_s
        # Tokens by second of time.monotonic.
        self._tokens: collections.Counter[int] = collections.Counter()

    def tokens_per_s(self) -> float:
        """Tokens drawn per second over the last whole seconds."""
        now = int(time.monotonic())
        return (
            sum(self._tokens[now - back] for back in range(1, self._window_s + 1)) / self._window_s
        )

    def arrived(self, timing: Timing) -> None:
        pass

    def refused(self, request: Request) -> None:
        self.refused_requests += 1

    def began(self, timing: Timing) -> None:
        pass

    def progressed(self, timing: Timing, tokens: int, gap_s: float) -> None:
        now = int(time.monotonic())
        if now not in self._tokens:
            for second in [s for s in self._tokens if s < now - self._window_s]:
                del self._tokens[second]
        self._tokens[now] += tokens

    def ended(self, timing: Timing, outcome: Outcome, seconds: float) -> None:
        self.requests.append(
            Finished(
                timing.request.adapter, len(timing.request.prompt_token_ids), timing.tokens,
                timing.time_to_first_token_s, timing.time_per_output_token_s, seconds, outcome,
                time.time(),
            )
        )  # fmt: skip
