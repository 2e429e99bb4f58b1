"""``flora-jax bench throughput`` and ``latency``: the engine under a workload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flora_jax.adapters.registry import TRAITS
from flora_jax.cli.common import MODEL_HELP, Overwrite, dtype_of, prepare_jax
from flora_jax.errors import InputError
from flora_jax.files import require_file
from flora_jax.terminal import say

Model = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
Preset = Annotated[
    str | None, typer.Option(help="In place of MODEL random weights: mini, 164m, 1b, 3b or 15b.")
]
Kind = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(TRAITS)}, none; sequential: FLoRA, one adapter at a time; "
        "unmerged: FLoRA by the paper's formula in prompts too."
    ),
]
Rank = Annotated[int | None, typer.Option(help="Of the random adapters. Default 1.")]
Ranks = Annotated[str | None, typer.Option(help="Several, as 1,2,4: a line of the result each.")]
Targets = Annotated[
    str | None,
    typer.Option(help="Projections, comma-separated, by name. Default: PEFT's for LoRA."),
]
NumPrompts = Annotated[int, typer.Option(help="Requests.")]
Scale = Annotated[float, typer.Option(help="Multiplies prompt and output lengths.")]
Lengths = Annotated[
    Path | None,
    typer.Option(help="CSV of lengths: chats (input_tokens,output_tokens), of which those that vLLM "
                 "would take, or Azure's trace, for which --max-total 8192 cuts none short. "
                 "Default a fit to ShareGPT."),
]  # fmt: skip
MinTotal = Annotated[int, typer.Option(help="Tokens of a request at least, before scaling.")]
MaxTotal = Annotated[int, typer.Option(help="Tokens of a request at most, before scaling.")]
Distribution = Annotated[Any, typer.Option(help="distinct (one a request), uniform or zipf.")]
NumAdapters = Annotated[
    int | None, typer.Option(help="Default one a request for distinct, else 16.")
]
Resident = Annotated[
    int | None, typer.Option(help="Adapters on the device; default all, so that none is loaded.")
]
MaxNumSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
MaxBatched = Annotated[int, typer.Option(help="Tokens of an iteration.")]
DecodeSteps = Annotated[int, typer.Option(help="Tokens of a dispatch while nobody waits.")]
Seed = Annotated[int, typer.Option(help="Of workload, adapters and random weights.")]
DType = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default float32 on CPU, else its own."),
]
RequestRate = Annotated[
    str, typer.Option(help="Requests a second, inf, or trace: the times of --lengths.")
]
Burstiness = Annotated[
    float, typer.Option(help="1: Poisson; less is burstier, more is more regular.")
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME:MS", help="Bounds, as 'ttft:500 tpot:50' (e2el too)."),
]
PercentileMetrics = Annotated[
    str, typer.Option(help="Comma-separated: the times that are reported.")
]
MetricPercentiles = Annotated[str, typer.Option(help="Comma-separated.")]
Output = Annotated[Path | None, typer.Option(help="JSON file for the results.")]
Plot = Annotated[Path | None, typer.Option(help="PNG file for the picture.")]

_THROUGHPUT = {
    "kind": "kind", "rank": "rank", "completed": "done", "failed": "failed", "duration": "s",
    "request_throughput": "requests/s", "output_throughput": "output tokens/s",
    "total_token_throughput": "tokens/s", "share_of_limit": "share of limit",
}  # fmt: skip
_LATENCY = {
    "kind": "kind",
    "rank": "rank",
    "completed": "done",
    "failed": "failed",
    "request_throughput": "requests/s",
    "request_goodput": "good/s",
    "output_throughput": "output tokens/s",
}


def throughput(
    model: Model = None,
    preset: Preset = None,
    kind: Kind = "flora",
    rank: Rank = None,
    ranks: Ranks = None,
    targets: Targets = None,
    num_prompts: NumPrompts = 1000,
    scale: Scale = 1.0,
    lengths: Lengths = None,
    min_total: MinTotal = 50,
    max_total: MaxTotal = 2000,
    adapter_distribution: Distribution = "distinct",
    num_adapters: NumAdapters = None,
    resident_adapters: Resident = None,
    max_num_seqs: MaxNumSeqs = 16,
    max_num_batched_tokens: MaxBatched = 2048,
    decode_steps: DecodeSteps = 16,
    limits: Annotated[
        bool, typer.Option(help="Measure bandwidth and best product rate as well: the share of it.")
    ] = True,
    seed: Seed = 0,
    dtype: DType = None,
    output: Output = None,
    plot: Plot = None,
    overwrite: Overwrite = False,
) -> None:
    """Tokens a second where all requests are there at once, each with a random adapter."""
    lines = Run(
        model=model, preset=preset, kind=kind, rank=rank, ranks=ranks, targets=targets, dtype=dtype,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        decode_steps=decode_steps, resident_adapters=resident_adapters, limits=limits,
        output=output, plot=plot, overwrite=overwrite,
        workload=dict(
            num_prompts=num_prompts, scale=scale, lengths=lengths, min_total=min_total,
            max_total=max_total, adapter_distribution=adapter_distribution,
            num_adapters=num_adapters, seed=seed,
        ),
    ).measure("throughput", {})  # fmt: skip
    _show("throughput", lines, _THROUGHPUT, plot, {"output tokens/s": ["output_throughput"]})


def latency(
    model: Model = None,
    preset: Preset = None,
    kind: Kind = "flora",
    rank: Rank = None,
    ranks: Ranks = None,
    targets: Targets = None,
    request_rate: RequestRate = "inf",
    burstiness: Burstiness = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests in the engine at most; the others wait outside.")
    ] = None,
    goodput: Goodput = None,
    percentile_metrics: PercentileMetrics = "ttft,tpot,itl,e2el",
    metric_percentiles: MetricPercentiles = "90,99",
    num_prompts: NumPrompts = 1000,
    scale: Scale = 1.0,
    lengths: Lengths = None,
    min_total: MinTotal = 50,
    max_total: MaxTotal = 2000,
    adapter_distribution: Distribution = "distinct",
    num_adapters: NumAdapters = None,
    resident_adapters: Resident = None,
    max_num_seqs: MaxNumSeqs = 16,
    max_num_batched_tokens: MaxBatched = 2048,
    decode_steps: DecodeSteps = 16,
    seed: Seed = 0,
    dtype: DType = None,
    output: Output = None,
    plot: Plot = None,
    overwrite: Overwrite = False,
) -> None:
    """Latencies in milliseconds where requests arrive in real time, each with a random adapter."""
    from flora_jax.bench.serving.latency_metrics import (
        parse_goodput,
        parse_metrics,
        parse_percentiles,
    )
    from flora_jax.bench.serving.workload import parse_rate

    if max_concurrency is not None and max_concurrency < 1:
        raise InputError(f"--max-concurrency is {max_concurrency}, expected at least 1")
    bounds, percentiles = parse_goodput(goodput or []), parse_percentiles(metric_percentiles)
    metrics = parse_metrics(percentile_metrics)
    from flora_jax.bench.serving.drive import MetricOptions

    asked = {
        "max_concurrency": max_concurrency, "metrics": MetricOptions(percentiles, bounds, metrics)
    }  # fmt: skip
    lines = Run(
        model=model, preset=preset, kind=kind, rank=rank, ranks=ranks, targets=targets, dtype=dtype,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        decode_steps=decode_steps, resident_adapters=resident_adapters, limits=False,
        output=output, plot=plot, overwrite=overwrite,
        workload=dict(
            num_prompts=num_prompts, scale=scale, lengths=lengths, min_total=min_total,
            max_total=max_total, adapter_distribution=adapter_distribution,
            num_adapters=num_adapters, seed=seed, request_rate=parse_rate(request_rate),
            burstiness=burstiness,
        ),
    ).measure("latency", asked)  # fmt: skip
    columns = {name: text for name, text in _LATENCY.items() if bounds or "good" not in text}
    top = f"p{max(percentiles):g}"
    columns |= {
        f"{statistic}_{metric}_ms": f"{statistic} {metric.upper()}"
        for metric in metrics
        for statistic in ("median", top)
    }
    panels = {m.upper() + " in ms": [f"mean_{m}_ms", f"{top}_{m}_ms"] for m in metrics[:2]}
    _show("latency", lines, columns, plot, panels)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of a benchmark of the engine, as they were given."""

    model: str | None
    preset: str | None
    kind: str
    rank: int | None
    ranks: str | None
    targets: str | None
    dtype: str | None
    max_num_seqs: int
    max_num_batched_tokens: int
    decode_steps: int
    resident_adapters: int | None
    limits: bool
    output: Path | None
    plot: Path | None
    overwrite: bool
    workload: dict[str, Any]

    def measure(
        self, benchmark: Literal["throughput", "latency"], asked: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Checks everything that can be checked, then measures a line for each rank.

        Raises:
            InputError: options that do not fit each other, the model or the machine.
            RunError: no request completed.
        """
        if self.kind == "none":
            self._refuse_adapter_options()
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise InputError(f"--dtype is {self.dtype!r}, expected float32, bfloat16 or float16")
        for path, option in ((self.output, "output"), (self.plot, "plot")):
            if path is not None:
                require_file(path, self.overwrite, option)
        prepare_jax()
        from flora_jax.bench.receipts import machine, report, shares
        from flora_jax.bench.serving import setup
        from flora_jax.bench.serving.workload import WorkloadOptions, arrival_fields

        options = WorkloadOptions(**self.workload)
        targets = None if self.targets is None else tuple(self.targets.split(","))
        contenders = [
            setup.Contender(self.kind, number, targets)
            for number in _ranks(self.kind, self.rank, self.ranks)
        ]
        base = setup.find_base(self.model, self.preset)
        for contender in contenders:
            contender.targets_of(base.config)
        drawn, base = setup.plan_workload(base, options, self.kind != "none")
        read, kept = drawn.file_rows or (0, 0)
        if kept < read:
            say(f"{options.lengths}: {kept} of {read} rows pass the filter")
        engine = setup.engine_options(
            drawn.requests, max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens, decode_steps=self.decode_steps,
            resident_adapters=self.resident_adapters,
        )  # fmt: skip
        loaded = setup.load_base(base, dtype_of(self.dtype), options.seed)
        about = setup.describe_run(benchmark, base, loaded, options, drawn, engine)
        if self.limits:
            about["limits"] = machine.limits(about["dtype"])
        lines = []
        for contender in contenders:
            line = setup.measure(
                loaded, contender, setup.Measured(benchmark, drawn, engine, options.seed, asked)
            )
            if self.limits:
                size = {"float32": 4}.get(about["dtype"], 2)
                line["share_of_limit"] = shares.share_of_limit(
                    about["limits"], base.config, self.max_num_seqs, size, line
                )
            lines.append(line | arrival_fields(options) if benchmark == "latency" else line)
        if self.output is not None:
            report.write_results(self.output, about | {"results": lines})
        return lines

    def _refuse_adapter_options(self) -> None:
        """What would say nothing without adapters is a mistake."""
        for name, value, default in (
            ("targets", self.targets, None),
            ("resident-adapters", self.resident_adapters, None),
            ("num-adapters", self.workload["num_adapters"], None),
            ("adapter-distribution", self.workload["adapter_distribution"], "distinct"),
        ):
            if value != default:
                raise InputError(f"--{name} is {value}, expected none with --kind none")


def _show(
    benchmark: str,
    lines: list[dict[str, Any]],
    columns: dict[str, str],
    plot: Path | None,
    panels: dict[str, list[str]],
) -> None:
    from flora_jax.bench.receipts import report

    report.table(benchmark, lines, columns)
    if plot is not None:
        kind = lines[0]["kind"]
        drawn = {
            title: {
                f"{kind}, {name}": [(line["rank"], line[name]) for line in lines] for name in names
            }
            for title, names in panels.items()
        }
        report.plot_panels(plot, drawn, "rank", benchmark)
    for line in lines:
        for failure in line["errors"][:5]:
            say(f"{line['kind']} {line['rank']}, request {failure['index']}: {failure['error']}")


def _ranks(kind: str, rank: int | None, ranks: str | None) -> tuple[int, ...]:
    from flora_jax.bench.layer.options import parse_ranks

    if rank is not None and ranks is not None:
        raise InputError(f"--rank is {rank} and --ranks is {ranks}, expected one of them")
    if kind == "none":
        if rank is not None or ranks is not None:
            raise InputError(f"--rank is {rank or ranks}, expected none with --kind none")
        return (0,)
    return parse_ranks(ranks) if ranks is not None else (1 if rank is None else rank,)
