"""The last requests and tokens, for people who look at a server now. Without HTTP."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import NamedTuple

from flora_jax.serve.http.runner import Outcome, Timing
from flora_jax.serve.request import Request


class Finished(NamedTuple):
    """One request that has ended; times in seconds, ``ended_s`` by the clock of :class:`Recent`."""

    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    queued_s: float | None
    time_to_first_token_s: float | None
    time_per_output_token_s: float | None
    latency_s: float
    outcome: Outcome
    ended_s: float


class Recent:
    """An :class:`~flora_jax.serve.http.runner.Observer` that remembers a little.

    Args:
        requests: that are remembered.
        window_s: whole seconds whose tokens are.
        now: the clock, in seconds.
    """

    def __init__(
        self, requests: int = 256, window_s: int = 60, now: Callable[[], float] = time.monotonic
    ):
        self.requests: collections.deque[Finished] = collections.deque(maxlen=requests)
        self.now = now
        self._window_s = window_s
        # Seconds of the clock in which there were tokens, with their number; the last one goes on.
        self._tokens: collections.deque[tuple[int, int]] = collections.deque(maxlen=window_s + 1)

    def history(self) -> list[int]:
        """Tokens drawn in each of the last whole seconds, the oldest first."""
        now, counts = int(self.now()), dict(self._tokens)
        return [counts.get(second, 0) for second in range(now - self._window_s, now)]

    def tokens_per_s(self, seconds: int = 5) -> float:
        """Tokens drawn per second over so many of the last whole seconds."""
        return sum(self.history()[-seconds:]) / seconds

    def arrived(self, timing: Timing) -> None:
        pass

    def refused(self, request: Request) -> None:
        pass

    def began(self, timing: Timing) -> None:
        pass

    def progressed(self, timing: Timing, tokens: int, gap_s: float) -> None:
        now, before = int(self.now()), 0
        if self._tokens and self._tokens[-1][0] == now:
            _, before = self._tokens.pop()
        self._tokens.append((now, before + tokens))

    def ended(self, timing: Timing, outcome: Outcome, seconds: float) -> None:
        self.requests.append(
            Finished(
                timing.request.adapter, len(timing.request.prompt_token_ids), timing.tokens,
                timing.queued_s, timing.time_to_first_token_s, timing.time_per_output_token_s,
                seconds, outcome, self.now(),
            )
        )  # fmt: skip
