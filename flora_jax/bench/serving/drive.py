"""Drives an engine with a workload, in real time, and measures what its users would see.

One thread does both: requests are handed over between iterations, as soon as their time has come, and
nothing sleeps while the engine has work. A request's time runs from the moment at which it should have
arrived, even where an iteration was still going on then.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from flora_jax.bench.serving.latency_metrics import (
    METRICS,
    PERCENTILES,
    Record,
    latency,
    throughput,
)
from flora_jax.errors import InputError, RunError
from flora_jax.serve.request import Request, RequestId


class Steppable(Protocol):
    """What is asked of an engine; :class:`flora_jax.serve.engine.Engine` is one."""

    def add(self, request: Request, /) -> RequestId: ...

    def wait(self, timeout: float | None = None, /) -> bool: ...

    def step(self) -> Sequence[Any]: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def stats(self) -> Any: ...


class Clock(NamedTuple):
    """Seconds since some time, and a way to let seconds pass; real ones by default."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()


class MetricOptions(NamedTuple):
    """What latencies are summed up to: percentiles, bounds in milliseconds of a good request, and of
    which metrics.
    """

    percentiles: Sequence[float] = PERCENTILES
    goodput_ms: Mapping[str, float] | None = None
    metrics: Sequence[str] = METRICS


ALL = MetricOptions()


class Driven(NamedTuple):
    """What happened to every request, in their order; how long all took; iterations of the engine, 0
    where they are not seen.
    """

    records: list[Record]
    duration_s: float
    iterations: int = 0


class _Waiting(NamedTuple):
    request: Request
    record: Record


