"""/metrics: what Prometheus reads, with vLLM's names behind our own prefix.

Requests are counted as the runner tells of them; the engine is asked when somebody reads.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from flora_jax.serve.engine import AdapterState
from flora_jax.serve.http.runner import Outcome, Runner, Timing, Unavailable
from flora_jax.serve.request import Request

PREFIX = "flora_jax:"
OTHER = "other"
_BASE = ""
# vLLM's newer name and its older one.
_BETWEEN, _BETWEEN_BEFORE = "inter_token_latency_seconds", "time_per_output_token_seconds"
# vLLM's, in seconds.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
    160, 640, 2560,
)  # fmt: skip
_PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip


def _token_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to ``most``."""
    sizes, unit = [], 1
    while unit <= most:
        sizes += [factor * unit for factor in (1, 2, 5) if factor * unit <= most]
        unit *= 10
    return tuple(sizes)


class _Labelled(NamedTuple):
    """The metrics of one adapter's requests."""

    prompt_tokens: Counter
    generation_tokens: Counter
    rejected: Counter
    first_token: Histogram
    between: Histogram
    per_token: Histogram
    latency: Histogram
    queue: Histogram
    prompts: Histogram
    outputs: Histogram
    success: Mapping[Outcome, Counter]


class Metrics:
    """An :class:`~flora_jax.serve.http.runner.Observer` that counts.

    Every metric has the label ``model_name``, the base's; those of requests have ``adapter`` as well,
    empty for the base. So many adapters as were used first have their own, later ones share "other".

    Args:
        model: the base's name.
        context: tokens of the longest sequence.
        adapters: that have a label of their own, at most.
    """

    def __init__(self, model: str, context: int, adapters: int):
        self.registry = CollectorRegistry()
        self._model, self._most = model, adapters
        self._labelled: dict[str | None, _Labelled] = {}
        tokens = _token_buckets(context)
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of requests that began."
        )
        self._generation_tokens = self._counter("generation_tokens", "Tokens drawn.")
        self._success = self._counter("request_success", "Requests ended.", "finished_reason")
        self._rejected = self._counter("request_rejected", "Requests refused: the queue was full.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN
        )
        self._between = self._histogram(_BETWEEN, "Between two tokens of a request.", _PER_TOKEN)
        self.registry.register(_Renamed(self._between))
        ProcessCollector(registry=self.registry)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time between tokens after the first.", _PER_TOKEN,
        )  # fmt: skip
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _REQUEST
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to a row.", _REQUEST
        )
        self._prompts = self._histogram("request_prompt_tokens", "Of a request.", tokens)
        self._outputs = self._histogram("request_generation_tokens", "Of a request.", tokens)

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        labels = ("model_name", "adapter", *labels)
        return Counter(PREFIX + name, said, labels, registry=self.registry)

    def _histogram(self, name: str, said: str, buckets: tuple[float, ...]) -> Histogram:
        labels = ("model_name", "adapter")
        return Histogram(PREFIX + name, said, labels, registry=self.registry, buckets=buckets)

    def _of(self, request: Request) -> _Labelled:
        """The metrics of a request's adapter; looked up once, since finding a label is slow."""
        name = request.adapter
        found = self._labelled.get(name)
        if found is None:
            if name is not None and len(self._labelled.keys() - {None, OTHER}) >= self._most:
                name = OTHER
            found = self._labelled.get(name) or self._labelled.setdefault(name, self._label(name))
        return found

    def _label(self, name: str | None) -> _Labelled:
        labels = self._model, _BASE if name is None else name
        return _Labelled(
            self._prompt_tokens.labels(*labels), self._generation_tokens.labels(*labels),
            self._rejected.labels(*labels), self._first_token.labels(*labels),
            self._between.labels(*labels), self._per_token.labels(*labels),
            self._latency.labels(*labels), self._queue.labels(*labels),
            self._prompts.labels(*labels), self._outputs.labels(*labels),
            {outcome: self._success.labels(*labels, outcome) for outcome in get_args(Outcome)},
        )  # fmt: skip

    def arrived(self, timing: Timing) -> None:
        pass

    def refused(self, request: Request) -> None:
        self._of(request).rejected.inc()

    def began(self, timing: Timing) -> None:
        own = self._of(timing.request)
        own.prompt_tokens.inc(len(timing.request.prompt_token_ids))
        if timing.time_to_first_token_s is not None:
            own.first_token.observe(timing.time_to_first_token_s)
        if timing.queued_s is not None:
            own.queue.observe(timing.queued_s)

    def progressed(self, timing: Timing, tokens: int, gap_s: float) -> None:
        own = self._of(timing.request)
        own.generation_tokens.inc(tokens)
        if timing.tokens == tokens:
            return  # The first ones: what they waited for is the time to first token.
        for _ in range(tokens):  # Tokens of one dispatch came evenly.
            own.between.observe(gap_s / tokens)

    def ended(self, timing: Timing, outcome: Outcome, seconds: float) -> None:
        own = self._of(timing.request)
        own.success[outcome].inc()
        own.latency.observe(seconds)
        own.prompts.observe(len(timing.request.prompt_token_ids))
        own.outputs.observe(timing.tokens)
        if timing.time_per_output_token_s is not None:
            own.per_token.observe(timing.time_per_output_token_s)


class _Renamed(Collector):
    """Times between tokens once more, under the name that older dashboards ask for."""

    def __init__(self, between: Histogram):
        self._between = between

    def collect(self) -> Iterator[Metric]:
        for found in self._between.collect():
            again = Metric(PREFIX + _BETWEEN_BEFORE, found.documentation, found.type)
            for one in found.samples:
                name = one.name.replace(_BETWEEN, _BETWEEN_BEFORE)
                again.samples.append(one._replace(name=name))
            yield again


class EngineMetrics(Collector):
    """What the engine is asked for when somebody reads."""

    def __init__(self, runner: Runner, model: str):
        self._runner, self._model = runner, model

    def collect(self) -> Iterator[Metric]:
        try:
            engine = self._runner.engine
        except Unavailable:
            return
        stats, where = engine.stats, Tally(engine.adapters.values())
        yield self._gauge("num_requests_running", "Requests that have a row.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for one.", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the cache in use.", stats.cache_usage)
        yield self._count("num_preemptions", "Sequences preempted.", stats.preemptions)
        yield self._count("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._count("prefix_cache_hits", "Of those, found.", stats.prefix_hits)
        yield self._count("adapter_loads", "Adapters written to the device.", stats.adapter_loads)
        yield self._count("adapter_evictions", "Adapters evicted.", stats.adapter_evictions)
        yield self._count("compilations", "Since the warm-up.", engine.compilations.count)
        adapters = GaugeMetricFamily(
            PREFIX + "adapters",
            "Known adapters, by where they lie.",
            labels=("model_name", "state"),
        )
        for state in get_args(AdapterState):
            adapters.add_metric((self._model, state), where[state])
        yield adapters

    def _gauge(self, name: str, said: str, value: float) -> Metric:
        return self._of(GaugeMetricFamily, name, said, value)

    def _count(self, name: str, said: str, value: float) -> Metric:
        return self._of(CounterMetricFamily, name, said, value)

    def _of(self, family: Any, name: str, said: str, value: float) -> Metric:
        found = family(PREFIX + name, said, labels=("model_name",))
        found.add_metric((self._model,), value)
        return found


def metrics_path(metrics: Metrics) -> APIRouter:
    """The path that Prometheus reads."""
    router = APIRouter()
    described = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.get("/metrics", response_class=Response, responses=described)  # type: ignore[arg-type]
    async def read() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
