"""What an engine tells its caller: how requests went on, and how full it is. Without JAX."""

from __future__ import annotations

import dataclasses

from flora_jax.serve.request import Completion


@dataclasses.dataclass(frozen=True)
class Update:
    """What an iteration brought one request: new tokens, its end, or the reason why it failed."""

    ticket: int
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counters since the start, and how full the engine is now; ``cache_usage`` is 0 to 1."""

    running: int
    waiting: int
    preemptions: int
    adapter_loads: int
    adapter_evictions: int
    cache_usage: float
