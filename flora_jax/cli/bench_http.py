"""``flora-jax bench serve``: a server with OpenAI's API under a workload, over HTTP."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora_jax.cli.bench_serving import (
    Burstiness,
    Goodput,
    Lengths,
    MaxTotal,
    MetricPercentiles,
    MinTotal,
    NumPrompts,
    Output,
    PercentileMetrics,
    RequestRate,
    Scale,
)
from flora_jax.cli.common import Overwrite
from flora_jax.cli.options import takes
from flora_jax.errors import InputError
from flora_jax.files import require_file
from flora_jax.terminal import progress, say

if TYPE_CHECKING:
    from flora_jax.bench.serving.drive_http import Asked, Target
    from flora_jax.bench.serving.workload import WorkloadOptions


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """What the command was given; vLLM's words where it has them."""

    base_url: Annotated[str, typer.Option(help="Of the server, as http://127.0.0.1:8000.")] = (
        "http://127.0.0.1:8000"
    )
    endpoint: Annotated[str, typer.Option(help="/v1/completions or /v1/chat/completions.")] = (
        "/v1/completions"
    )
    model: Annotated[
        str | None, typer.Option(help="As the server names it. Default the first that it has.")
    ] = None
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")
    ] = None
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="Adapters of the server's that requests are for."),
    ] = None
    adapter_distribution: Annotated[
        str, typer.Option(help="Over --lora-modules: uniform, zipf or distinct (one a request).")
    ] = "uniform"
    num_prompts: NumPrompts = 1000
    request_rate: RequestRate = "inf"
    burstiness: Burstiness = 1.0
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests on their way at most; the others wait here.")
    ] = None
    random_input_len: Annotated[
        int | None, typer.Option(help="Tokens of every prompt, in place of drawn lengths.")
    ] = None
    random_output_len: Annotated[
        int | None, typer.Option(help="Tokens of every output; with --random-input-len.")
    ] = None
    lengths: Lengths = None
    min_total: MinTotal = 50
    max_total: MaxTotal = 2000
    scale: Scale = 1.0
    vocab_size: Annotated[
        int, typer.Option(help="Prompts are random token ids below it, from 32 on.")
    ] = 1000
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Outputs go on to their length (vLLM's extension).")
    ] = False
    num_warmups: Annotated[
        int, typer.Option(help="Requests before the run, untimed, of up to 4 tokens.")
    ] = 1
    goodput: Goodput = None
    percentile_metrics: PercentileMetrics = "ttft,tpot,itl,e2el"
    metric_percentiles: MetricPercentiles = "90,99"
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write a file named by rate, model and time.")
    ] = False
    output: Output = None
    overwrite: Overwrite = False

    def workload(self) -> WorkloadOptions:
        """What the requests are drawn from."""
        from flora_jax.bench.serving.workload import WorkloadOptions, parse_rate

        names, exact = self.lora_modules or [], (self.random_input_len, self.random_output_len)
        if len({*names}) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"--lora-modules has {twice!r} twice, expected different names")
        if exact.count(None) == 1:
            raise InputError(
                f"--random-input-len is {exact[0]} and --random-output-len {exact[1]}, "
                "expected both or none"
            )
        if self.adapter_distribution == "distinct" and len(names) < self.num_prompts:
            raise InputError(
                f"--lora-modules has {len(names)} names, expected one for each of "
                f"{self.num_prompts} requests with --adapter-distribution distinct"
            )
        return WorkloadOptions(
            num_prompts=self.num_prompts, lengths=self.lengths, min_total=self.min_total,
            max_total=self.max_total, scale=self.scale,
            adapter_distribution=self.adapter_distribution,  # type: ignore[arg-type]
            num_adapters=len(names) or None, request_rate=parse_rate(self.request_rate),
            burstiness=self.burstiness, seed=self.seed, ignore_eos=self.ignore_eos,
            exact=None if None in exact else exact,  # type: ignore[arg-type]
        )  # fmt: skip

    def asked(self) -> Asked:
        """How they are sent."""
        from flora_jax.bench.serving.drive import MetricOptions
        from flora_jax.bench.serving.drive_http import Asked
        from flora_jax.bench.serving.latency_metrics import (
            parse_goodput,
            parse_metrics,
            parse_percentiles,
        )

        for name, value, least in (
            ("max-concurrency", self.max_concurrency, 1),
            ("num-warmups", self.num_warmups, 0),
            ("vocab-size", self.vocab_size, 2),
        ):
            if value is not None and value < least:
                raise InputError(f"--{name} is {value}, expected at least {least}")
        metrics = MetricOptions(
            parse_percentiles(self.metric_percentiles), parse_goodput(self.goodput or []),
            parse_metrics(self.percentile_metrics),
        )  # fmt: skip
        return Asked(self.max_concurrency, self.num_warmups, metrics)

    def target(self) -> Target:
        """Where they go."""
        from flora_jax.bench.serving.api import ENDPOINTS
        from flora_jax.bench.serving.drive_http import Target

        for endpoint in ENDPOINTS:
            if self.endpoint == endpoint:
                return Target(self.base_url.rstrip("/"), endpoint, self.model, self.api_key)
        raise InputError(f"--endpoint is {self.endpoint!r}, expected one of {', '.join(ENDPOINTS)}")


