"""Figure 2 (left) of the paper: tokens a second against rank, every request with its own adapter.

    python experiments/fig2_throughput.py mini 164m 1b --lengths LENGTHS.csv
    python experiments/fig2_throughput.py --plot fig2_throughput.png

All requests are there at once, with lengths resampled from LENGTHS.csv (input_tokens,output_tokens; a
fit to ShareGPT without it). All adapters lie on the device, of 3b and 15b the last 128; a rank's kinds
run one after the other, so that a drift of the machine falls on both. "none" is the base alone.
"unmerged" is FLoRA by the paper's formula in prompts too, where the engine builds each `W_i`.
"sequential" serves FLoRA adapters one after another, the paper's other baseline: since every request
has its own, one request at a time (fewer requests, as it is slow). The paper's own figure is 3b and 15b
on an H100: float16, 8,192 batched tokens, 1,000 requests unscaled; 1b-gpu is 1b in that way. Weights
and adapters are random, and on all targets of PEFT's default for this model, c_attn.

Every finished run is a line of experiments/results/fig2_throughput.jsonl at once; one that is there
already, of the same plan, machine and commit, is not run again.

Receipt: on 2 cores of an Intel Xeon (Emerald Rapids) `164m` took 38 minutes, half of them compiling,
`mini` 61 and `1b` 17; on an AMD EPYC (Zen 4) `164m` 30; experiments/figure2.md has the tables and what
they say of the paper's claims.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from flora_jax.bench.receipts import collected, report
from flora_jax.bench.serving import setup
from flora_jax.bench.serving.workload import WorkloadOptions
from flora_jax.cli.common import prepare_jax, say
from flora_jax.cli.program import run_function
from flora_jax.files import require_file
from flora_jax.models.model import Model

RESULTS = Path(__file__).parent / "results" / "fig2_throughput.jsonl"
ALL_RANKS = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run for a preset; the sequential baseline has its own ranks and number of requests,
    the formula unmerged its own ranks.
    """

    num_prompts: int
    scale: float = 1.0
    ranks: tuple[int, ...] = ALL_RANKS
    kinds: tuple[str, ...] = ("flora", "lora")
    unmerged_ranks: tuple[int, ...] = ()
    sequential_ranks: tuple[int, ...] = (1, 8)
    sequential_prompts: int = 16
    dtype: str = "float32"
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    # On the device; the others are loaded as they are asked for. None: all, before the run.
    resident_adapters: int | None = None


GPU = Plan(
    1000, dtype="float16", max_num_seqs=64, max_num_batched_tokens=8192, resident_adapters=128
)
PLANS = {
    "mini": Plan(1000, sequential_prompts=64),
    "164m": Plan(128, 0.25, unmerged_ranks=(8,)),
    "1b": Plan(32, 0.125, ranks=(1, 4, 8), sequential_ranks=(1,), sequential_prompts=4),
    # For a GPU.
    "1b-gpu": GPU,
    "3b": GPU,
    "15b": GPU,
}


def contenders(plan: Plan) -> Iterator[tuple[setup.Contender, int]]:
    """The lines of the figure with the number of their requests, in the order in which they run."""
    yield setup.Contender("none", 0), plan.num_prompts
    for rank in plan.ranks:
        for kind in plan.kinds:
            yield setup.Contender(kind, rank), plan.num_prompts
    for rank in plan.unmerged_ranks:
        yield setup.Contender("unmerged", rank), plan.num_prompts
    for rank in plan.sequential_ranks:
        yield setup.Contender("sequential", rank), plan.sequential_prompts


