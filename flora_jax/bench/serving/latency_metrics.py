"""From the times at which tokens came to the figures of a serving benchmark, under vLLM's names.

As vLLM's ``bench serve`` defines them, for each request that completed:

- TTFT: from its start to its first token;
- E2EL: from its start to its last token;
- TPOT: (E2EL - TTFT) / (tokens - 1), for requests of two tokens and more;
- ITL: the times between neighbouring arrivals, of all requests together.

An arrival has several tokens where the engine draws them in one dispatch, as a chunk of vLLM's streams
may: ITL is then how long a reader waits for the next ones, TPOT what a token takes on average. Knows
nothing of engines or clocks.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flora_jax.errors import InputError

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
PERCENTILES = (90.0, 99.0)


@dataclasses.dataclass
class Record:
    """What happened to one request; times in seconds since the run's beginning.

    ``arrived`` has the time and number of tokens of each arrival, ``error`` why it failed.
    """

    index: int
    prompt_tokens: int
    start_s: float
    arrived: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    end_s: float | None = None
    error: str | None = None

    @property
    def completed(self) -> bool:
        return self.end_s is not None and self.error is None

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.arrived)

    @property
    def ttft_s(self) -> float:
        return self.arrived[0][0] - self.start_s

    @property
    def e2el_s(self) -> float:
        return self.arrived[-1][0] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """``None`` for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        times = [time for time, _ in self.arrived]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Bounds in milliseconds by metric, from texts such as "ttft:500 tpot:50".

    Raises:
        InputError: another form, an unknown metric or one that is given twice, a bound that is not
            above 0.
    """
    bounds: dict[str, float] = {}
    for word in " ".join(texts).replace(",", " ").split():
        name, _, number = word.partition(":")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if name not in GOODPUT_METRICS or not 0 < bound < math.inf:
            known = ", ".join(GOODPUT_METRICS)
            raise InputError(
                f"--goodput is {word!r}, expected NAME:MILLISECONDS, NAME one of {known}"
            )
        if name in bounds:
            raise InputError(f"--goodput gives {name} twice, expected one bound for each")
        bounds[name] = bound
    return bounds


def parse_metrics(text: str) -> tuple[str, ...]:
    """Some of ``METRICS``, comma-separated, in their own order.

    Raises:
        InputError: there is another one.
    """
    words = text.split(",")
    if unknown := [word for word in words if word not in METRICS]:
        known = ", ".join(METRICS)
        raise InputError(f"--percentile-metrics has {unknown[0]!r}, expected some of {known}")
    return tuple(name for name in METRICS if name in words)


def parse_percentiles(text: str) -> list[float]:
    """Numbers above 0 up to 100, comma-separated.

    Raises:
        InputError: one that is not.
    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 < value <= 100 for value in found):
        raise InputError(f"--metric-percentiles is {text!r}, expected numbers above 0 up to 100")
    return found


def is_good(record: Record, goodput_ms: Mapping[str, float]) -> bool:
    """Whether a request completed within every bound; a single token has a TPOT of 0."""
    if not record.completed:
        return False
    found = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s}
    return all(found[name] * 1000 <= bound for name, bound in goodput_ms.items())


def throughput(records: Sequence[Record], duration_s: float) -> dict[str, Any]:
    """Counts and rates: requests and tokens a second over ``duration_s``.

    Tokens of failed requests count nowhere; each failure is listed with its request and reason.
    """
    done = [record for record in records if record.completed]
    prompt = sum(record.prompt_tokens for record in done)
    output = sum(record.output_tokens for record in done)
    return {
        "num_prompts": len(records),
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "errors": [
            {"index": record.index, "error": record.error or "did not end"}
            for record in records
            if not record.completed
        ],
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration_s,
        "output_throughput": output / duration_s,
        "total_token_throughput": (prompt + output) / duration_s,
    }


def latency(
    records: Sequence[Record],
    duration_s: float,
    percentiles: Sequence[float] = PERCENTILES,
    goodput_ms: Mapping[str, float] | None = None,
    metrics: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """:func:`throughput`, and mean, median, standard deviation and percentiles of ``metrics`` in
    milliseconds, ``mean_ttft_ms``, ``p99_itl_ms`` and so on: ``None`` where nothing was measured.

    ``request_goodput`` is the rate of requests within ``goodput_ms``, ``None`` without bounds, and
    ``max_output_tokens_per_s`` what came in the best whole second of the run's.
    """
    done = [record for record in records if record.completed]
    good = sum(is_good(record, goodput_ms or {}) for record in records)
    samples: dict[str, list[float]] = {
        "ttft": [record.ttft_s for record in done],
        "tpot": [tpot for record in done if (tpot := record.tpot_s) is not None],
        "itl": [itl for record in done for itl in record.itls_s],
        "e2el": [record.e2el_s for record in done],
    }
    found = throughput(records, duration_s)
    found["request_goodput"] = good / duration_s if goodput_ms else None
    seconds: collections.Counter[int] = collections.Counter()
    for record in done:
        for time_s, count in record.arrived:
            seconds[int(time_s)] += count
    found["max_output_tokens_per_s"] = max(seconds.values(), default=0)
    for name in metrics:
        found |= _statistics(name, np.array(samples[name]) * 1000, percentiles)
    return found


def _statistics(name: str, ms: np.ndarray, percentiles: Sequence[float]) -> dict[str, float | None]:
    keys = [f"p{percentile:g}_{name}_ms" for percentile in percentiles]
    keys = [f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms", *keys]
    if not ms.size:
        return dict.fromkeys(keys)
    values = [ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, list(percentiles))]
    return {key: float(value) for key, value in zip(keys, values, strict=True)}
