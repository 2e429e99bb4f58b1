"""A model of the paper's Figure 2 on a GPU, where none is: the real scheduler on a simulated clock.

    python experiments/fig2_model.py --lengths LENGTHS.csv

Nothing here is measured. `flora_jax.plan.simulate` serves the requests of fig2_throughput.py and
fig2_latency.py (1,000, float16, 64 rows, every request with its own adapter on c_attn) with the
engine's scheduler, shapes and choice of pieces, and every dispatch takes what
`flora_jax.plan.roofline` says of the card: how a step is modelled is written there. All adapters lie
on the device, sampling and the host are left out (`--host-ms` puts the host back in), and a kernel is
as good as its bytes and operations. LoRA is ours, added in one pass ("lora"), and the paper's, two
batched products after a gather ("lora, bmm"). Throughput with all requests there at once; time per
token after the first at 8 requests a second, the paper's rate.

experiments/results/fig2_model.json has the points; fig2_model_throughput.png, fig2_model_latency.png and
fig2_model_ratio.png show them. The last is FLoRA's throughput as a part of that of LoRA in two batched
products, beside what the paper says of it (figure2.md): above 3 at rank 1, about 2.5 at rank 2, and level
near rank 8 at 15B.

Receipt: 7 minutes on 2 busy cores, with ShareGPT's lengths (mean 148 and 291 tokens); figure2.md says
what it shows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flora_jax.bench.layer.options import parse_ranks
from flora_jax.bench.receipts import report
from flora_jax.bench.serving.workload import WorkloadOptions, draw_arrivals, draw_lengths
from flora_jax.cli.common import say
from flora_jax.cli.program import run_function
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.plan.cards import card
from flora_jax.plan.roofline import Lora, Ways
from flora_jax.plan.setting import Setting
from flora_jax.plan.simulate import Arrival, Outcome, Simulation

RESULTS = Path(__file__).parent / "results"
NAMES = ("1b", "3b", "15b")
# Kind of adapter, way of LoRA, and the name in the picture.
CONTENDERS: tuple[tuple[str, Lora, str], ...] = (
    ("flora", "fused", "flora"), ("lora", "fused", "lora"), ("lora", "bmm", "lora, bmm"),
)  # fmt: skip
ROWS = 64
BATCHED = {"throughput": 8192, "latency": 2560}
RATE = 8.0
# experiments/figure2.md, of FLoRA beside LoRA in two batched products: rank and times as fast.
PAPER = ((1, 3.0), (2, 2.5), (8, 1.0))


def workloads(lengths: Path | None, count: int, seed: int) -> dict[str, list[Arrival]]:
    """The requests of both figures: all at once, and at the paper's rate."""
    options = WorkloadOptions(num_prompts=count, lengths=lengths, seed=seed)
    pairs = draw_lengths(options).pairs.tolist()
    times_s = draw_arrivals(dataclasses.replace(options, request_rate=RATE))
    return {
        "throughput": [Arrival(0.0, prompt, output) for prompt, output in pairs],
        "latency": [Arrival(float(at_s), *pair) for at_s, pair in zip(times_s, pairs, strict=True)],
    }


def simulate(
    preset: str, gpu: str, kind: str, rank: int, lora: Lora, arrivals: dict[str, list[Arrival]],
    host_ms: float,
) -> dict[str, Any]:  # fmt: skip
    """One point of both figures."""
    context = max(one.prompt + one.output for one in arrivals["throughput"])
    setting = Setting(
        preset, PRESETS[preset], card(gpu), kind=kind, rank=rank, max_num_seqs=ROWS,
        max_model_len=context,
    )  # fmt: skip

    def served(benchmark: str) -> Outcome:
        own = Simulation(
            setting, Ways(lora=lora), max_num_batched_tokens=BATCHED[benchmark], host_ms=host_ms
        )
        return own.run(arrivals[benchmark])

    all_at_once, at_rate = served("throughput"), served("latency")
    return {
        "preset": preset,
        "kind": kind,
        "lora": lora if kind == "lora" else None,
        "rank": rank,
        "output_throughput": round(all_at_once.output_throughput, 1),
        "request_throughput": round(len(all_at_once.served) / all_at_once.duration_s, 3),
        "mean_tpot_ms": round(at_rate.tpot_ms, 3),
        "mean_ttft_ms": round(at_rate.ttft_ms, 2),
        "decode_steps": all_at_once.steps,
    }


