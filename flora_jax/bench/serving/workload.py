"""Seeded workloads for the engine: how long requests are, whose adapter they use, when they arrive.

The words and the filter are those of vLLM's load generator. Lengths, tokens, adapters and arrivals are
drawn from streams of their own: another rate or adapter mix leaves the requests as they are. Knows
nothing of JAX or of the engine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from flora_jax.bench.serving.lengths import (
    ARRIVED,
    LEAST,
    Lengths,
    clipped,
    read_lengths,
    scaled,
    sharegpt_like,
)
from flora_jax.errors import InputError
from flora_jax.serve.request import Request, SamplingParams

Distribution = Literal["distinct", "uniform", "zipf"]
# Of tokenizers' first ids many are special (StarCoder's first 19).
_FIRST_TOKEN = 32
_LENGTHS, _TOKENS, _ADAPTERS, _ARRIVALS = range(4)  # Streams of random numbers.


@dataclasses.dataclass(frozen=True)
class WorkloadOptions:
    """What a workload is drawn from.

    Args:
        num_prompts: requests.
        lengths: a CSV file of lengths, resampled; ``None`` is ``lengths.sharegpt_like``.
        min_total: prompt and output together have at least so many tokens: the output is lengthened.
        max_total: and at most so many: the longer of both is cut.
        scale: multiplies both lengths afterwards; at least 4 tokens of prompt and 1 of output stay.
        adapter_distribution: "distinct" gives every request an adapter of its own; "uniform" and
            "zipf" (the k-th most popular with weight 1/k) draw among ``num_adapters``.
        num_adapters: ``None`` is ``num_prompts`` for "distinct", else 16.
        request_rate: requests a second; infinity: all are there at once; "trace": the times of the
            ``lengths`` file, whose rows are then taken in order.
        burstiness: the shape of the gamma distribution of the times between arrivals, as vLLM defines
            it: 1 is Poisson, less is burstier, infinity is regular.
        seed: of everything.
        exact: tokens of every prompt and of every output, in place of drawn lengths, which nothing clips
            or scales.
        ignore_eos: outputs go on to their length after the model's end tokens.

    Raises:
        InputError: a value that no workload can have.
    """

    num_prompts: int = 1000
    lengths: Path | None = None
    min_total: int = 50
    max_total: int = 2000
    scale: float = 1.0
    adapter_distribution: Distribution = "distinct"
    num_adapters: int | None = None
    request_rate: float | Literal["trace"] = math.inf
    burstiness: float = 1.0
    seed: int = 0
    exact: tuple[int, int] | None = None
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        known = get_args(Distribution)
        _require("num-prompts", self.num_prompts, self.num_prompts >= 1, "at least 1")
        _require("scale", self.scale, 0 < self.scale < math.inf, "above 0 and finite")
        _require("min-total", self.min_total, self.min_total >= 0, "at least 0")
        _require("max-total", self.max_total, self.max_total >= max(2 * LEAST, self.min_total),
                 f"at least {max(2 * LEAST, self.min_total)}")  # fmt: skip
        _require("adapter-distribution", self.adapter_distribution,
                 self.adapter_distribution in known, f"one of {', '.join(known)}")  # fmt: skip
        _require("burstiness", self.burstiness, self.burstiness > 0, "above 0")
        _require("seed", self.seed, 0 <= self.seed < 2**32, "0 to 2^32 - 1")
        for name, value in zip(("random-input-len", "random-output-len"), self.exact or ()):
            _require(name, value, value >= 1, "at least 1")
        if self.exact is not None:
            _require("lengths", self.lengths, self.lengths is None, "none with --random-input-len")
            _require("scale", self.scale, self.scale == 1, "none with --random-input-len")
        if self.request_rate == "trace":
            _require("lengths", self.lengths, self.lengths is not None,
                     "a file with arrival times, for --request-rate trace")  # fmt: skip
        else:
            _require("request-rate", self.request_rate, self.request_rate > 0, "above 0")
        if self.request_rate in ("trace", math.inf):
            _require("burstiness", self.burstiness, self.burstiness == 1,
                     f"none with --request-rate {self.request_rate}")  # fmt: skip
        least = self.num_prompts if self.adapter_distribution == "distinct" else 1
        if self.num_adapters is not None:
            wanted = f"at least {least} with --adapter-distribution {self.adapter_distribution}"
            _require("num-adapters", self.num_adapters, self.num_adapters >= least, wanted)

    @property
    def adapters(self) -> int:
        """How many adapters there are to choose from."""
        if self.num_adapters is not None:
            return self.num_adapters
        return self.num_prompts if self.adapter_distribution == "distinct" else 16

    def to_dict(self) -> dict[str, Any]:
        """The options for a result file; infinity is "inf", as vLLM writes it."""
        raw = dataclasses.asdict(self) | {"num_adapters": self.adapters}
        raw["lengths"] = None if self.lengths is None else self.lengths.name
        return {k: "inf" if v == math.inf else v for k, v in raw.items()}


class Workload(NamedTuple):
    """Requests with the times in seconds, ascending, at which they arrive, and the adapters' names;
    ``file_rows`` are the rows of the file of lengths, and those of them that requests are drawn from.
    """

    requests: list[Request]
    arrivals_s: list[float]
    adapters: list[str]
    file_rows: tuple[int, int] | None = None


def _require(option: str, found: Any, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"--{option} is {found}, expected {expected}")


def draw_lengths(options: WorkloadOptions) -> Lengths:
    """The lengths of the requests, clipped and scaled, and their own arrival times where asked for.

    Raises:
        InputError: see ``lengths.read_lengths``; a trace without times or with too few rows.
    """
    rng = _stream(options, _LENGTHS)
    count, arrivals_s, rows = options.num_prompts, None, None
    if options.exact is not None:
        return Lengths(np.tile(np.array(options.exact), (count, 1)))
    if options.lengths is None:
        pairs_N2 = sharegpt_like(count, rng)
    else:
        table = read_lengths(options.lengths)
        rows = table.file_rows
        if options.request_rate == "trace":
            if table.arrivals_s is None:
                raise InputError(f"{options.lengths}: no column {ARRIVED}, expected one for "
                                 "--request-rate trace")  # fmt: skip
            if len(table.pairs) < count:
                raise InputError(f"--num-prompts is {count}, expected at most the "
                                 f"{len(table.pairs)} rows of {options.lengths}")  # fmt: skip
            order_N = np.argsort(table.arrivals_s, kind="stable")[:count]
            arrivals_s = table.arrivals_s[order_N] - table.arrivals_s[order_N[0]]
            pairs_N2 = table.pairs[order_N]
        else:
            pairs_N2 = table.pairs[rng.integers(len(table.pairs), size=count)]
    pairs_N2 = clipped(pairs_N2, options.min_total, options.max_total)
    return Lengths(scaled(pairs_N2, options.scale), arrivals_s, rows)


def draw_adapters(options: WorkloadOptions) -> np.ndarray:
    """For each request the number of its adapter."""
    rng, count = _stream(options, _ADAPTERS), options.num_prompts
    if options.adapter_distribution == "distinct":
        return np.arange(count)
    if options.adapter_distribution == "uniform":
        return rng.integers(options.adapters, size=count)
    weight_N = 1 / np.arange(1, options.adapters + 1)
    return rng.choice(options.adapters, size=count, p=weight_N / weight_N.sum())


def draw_arrivals(options: WorkloadOptions) -> np.ndarray:
    """Seconds from the start at which requests arrive, with exactly the rate asked for on the whole:
    as in vLLM the last one comes after ``num_prompts / request_rate``, so that seeds compare.
    """
    count, rate, shape = options.num_prompts, options.request_rate, options.burstiness
    assert rate != "trace"
    if rate == math.inf:
        return np.zeros(count)
    if shape == math.inf:
        return np.arange(1, count + 1) / rate
    times_N = np.cumsum(_stream(options, _ARRIVALS).gamma(shape, 1 / (rate * shape), count))
    if not times_N[-1] > 0:  # So bursty that every gap is too small for a float.
        raise InputError(
            f"--burstiness is {shape}, expected enough to have any time between arrivals"
        )
    return times_N * (count / rate / times_N[-1])


def parse_rate(text: str) -> float | Literal["trace"]:
    """A request rate as it is written: a number, "inf" or "trace".

    Raises:
        InputError: it is none of them.
    """
    if text == "trace":
        return "trace"
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if math.isnan(rate):
        raise InputError(f"--request-rate is {text!r}, expected a number above 0, inf or trace")
    return rate


def adapter_names(options: WorkloadOptions) -> list[str]:
    """Names for as many adapters as there are to choose from."""
    return [f"adapter-{number}" for number in range(options.adapters)]


def make_workload(
    options: WorkloadOptions,
    vocab_size: int,
    avoid: Collection[int] = (),
    adapters: Sequence[str] = (),
) -> Workload:
    """Requests of random tokens that end after their output's length, greedily drawn.

    Args:
        options: what they are drawn from.
        vocab_size: token ids lie below it, and above a tokenizer's special ones.
        avoid: ids that no prompt has (the model's end tokens).
        adapters: names of the adapters to choose from, ``options.adapters`` of them; with none all
            requests are for the base.

    Raises:
        InputError: see :func:`draw_lengths`.
    """
    lengths = draw_lengths(options)
    arrivals_N = lengths.arrivals_s if lengths.arrivals_s is not None else draw_arrivals(options)
    if adapters and len(adapters) != options.adapters:
        raise ValueError(f"{len(adapters)} names for {options.adapters} adapters")
    own_N = draw_adapters(options)
    first = _FIRST_TOKEN if vocab_size > 2 * _FIRST_TOKEN else 0
    allowed_V = np.setdiff1d(np.arange(first, vocab_size), np.fromiter(avoid, int))
    requests = []
    for index, (prompt, output) in enumerate(lengths.pairs.tolist()):
        # By request, so that a longer prompt does not move the tokens of the following ones.
        rng = np.random.default_rng([options.seed, _TOKENS, index])
        ids = tuple(allowed_V[rng.integers(len(allowed_V), size=prompt)].tolist())
        name = adapters[own_N[index]] if adapters else None
        params = SamplingParams(max_tokens=output, ignore_eos=options.ignore_eos)
        requests.append(Request(ids, params, name, fold_in=index))
    return Workload(requests, arrivals_N.tolist(), [*adapters], lengths.file_rows)


def arrival_fields(options: WorkloadOptions) -> dict[str, Any]:
    """How requests arrived, under vLLM's names."""
    raw = options.to_dict()
    return {name: raw[name] for name in ("request_rate", "burstiness")}


def longest(requests: Sequence[Request]) -> int:
    """Tokens of prompt and output of the longest request."""
    return max(request.reach for request in requests)


def _stream(options: WorkloadOptions, stream: int) -> np.random.Generator:
    return np.random.default_rng([options.seed, stream])
