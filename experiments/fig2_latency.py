"""Figure 2 (right) of the paper: latency against rank, requests arriving at a given rate.

    python experiments/fig2_latency.py mini 164m --lengths LENGTHS.csv
    python experiments/fig2_latency.py --plot fig2_latency.png

Requests arrive by a Poisson process, each with its own adapter; all adapters lie on the device, of 3b
and 15b the last 128. The rate is 8/s on a GPU, as in the paper (3b, 15b: float16, 2,560 batched tokens;
1b-gpu is 1b in that way). Here it is a part of what the base alone can do: first the base's request
capacity is measured (all requests at once), then every contender, the base among them, at 0.5 and 0.9
of it. Lengths and results as in fig2_throughput.py: experiments/results/fig2_latency.jsonl has a line
for every finished run, which is not run again on the same machine
by the same commit.

Receipt: `164m` took 38 minutes on 2 cores of an Intel Xeon (Emerald Rapids), 12 of them compiling,
`mini` 34; experiments/figure2.md has the tables. 1b is not run yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from flora_jax.bench.receipts import collected, report
from flora_jax.bench.serving import setup
from flora_jax.bench.serving.drive import run_latency, run_throughput
from flora_jax.bench.serving.workload import WorkloadOptions, arrival_fields
from flora_jax.cli.common import prepare_jax, say
from flora_jax.cli.program import run_function
from flora_jax.files import require_file
from flora_jax.models.model import Model

RESULTS = Path(__file__).parent / "results" / "fig2_latency.jsonl"
PARTS = (0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run for a preset; ``rate`` is requests a second, ``None``: parts of the capacity."""

    num_prompts: int
    scale: float = 1.0
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    kinds: tuple[str, ...] = ("flora", "lora")
    rate: float | None = None
    dtype: str = "float32"
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    # On the device; the others are loaded as they are asked for. None: all, before the run.
    resident_adapters: int | None = None


GPU = Plan(
    1000,
    rate=8.0,
    dtype="float16",
    max_num_seqs=64,
    max_num_batched_tokens=2560,
    resident_adapters=128,
)
PLANS = {
    "mini": Plan(200),
    "164m": Plan(96, 0.25, ranks=(1, 4, 8, 32)),
    "1b": Plan(24, 0.125, ranks=(1, 4, 8)),
    # For a GPU, as in the paper.
    "1b-gpu": GPU,
    "3b": GPU,
    "15b": GPU,
}


def contenders(plan: Plan) -> Iterator[setup.Contender]:
    """The base first, since the rates may come from it; then a rank's kinds after each other."""
    yield setup.Contender("none", 0)
    for rank in plan.ranks:
        for kind in plan.kinds:
            yield setup.Contender(kind, rank)