@takes(ServeBench)
def serve(options: ServeBench) -> None:
    """Latencies and rates of a server with OpenAI's API, as its users see them; vLLM's words and keys."""
    import asyncio
    import dataclasses

    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise InputError("bench serve needs aiohttp: pip install 'flora-jax[bench]'") from None
    from flora_jax.bench.receipts import report
    from flora_jax.bench.serving.client import allow_connections
    from flora_jax.bench.serving.drive_http import run_http
    from flora_jax.bench.serving.workload import arrival_fields, make_workload

    target, asked, drawn = options.target(), options.asked(), options.workload()
    output = options.output
    if output is None and options.save_result:
        output = _result_name(target, options)
    if output is not None:
        require_file(output, options.overwrite)
    workload = make_workload(drawn, options.vocab_size, (), options.lora_modules or [])
    allow_connections(asked.max_concurrency or drawn.num_prompts)
    with progress("requests", drawn.num_prompts) as bar:
        asked = dataclasses.replace(asked, on_end=bar.advance)
        found = asyncio.run(run_http(target, workload, asked))
    result = {"base_url": target.base_url, "workload": drawn.to_dict()}
    result |= arrival_fields(drawn) | found
    _show(result, asked.metrics.metrics)
    if output is not None:
        report.write_results(output, result)


def _result_name(target: Target, options: ServeBench) -> Path:
    """A file name as vLLM makes it."""
    limit = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
    model = (target.model or "model").rpartition("/")[2]
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(f"openai-{options.request_rate}qps{limit}-{model}-{now}.json")


_COUNTS = {
    "completed": "requests completed",
    "failed": "requests failed",
    "duration": "seconds",
    "total_input_tokens": "prompt tokens",
    "total_output_tokens": "output tokens",
    "request_throughput": "requests/s",
    "request_goodput": "good requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "tokens/s",
    "max_output_tokens_per_s": "output tokens in the best second",
    "max_concurrent_requests": "requests at once, at most",
    "client_cores": "cores that the client used",
}


def _show(result: dict[str, Any], metrics: Sequence[str]) -> None:
    from flora_jax.bench.receipts import report

    counts = [
        {"what": text, "value": result[key]}
        for key, text in _COUNTS.items()
        if result[key] is not None
    ]
    report.table(f"{result['model_id']} at {result['base_url']}", counts, {"what": "", "value": ""})
    statistics = [
        key.removesuffix(f"_{metrics[0]}_ms") for key in result if key.endswith(f"_{metrics[0]}_ms")
    ]
    times = [
        {"metric": name.upper()} | {one: result[f"{one}_{name}_ms"] for one in statistics}
        for name in metrics
    ]
    report.table("milliseconds", times, {"metric": "", **{one: one for one in statistics}})
    if result["failed"]:
        by_status = ", ".join(f"{n} x {status}" for status, n in result["failed_by_status"].items())
        first = result["errors"][0]
        say(f"{result['failed']} requests failed ({by_status}); the first, request "
            f"{first['index']}: {first['error']}")  # fmt: skip