def drive(
    engine: Steppable,
    requests: Sequence[Request],
    arrivals_s: Sequence[float],
    *,
    clock: Clock = CLOCK,
    max_concurrency: int | None = None,
    one_adapter_at_a_time: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> Driven:
    """Runs a workload through an engine that has nothing else to do.

    Args:
        engine: warmed up.
        requests: in the order of arrival.
        arrivals_s: when each arrives, seconds from the beginning, ascending.
        clock: tells the time, and sleeps only while there is nothing to run.
        max_concurrency: requests in the engine at most. As in vLLM the time of a request that had to
            wait for this runs from when another one's end made room for it.
        one_adapter_at_a_time: the engine gets the requests of one adapter, all that have arrived by
            then, and nothing else until they have ended; the oldest request is whose turn it is. Their
            time runs from their arrival.
        on_end: called for every request that ends.

    Raises:
        RunError: the engine has nothing to do while requests have not ended.
    """
    records: list[Record] = []
    waiting: list[_Waiting] = []
    running: dict[RequestId, _Waiting] = {}
    # When each free place in the engine became free: who arrived before that had to wait for it.
    free_s = [0.0] * (max_concurrency or len(requests))
    iterations = 0
    began = clock.now()
    last_s = 0.0
    while len(records) < len(requests) or waiting or running:
        now_s = clock.now() - began
        while len(records) < len(requests) and arrivals_s[len(records)] <= now_s:
            request = requests[len(records)]
            record = Record(len(records), len(request.prompt_token_ids), arrivals_s[len(records)])
            records.append(record)
            waiting.append(_Waiting(request, record))
        for entry in _let_in(waiting, running, max_concurrency, one_adapter_at_a_time):
            place_s = heapq.heappop(free_s)
            if max_concurrency is not None:
                entry.record.start_s = max(entry.record.start_s, place_s)
            try:
                running[engine.add(entry.request)] = entry
            except InputError as error:
                end_record(entry.record, entry.request, now_s, str(error))
                heapq.heappush(free_s, place_s)
                on_end()
        if not running:
            if not waiting and len(records) < len(requests):
                clock.sleep(max(0.0, arrivals_s[len(records)] - (clock.now() - began)))
            continue
        if not engine.has_work:
            raise RunError(
                f"the engine has nothing to do, but {len(running)} requests have not ended"
            )
        left_s = None
        if len(records) < len(requests):
            left_s = max(0.0, arrivals_s[len(records)] - (clock.now() - began))
        if not engine.wait(left_s):
            continue  # A request arrives while adapters are being read.
        updates = engine.step()
        iterations += 1
        now_s = clock.now() - began
        for update in updates:
            entry = running[update.request_id]
            if update.token_ids:
                entry.record.arrived.append((now_s, len(update.token_ids)))
            if update.error is not None or update.completion is not None:
                del running[update.request_id]
                end_record(entry.record, entry.request, now_s, update.error)
                heapq.heappush(free_s, now_s)
                last_s = now_s
                on_end()
    return Driven(records, last_s, iterations)


def _let_in(
    waiting: list[_Waiting],
    running: Mapping[RequestId, _Waiting],
    max_concurrency: int | None,
    one_adapter_at_a_time: bool,
) -> list[_Waiting]:
    """Takes those out of ``waiting`` that may enter now."""
    chosen = waiting
    if one_adapter_at_a_time and waiting:
        turn = waiting[0].request.adapter
        chosen = [] if running else [e for e in waiting if e.request.adapter == turn]
    if max_concurrency is not None:
        chosen = chosen[: max_concurrency - len(running)]
    chosen = list(chosen)
    entering = {id(entry) for entry in chosen}
    waiting[:] = [entry for entry in waiting if id(entry) not in entering]
    return chosen


def end_record(record: Record, request: Request, now_s: float, error: str | None) -> None:
    """Ends a record; with ``ignore_eos`` and no other stop anything but all tokens is a failure."""
    record.end_s = now_s
    params = request.sampling_params
    exact = params.ignore_eos and not params.stop and not params.stop_token_ids
    if error is None and not record.output_tokens:
        error = "ended without a token"
    if error is None and exact and record.output_tokens != params.max_tokens:
        error = f"{record.output_tokens} tokens, expected {params.max_tokens}"
    record.error = error


def run_throughput(
    engine: Steppable,
    requests: Sequence[Request],
    *,
    clock: Clock = CLOCK,
    one_adapter_at_a_time: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Requests, output tokens and all tokens a second where all requests are there at once.

    The time is from handing over the first to the end of the last; failures are counted and listed.
    """
    before = _counters(engine)
    driven = drive(
        engine, requests, [0.0] * len(requests), clock=clock,
        one_adapter_at_a_time=one_adapter_at_a_time, on_end=on_end,
    )  # fmt: skip
    _require_one(driven)
    return throughput(driven.records, driven.duration_s) | _since(engine, before, driven)


def run_latency(
    engine: Steppable,
    requests: Sequence[Request],
    arrivals_s: Sequence[float],
    *,
    clock: Clock = CLOCK,
    max_concurrency: int | None = None,
    one_adapter_at_a_time: bool = False,
    metrics: MetricOptions = ALL,
    on_end: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Latencies in milliseconds where requests arrive in real time; see
    :mod:`flora_jax.bench.serving.latency_metrics` for what they mean and :func:`drive` for the arguments.

    ``max_concurrent_requests`` is how many there were at once, at most.
    """
    before = _counters(engine)
    driven = drive(
        engine, requests, arrivals_s, clock=clock, max_concurrency=max_concurrency,
        one_adapter_at_a_time=one_adapter_at_a_time, on_end=on_end,
    )  # fmt: skip
    return summary(driven, metrics, max_concurrency) | _since(engine, before, driven)


def summary(
    driven: Driven, metrics: MetricOptions = ALL, max_concurrency: int | None = None
) -> dict[str, Any]:
    """The latencies of a run, and how many requests there were at once, at most.

    Raises:
        RunError: no request completed.
    """
    _require_one(driven)
    found = latency(
        driven.records, driven.duration_s, metrics.percentiles, metrics.goodput_ms, metrics.metrics
    )
    found["max_concurrency"] = max_concurrency
    found["max_concurrent_requests"] = most_at_once(driven.records)
    return found


def most_at_once(records: Sequence[Record]) -> int:
    """The largest number of requests that had started and not ended; an end comes before a start."""
    events = [(r.start_s, 1) for r in records] + [
        (r.end_s, -1) for r in records if r.end_s is not None
    ]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def _require_one(driven: Driven) -> None:
    if not any(record.completed for record in driven.records):
        reason = next((record.error for record in driven.records), None)
        raise RunError(f"all {len(driven.records)} requests failed: {reason}")


_COUNTERS = ("preemptions", "adapter_loads", "adapter_evictions")


def _counters(engine: Steppable) -> dict[str, int]:
    found = {name: getattr(engine.stats, name) for name in _COUNTERS}
    compiled = getattr(engine, "compilations", None)
    return found | {"compilations": getattr(compiled, "count", 0)}


def _since(engine: Steppable, before: Mapping[str, int], driven: Driven) -> dict[str, int]:
    """What the engine did during the run."""
    now = _counters(engine)
    return {"iterations": driven.iterations} | {name: now[name] - n for name, n in before.items()}