def pictures(lines: list[dict[str, Any]], gpu: str) -> None:
    """Draws the three figures."""
    panels: dict[str, dict[str, dict[str, list[tuple[float, float | None]]]]] = {}
    ratios: dict[str, list[tuple[float, float | None]]] = {}
    for preset in NAMES:
        own = [line for line in lines if line["preset"] == preset]
        title = f"{preset}, {gpu}, modelled"
        base = next(line for line in own if line["kind"] == "none")
        ranks = sorted({line["rank"] for line in own if line["rank"]})
        for value in ("output_throughput", "mean_tpot_ms"):
            series = panels.setdefault(value, {}).setdefault(title, {})
            series["none"] = [(rank, base[value]) for rank in (ranks[0], ranks[-1])]
            for kind, lora, name in CONTENDERS:
                series[name] = [
                    (line["rank"], line[value]) for line in own
                    if line["kind"] == kind and line["lora"] in (None, lora)
                ]  # fmt: skip
        found = panels["output_throughput"][title]
        ratios[preset] = [
            (rank, flora / lora)
            for (rank, flora), (_, lora) in zip(found["flora"], found["lora, bmm"], strict=True)
            if flora is not None and lora is not None
        ]
    ratios["the paper (figure2.md)"] = [*PAPER]
    for name, value, label in (
        ("throughput", "output_throughput", "output tokens/s, modelled"),
        ("latency", "mean_tpot_ms", f"ms a token at {RATE:g} requests/s, modelled"),
    ):
        path = RESULTS / f"fig2_model_{name}.png"
        report.plot_panels(path, panels[value], "rank", label, logx=True)
    report.plot_lines(
        RESULTS / "fig2_model_ratio.png", ratios, "rank", "FLoRA / LoRA in two batched products",
        f"Throughput on {gpu}, modelled, beside the paper", logx=True,
    )  # fmt: skip


def main(
    lengths: Annotated[Path | None, typer.Option(help="CSV of request lengths.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or l4.")] = "h100",
    ranks: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,4,8,16,32",
    num_prompts: Annotated[int, typer.Option(help="Requests.")] = 1000,
    host_ms: Annotated[float, typer.Option(help="Of a dispatch, while the device works.")] = 0.0,
    seed: int = 0,
) -> None:
    """Simulates all presets, kinds and ranks, and draws them."""
    arrivals = workloads(lengths, num_prompts, seed)
    lines = []
    for preset in NAMES:
        lines.append(simulate(preset, gpu, "none", 0, "fused", arrivals, host_ms))
        for rank in parse_ranks(ranks):
            for kind, lora, _ in CONTENDERS:
                lines.append(simulate(preset, gpu, kind, rank, lora, arrivals, host_ms))
        say(f"{preset}: done")
    for preset in NAMES:
        own = [line for line in lines if line["preset"] == preset]
        report.table(f"{preset} on {gpu}: a model, nothing measured", own, [*own[0]])
    asked = arrivals["throughput"]
    about = {
        "what": "a model: the real scheduler on a simulated clock; nothing was measured",
        "gpu": gpu,
        "card": dataclasses.asdict(card(gpu)),
        "ways": dataclasses.asdict(Ways()),
        "dtype": "float16",
        "max_num_seqs": ROWS,
        "max_num_batched_tokens": BATCHED,
        "request_rate": RATE,
        "host_ms": host_ms,
        "seed": seed,
        "lengths": None if lengths is None else lengths.name,
        "num_prompts": len(asked),
        "mean_input_tokens": float(np.mean([one.prompt for one in asked])),
        "mean_output_tokens": float(np.mean([one.output for one in asked])),
        "paper": [{"rank": rank, "times": times} for rank, times in PAPER],
    }
    report.write_results(RESULTS / "fig2_model.json", about | {"results": lines})
    pictures(lines, gpu)


if __name__ == "__main__":
    run_function(main)