def run_preset(preset: str, plan: Plan, lengths: Path | None, seed: int, repeat: int) -> None:
    """Runs what is not in the results yet; ``preset`` is a plan's name."""
    preset = preset.removesuffix("-gpu")
    model: Model | None = None
    for contender, count in contenders(plan):
        options = WorkloadOptions(num_prompts=count, lengths=lengths, scale=plan.scale, seed=seed)
        key = {
            "preset": preset, "kind": contender.kind, "rank": contender.rank, "repeat": repeat,
            "dtype": plan.dtype, "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens, "workload": options.to_dict(),
        }  # fmt: skip
        if plan.resident_adapters is not None:
            key["resident_adapters"] = plan.resident_adapters
        if collected.find(RESULTS, key):
            continue
        base = setup.find_base(None, preset)
        # All contenders have the same model, also those with fewer and perhaps shorter requests.
        whole = dataclasses.replace(options, num_prompts=max(count, plan.num_prompts))
        whole_workload, base = setup.plan_workload(base, whole, adapted=False)
        workload, _ = setup.plan_workload(base, options, contender.kind != "none")
        engine = setup.engine_options(
            whole_workload.requests, max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            resident_adapters=plan.resident_adapters,
        )  # fmt: skip
        if model is None:
            model = setup.load_base(base, plan.dtype, seed)
        name = f"{preset} {contender.kind} {contender.rank}"
        asked = setup.Measured("throughput", workload, engine, seed)
        found = setup.measure(model, contender, asked)
        about = {"positions": base.config.n_positions, "engine": dataclasses.asdict(engine)}
        collected.append_line(RESULTS, key, about | found)
        say(f"{name}: {found['output_throughput']:.1f} output tokens/s, {found['failed']} failed")
        # Programs of an engine that is gone are of no use, and there is one set for each.
        jax.clear_caches()


def medians(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contender of a preset the medians over repeats, and its ratio to the base."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["kind"], line["rank"]), []).append(line)
    rows = []
    for (kind, rank), group in sorted(groups.items()):
        row: dict[str, Any] = {"kind": kind, "rank": rank, "runs": len(group)}
        # More than one: the code changed between these runs.
        row["commits"] = len({line["versions"]["commit"] for line in group})
        row["failed"] = sum(line["failed"] for line in group)
        for name in ("request_throughput", "output_throughput", "total_token_throughput"):
            row[name] = statistics.median(line[name] for line in group)
        rows.append(row)
    base = next((row["output_throughput"] for row in rows if row["kind"] == "none"), None)
    for row in rows:
        row["to_base"] = None if base is None else row["output_throughput"] / base
    return rows


def show(plot: Path | None) -> None:
    """Prints a table and draws a panel for each preset that has results."""
    lines = collected.read_lines(RESULTS)
    panels: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for title, own in collected.by_preset(lines).items():
        rows = medians(own)
        report.table(f"Throughput, {title}", rows, [*rows[0]])
        series: dict[str, list[tuple[float, float | None]]] = {}
        for row in rows:
            series.setdefault(row["kind"], []).append((row["rank"], row["output_throughput"]))
        ranks = [row["rank"] for row in rows if row["rank"]]
        if "none" in series and ranks:  # The base has no rank: a level over all of them.
            series["none"] = [(x, series["none"][0][1]) for x in (min(ranks), max(ranks))]
        panels[title] = series
    if plot is not None and panels:
        report.plot_panels(plot, panels, "rank", "output tokens/s", logx=True)


def main(
    presets: Annotated[list[str] | None, typer.Argument(help=", ".join(PLANS))] = None,
    lengths: Annotated[Path | None, typer.Option(help="CSV of request lengths.")] = None,
    seed: int = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of everything; medians are shown.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the figure.")] = None,
) -> None:
    """Runs the presets, and shows all results so far."""

    def run(preset: str, repeat: int) -> None:
        run_preset(preset, PLANS[preset], lengths, seed, repeat)

    if plot is not None:
        require_file(plot, overwrite=True, option="plot")
    prepare_jax()
    collected.run_presets(RESULTS, presets or [], PLANS, repeats, run)
    show(plot)


if __name__ == "__main__":
    run_function(main)
