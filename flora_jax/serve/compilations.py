"""Counts the programs that XLA builds or fetches from its cache in this process."""

from __future__ import annotations

from typing import Any

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_total = 0


def _listen(event: str, duration_secs: float, **kwargs: Any) -> None:
    global _total
    _total += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


class Compilations:
    """How many programs were compiled since this counter was made or last reset, by whomever."""

    def __init__(self) -> None:
        self._before = _total

    @property
    def count(self) -> int:
        return _total - self._before

    def reset(self) -> None:
        self._before = _total
