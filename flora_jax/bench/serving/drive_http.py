"""Drives a server with a workload, over HTTP and in real time, and measures what its users see.

The same records, times and figures as :mod:`flora_jax.bench.serving.drive` has for an engine in this
process: a request's time runs from the moment at which it should have been sent.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import heapq
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from flora_jax.bench.serving.api import Api, Arrivals, Endpoint, Refused, find_model
from flora_jax.bench.serving.client import Client
from flora_jax.bench.serving.drive import ALL, Driven, MetricOptions, end_record, summary
from flora_jax.bench.serving.latency_metrics import Record
from flora_jax.bench.serving.workload import Workload
from flora_jax.errors import RunError
from flora_jax.serve.request import Request

Send = Callable[[bytes], Awaitable[Arrivals]]


class Target(NamedTuple):
    """The server that is measured; ``model`` of ``None`` is the first that it has."""

    base_url: str
    endpoint: Endpoint
    model: str | None = None
    api_key: str | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a workload is sent.

    Args:
        max_concurrency: requests on their way at most.
        num_warmups: requests before the run, untimed, of up to 4 tokens.
        metrics: what is summed up.
        on_end: called for every request that ends.
    """

    max_concurrency: int | None = None
    num_warmups: int = 1
    metrics: MetricOptions = ALL
    on_end: Callable[[], None] = lambda: None


async def drive_http(
    send: Send,
    bodies: Sequence[bytes],
    workload: Workload,
    max_concurrency: int | None = None,
    on_end: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[Driven, collections.Counter[str]]:
    """Sends a workload's requests, each at its time.

    Args:
        send: streams one request; :meth:`flora_jax.bench.serving.api.Api.send`.
        bodies: of the workload's requests.
        workload: when each arrives.
        max_concurrency: requests on their way at most. As in vLLM the time of a request that had to wait
            for this runs from when another one's end made room for it.
        on_end: called for every request that ends.
        now: the clock that ``send`` uses.

    Returns:
        What happened, and how many requests failed with each status.
    """
    requests, arrivals_s = workload.requests, workload.arrivals_s
    records = [
        Record(index, len(request.prompt_token_ids), at)
        for index, (request, at) in enumerate(zip(requests, arrivals_s, strict=True))
    ]
    failed: collections.Counter[str] = collections.Counter()
    places = max_concurrency or len(requests)
    room, free_s = asyncio.Semaphore(places), [0.0] * places
    began = now()

    async def one(record: Record, body: bytes) -> None:
        async with room:
            place_s = heapq.heappop(free_s)
            record.start_s = max(record.start_s, place_s)
            error: str | None = None
            try:
                found = await send(body)
                failed.update(_finish(record, requests[record.index], found, began, now()))
            except Refused as refused:
                failed[refused.status] += 1
                error = str(refused)
                end_record(record, requests[record.index], now() - began, error)
            assert record.end_s is not None
            heapq.heappush(free_s, record.end_s)
            on_end()

    async with asyncio.TaskGroup() as tasks:
        for record, body in zip(records, bodies, strict=True):
            if (left_s := arrivals_s[record.index] - (now() - began)) > 0:
                await asyncio.sleep(left_s)
            tasks.create_task(one(record, body))
    last_s = max(record.end_s or 0.0 for record in records)
    return Driven(records, last_s), failed


def _finish(
    record: Record, request: Request, found: Arrivals, began: float, ended: float
) -> list[str]:
    """Writes a request's end down; the status of its failure, if the stream lacks tokens."""
    record.arrived = [(time - began, count) for time, count in found.arrived]
    if found.prompt_tokens is not None:
        record.prompt_tokens = found.prompt_tokens
    if found.output_tokens is None:  # Then nobody knows whether it has all.
        params = dataclasses.replace(request.sampling_params, ignore_eos=False)
        request = dataclasses.replace(request, sampling_params=params)
    end_record(record, request, ended - began, None)
    return [] if record.error is None else ["tokens"]


async def run_http(target: Target, workload: Workload, asked: Asked) -> dict[str, Any]:
    """Measures a server: latencies, how many requests failed with each status, and what share of a core
    this process used meanwhile (``client_cores``).

    Raises:
        InputError: no such server, or one that lacks the model or an adapter.
        RunError: a request before the run failed, or no request of it completed.
    """
    async with Client(target.base_url, target.api_key) as client:
        model = await find_model(client, target.base_url, target.model, workload.adapters)
        api = Api(client, model, target.endpoint, time.perf_counter)
        for request in workload.requests[: asked.num_warmups]:
            await _rehearse(api, request)
        bodies = [api.body(request) for request in workload.requests]
        used = time.process_time()
        driven, failed = await drive_http(
            api.send, bodies, workload, asked.max_concurrency, asked.on_end
        )
        used = time.process_time() - used
    found = summary(driven, asked.metrics, asked.max_concurrency)
    return {
        "model_id": model,
        "endpoint": target.endpoint,
        **found,
        "failed_by_status": dict(failed),
        "client_cores": used / driven.duration_s,
    }


async def _rehearse(api: Api, request: Request) -> None:
    params = request.sampling_params
    params = dataclasses.replace(params, max_tokens=min(4, params.max_tokens))
    try:
        await api.send(api.body(dataclasses.replace(request, sampling_params=params)))
    except Refused as refused:
        raise RunError(f"a request before the run failed: {refused}") from None