class Runs:
    """The runs of a preset, those that are in the results already left out."""

    def __init__(self, preset: str, plan: Plan, lengths: Path | None, seed: int, repeat: int):
        preset = preset.removesuffix("-gpu")
        self.preset, self.plan, self.seed = preset, plan, seed
        self.options = WorkloadOptions(
            num_prompts=plan.num_prompts, lengths=lengths, scale=plan.scale, seed=seed
        )
        same = self.options.to_dict()
        del same["request_rate"]
        self.key = {
            "preset": preset, "repeat": repeat, "dtype": plan.dtype,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens, "workload": same,
        }  # fmt: skip
        if plan.resident_adapters is not None:
            self.key["resident_adapters"] = plan.resident_adapters
        requests, self.base = setup.plan_workload(
            setup.find_base(None, preset), self.options, adapted=False
        )
        self.engine = setup.engine_options(
            requests.requests, max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            resident_adapters=plan.resident_adapters,
        )  # fmt: skip
        self.model: Model | None = None

    def run(self) -> None:
        for contender in contenders(self.plan):
            wanted = list(self._missing(contender))
            if not wanted:
                continue
            if self.model is None:
                self.model = setup.load_base(self.base, self.plan.dtype, self.seed)
            workload, _ = setup.plan_workload(self.base, self.options, contender.kind != "none")
            name = f"{self.preset} {contender.kind} {contender.rank}"
            total = len(wanted) * len(workload.requests)
            with (
                setup.bars(name, total) as (compiled, ended),
                setup.running(
                    self.model, contender, workload, self.engine, self.seed, compiled
                ) as (engine, about),
            ):
                for part in wanted:
                    key = self._key(contender, part)
                    if part is None:
                        found = run_throughput(engine, workload.requests, on_end=ended)
                        extra: dict[str, Any] = {}
                    else:
                        own = dataclasses.replace(self.options, request_rate=self._rate(part))
                        timed, _ = setup.plan_workload(self.base, own, contender.kind != "none")
                        found = run_latency(engine, timed.requests, timed.arrivals_s, on_end=ended)
                        extra = arrival_fields(own)
                    collected.append_line(RESULTS, key, about | extra | found)
                    say(f"{name}, load {part}: {found['request_throughput']:.3g} requests/s")
            jax.clear_caches()

    def _key(self, contender: setup.Contender, part: float | None) -> dict[str, Any]:
        return self.key | {"kind": contender.kind, "rank": contender.rank, "load": part}

    def _missing(self, contender: setup.Contender) -> Iterator[float | None]:
        """The loads not measured yet: ``None`` is the base's capacity, 1 a rate given as such."""
        loads: list[float | None] = [1.0] if self.plan.rate is not None else [*PARTS]
        if contender.kind == "none" and self.plan.rate is None:
            loads.insert(0, None)
        return (load for load in loads if not collected.find(RESULTS, self._key(contender, load)))

    def _rate(self, load: float) -> float:
        """Requests a second."""
        if self.plan.rate is not None:
            return self.plan.rate
        key = self._key(setup.Contender("none", 0), None)
        line = collected.find(RESULTS, key)
        assert line is not None  # The base's is measured first.
        return load * line["request_throughput"]


_SHOWN = {
    "load": "load", "request_rate": "rate/s", "kind": "kind", "rank": "rank", "failed": "failed",
    "mean_ttft_ms": "mean TTFT ms", "p99_ttft_ms": "p99 TTFT ms",
    "mean_tpot_ms": "mean TPOT ms", "p99_tpot_ms": "p99 TPOT ms",
    "mean_e2el_ms": "mean E2EL ms", "p99_itl_ms": "p99 ITL ms",
}  # fmt: skip


def show(plot: Path | None) -> None:
    """Prints a table for each preset that has results, and draws TTFT and TPOT for each load."""
    lines = [line for line in collected.read_lines(RESULTS) if line["load"] is not None]
    panels: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for title, own in collected.by_preset(lines).items():
        own.sort(key=lambda line: (line["load"], line["kind"], line["rank"], line["repeat"]))
        report.table(f"Latency, {title}", own, _SHOWN)
        for metric in ("ttft", "tpot"):
            series: dict[str, list[tuple[float, float | None]]] = {}
            ranks = [line["rank"] for line in own if line["rank"]] or [1]
            for line in own:
                name, value = f"{line['kind']} at {line['load']:g}", line[f"mean_{metric}_ms"]
                at = {min(ranks), max(ranks)} if line["kind"] == "none" else {line["rank"]}
                series.setdefault(name, []).extend((rank, value) for rank in sorted(at))
            panels[f"{title}: mean {metric.upper()}"] = series
    if plot is not None and panels:
        report.plot_panels(plot, panels, "rank", "ms", logx=True, logy=True)


def main(
    presets: Annotated[list[str] | None, typer.Argument(help=", ".join(PLANS))] = None,
    lengths: Annotated[Path | None, typer.Option(help="CSV of request lengths.")] = None,
    seed: int = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of everything.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the figure.")] = None,
) -> None:
    """Runs the presets, and shows all results so far."""

    def run(preset: str, repeat: int) -> None:
        Runs(preset, PLANS[preset], lengths, seed, repeat).run()

    if plot is not None:
        require_file(plot, overwrite=True, option="plot")
    prepare_jax()
    collected.run_presets(RESULTS, presets or [], PLANS, repeats, run)
    show(plot)


if __name__ == "__main__":
    run_function(main)
