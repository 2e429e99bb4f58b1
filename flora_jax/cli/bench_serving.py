"""``flora-jax bench throughput`` and ``latency``: the engine under a workload."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flora_jax.cli.common import MODEL_HELP, dtype_of, prepare_jax, say, source
from flora_jax.errors import InputError

Model = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
Preset = Annotated[
    str | None, typer.Option(help="In place of MODEL random weights: mini, 164m, 1b, 3b or 15b.")
]
Kind = Annotated[
    str,
    typer.Option(
        help="flora, lora, ia3, hira, none; sequential: FLoRA, one adapter at a time; "
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
Distribution = Annotated[str, typer.Option(help="distinct (one a request), uniform or zipf.")]
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
) -> None:
    """Tokens a second where all requests are there at once, each with a random adapter."""
    lines = _run("throughput", {}, **locals())
    _show("throughput", lines, _THROUGHPUT, plot, {"output tokens/s": ["output_throughput"]})


def latency(
    model: Model = None,
    preset: Preset = None,
    kind: Kind = "flora",
    rank: Rank = None,
    ranks: Ranks = None,
    targets: Targets = None,
    request_rate: Annotated[
        str, typer.Option(help="Requests a second, inf, or trace: the times of --lengths.")
    ] = "inf",
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson; less is burstier, more is more regular.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests in the engine at most; the others wait outside.")
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Bounds, as 'ttft:500 tpot:50' (e2el too)."),
    ] = None,
    metric_percentiles: Annotated[str, typer.Option(help="Comma-separated.")] = "90,99",
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
) -> None:
    """Latencies in milliseconds where requests arrive in real time, each with a random adapter."""
    given = locals()
    from flora_jax.bench.serving.latency_metrics import parse_goodput

    if max_concurrency is not None and max_concurrency < 1:
        raise InputError(f"--max-concurrency is {max_concurrency}, expected at least 1")
    asked = {
        "max_concurrency": given.pop("max_concurrency"),
        "goodput_ms": parse_goodput(given.pop("goodput") or []),
        "percentiles": _percentiles(given.pop("metric_percentiles")),
    }
    lines = _run("latency", asked, **given)
    columns = {
        name: text for name, text in _LATENCY.items() if asked["goodput_ms"] or "good" not in text
    }
    top = f"p{max(asked['percentiles']):g}"
    columns |= {
        f"{statistic}_{metric}_ms": f"{statistic} {metric.upper()}"
        for metric in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("median", top)
    }
    panels = {m.upper() + " in ms": [f"mean_{m}_ms", f"{top}_{m}_ms"] for m in ("ttft", "tpot")}
    _show("latency", lines, columns, plot, panels)


def _run(
    benchmark: Literal["throughput", "latency"],
    asked: dict[str, Any],
    *,
    model: str | None,
    preset: str | None,
    kind: str,
    rank: int | None,
    ranks: str | None,
    targets: str | None,
    dtype: str | None,
    output: Path | None,
    plot: Path | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    decode_steps: int,
    resident_adapters: int | None,
    request_rate: str = "inf",
    limits: bool = False,
    **workload: Any,
) -> list[dict[str, Any]]:
    """Checks everything that can be checked, then measures a line for each rank."""
    from flora_jax.bench.receipts import report
    from flora_jax.bench.serving.workload import WorkloadOptions

    if kind == "none":
        _refuse_adapter_options(targets, resident_adapters, workload)
    options = WorkloadOptions(request_rate=_rate(request_rate), **workload)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype!r}, expected float32, bfloat16 or float16")
    for path, option in ((output, "output"), (plot, "plot")):
        if path is not None:
            report.check_output(path, option)
    prepare_jax()
    from flora_jax.bench.serving import setup

    contenders = [
        setup.Contender(kind, number, None if targets is None else tuple(targets.split(",")))
        for number in _ranks(kind, rank, ranks)
    ]
    base = setup.find_base(None if model is None else source(model), preset)
    drawn, base = setup.plan_workload(base, options, kind != "none")
    read, kept = drawn.file_rows or (0, 0)
    if kept < read:
        say(f"{options.lengths}: {kept} of {read} rows pass the filter")
    engine = setup.engine_options(
        drawn.requests, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        decode_steps=decode_steps, resident_adapters=resident_adapters,
    )  # fmt: skip
    loaded = setup.load_base(base, dtype_of(dtype), options.seed)
    from flora_jax.bench.receipts import machine, shares

    lines = []
    about = setup.describe_run(benchmark, base, loaded, options, drawn, engine)
    if limits:
        about["limits"] = machine.limits(about["dtype"])
    for contender in contenders:
        with setup.bars(f"{kind} {contender.rank}", len(drawn.requests)) as (compiled, ended):
            line = setup.measure(
                benchmark, loaded, contender, drawn, engine, options.seed, compiled, ended, **asked
            )
        if limits:
            size = {"float32": 4}.get(about["dtype"], 2)
            line["share_of_limit"] = shares.share_of_limit(
                about["limits"], base.config, max_num_seqs, size, line
            )
        lines.append(line | setup.arrival_fields(options) if benchmark == "latency" else line)
    if output is not None:
        report.write_results(output, about | {"results": lines})
    return lines


def _refuse_adapter_options(
    targets: str | None, resident: int | None, workload: dict[str, Any]
) -> None:
    """What would say nothing without adapters is a mistake."""
    for name, value, default in (
        ("targets", targets, None),
        ("resident-adapters", resident, None),
        ("num-adapters", workload["num_adapters"], None),
        ("adapter-distribution", workload["adapter_distribution"], "distinct"),
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


def _rate(text: str) -> Any:
    if text == "trace":
        return text
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if math.isnan(rate):
        raise InputError(f"--request-rate is {text!r}, expected a number above 0, inf or trace")
    return rate


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 < value <= 100 for value in found):
        raise InputError(f"--metric-percentiles is {text!r}, expected numbers above 0 up to 100")
    return found
