"""Tables and pictures from the results of ``run.py``, of one or more runs on one card.

    python experiments/gpu/report.py DIR [DIR …] [--output DIR]

Writes ``report.md``, and ``figure2.png`` and ``eq7.png`` where there are figures for them, into the first
DIR or the one given. A later figure of the same item replaces an earlier one; what failed or was left out
is listed. A line that a killed process left half written is skipped, and counted. Figures of two cards,
or of a rehearsal and a card, never stand in one table: that is an error.

Figure 2 has throughput and time per token against rank, a panel for each model; where no run had all of
a model's layers the panel's title says how many it had. ``paper.csv`` beside this program has the paper's
own points (``model,metric,kind,rank,value``; metric is ``throughput`` in tokens a second or
``ms_per_token``): it is empty until somebody reads them off the paper, and none are invented.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flora_jax.bench.layer import eq7
from flora_jax.bench.receipts import report
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.files import whole_file
from flora_jax.models.starcoder.config import PRESETS

PAPER = Path(__file__).with_name("paper.csv")
# What the paper says of its Figure 2 in words, as experiments/figure2.md quotes it.
CLAIMS = (
    "FLoRA above 3x bmm-LoRA at rank 1, about 2.5x at rank 2",
    "throughput of FLoRA falls with the rank",
    "crossover near rank 8 for 15B, later for smaller models",
    "latency follows throughput",
)
Line = Mapping[str, Any]
Points = dict[str, list[tuple[float, float | None]]]
# What an item measured; everything else in its line says what it was.
_FOUND = frozenset(
    "at_s took_s compiled_s us us_q1 us_q3 build_us relative calls ms ms_step ms_step_waited host_ms "
    "tok_s TB_s TFLOP_s least_us waited_us queued_us broken loss peak_GB first_s made_s ready_s "
    "output_throughput total_token_throughput duration iterations failed skipped compilations "
    "overhead_us requests_failed c1 c2 c1_over_c2 fit_error predicted_rank measured_rank verdict "
    "changes steps us_lists us_arguments us_forward us_draw".split()
)


class Results(NamedTuple):
    """All items of some runs on one card, each stage's last end; ``broken`` lines are not whole."""

    about: Line
    items: list[Line]
    stages: list[Line]
    broken: int


def read(directories: Sequence[Path]) -> Results:
    """The lines of the directories' ``results.jsonl``, in their order.

    Raises:
        InputError: no such file, no run in it, or runs on different cards.
    """
    runs: list[tuple[Path, Line]] = []
    lines: list[Line] = []
    broken = 0
    for directory in directories:
        path = directory / "results.jsonl" if directory.is_dir() else directory
        try:
            texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        before = len(runs)
        for text in filter(None, map(str.strip, texts)):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                broken += 1
                continue
            if not isinstance(line, dict) or "stage" not in line:
                broken += 1
            elif line["stage"] == "run":
                runs.append((path, line))
            else:
                lines.append(line)
        if len(runs) == before:
            raise InputError(f"{path}: no line says which card it was measured on")
    first, about = runs[0]
    for path, own in runs:
        if (own["card"], own["rehearse"]) != (about["card"], about["rehearse"]):
            raise InputError(
                f"{path} was measured on {own['card']}, {first} on {about['card']}: "
                "figures of two cards do not go into one table"
            )
    latest: dict[str, Line] = {}
    for line in lines:
        if "item" in line:
            if line.get("first_s", 0.0) < 0:
                line = {**line, "failed": "prompts in less than no time: it was not warm"}
            key = json.dumps({n: v for n, v in line.items() if n not in _FOUND}, sort_keys=True)
            if key in latest and _without_figure(line):
                continue
            latest[key] = line
    # A stage that was run again ended as it did the last time.
    ends = {line["stage"]: line for line in lines if "rc" in line}
    return Results(about, [*latest.values()], [*ends.values()], broken)


def _without_figure(line: Line) -> bool:
    return isinstance(line.get("failed"), str) or "skipped" in line


def select(items: Iterable[Line], item: str, **wanted: Any) -> list[Line]:
    """The items of this name that have a figure, with these values."""
    return [
        line for line in items
        if line["item"] == item and not _without_figure(line)
        and all(line.get(name) == value for name, value in wanted.items())
    ]  # fmt: skip


def markdown(rows: Sequence[Line], columns: Mapping[str, str]) -> str:
    """A table: numbers with four digits, a dash where there is none; empty columns are left out."""
    shown = {
        key: head for key, head in columns.items() if any(r.get(key) is not None for r in rows)
    }
    numeric = {
        key: all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
        for key in shown
    }
    text = [
        f"| {' | '.join(shown.values())} |",
        f"|{'|'.join('---:' if numeric[key] else '---' for key in shown)}|",
    ]
    text += [f"| {' | '.join(_cell(row.get(key)) for key in shown)} |" for row in rows]
    return "\n".join(text) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def ceilings(items: Sequence[Line]) -> str:
    names = {"stage": "by", "item": "what", "rows": "rows", "dtype": "dtype", "us": "µs", "TB_s": "TB/s",
             "TFLOP_s": "TFLOP/s", "waited_us": "waited for, µs", "queued_us": "queued, µs"}  # fmt: skip
    rows = [line for line in items if line["stage"].startswith("ceilings")]
    return _part(
        "Ceilings", [r for r in rows if r["item"] != "devices" and not _without_figure(r)], names
    )


def decode(items: Sequence[Line]) -> str:
    names = {"preset": "model", "layers": "layers", "rows": "rows", "positions": "positions",
             "attention": "attention", "kind": "kind", "rank": "rank", "ms_step": "ms a step",
             "ms_step_waited": "waited for", "host_ms": "host, ms a dispatch", "tok_s": "tokens/s",
             "to_base": "x base", "stage": "stage"}  # fmt: skip
    rows = select(items, "decode")
    base = {_place(row): row["ms_step"] for row in rows if row["kind"] == "none"}
    whole = [
        {**row, "to_base": row["ms_step"] / base[_place(row)] if _place(row) in base else None}
        for row in rows
    ]
    return _part("A decode step", whole, names)


def _place(row: Line) -> tuple[Any, ...]:
    return tuple(
        row.get(n) for n in ("stage", "preset", "layers", "rows", "positions", "attention")
    )


def prefill(items: Sequence[Line]) -> str:
    names = {"preset": "model", "layers": "layers", "tokens": "tokens", "attention": "attention",
             "kind": "kind", "rank": "rank", "ms": "ms", "tok_s": "tokens/s",
             "TFLOP_s": "TFLOP/s"}  # fmt: skip
    return _part("A prompt", select(items, "prefill"), names)


def layers(items: Sequence[Line]) -> str:
    names = {"preset": "model", "target": "projection", "rows": "rows", "tokens": "tokens", "by": "by",
             "kind": "kind", "rank": "rank", "us": "µs", "relative": "x base",
             "build_us": "weights built, µs"}  # fmt: skip
    rows = [{**row, "by": _by(row)} for row in select(items, "case")]
    base = {_shape(row): row["us"] for row in rows if row["kind"] == "base"}
    whole = [
        {**row, "relative": row["us"] / base[_shape(row)] if _shape(row) in base else None}
        for row in rows
    ]
    whole.sort(key=lambda row: (str(_shape(row)), row["by"], row["kind"], row.get("rank") or 0))
    return _part("One projection", whole, names)


def _by(row: Line) -> str:
    return row["form"] if "form" in row else f"torch, {row['how']}"


def _shape(row: Line) -> tuple[Any, ...]:
    """What a case's base has in common with it: torch's ways have one each, JAX's forms one together."""
    how = (row["stage"], row.get("how", "").removeprefix("compiled "))
    return (*(row.get(name) for name in ("preset", "target", "rows", "tokens")), *how)


def crossovers(items: Sequence[Line]) -> list[dict[str, Any]]:
    """Eq. 7 for every shape and form with both kinds, fitted to all of its ranks."""
    cases = select(items, "case")
    groups: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    base = {_shape(row): row["us"] * 1e-6 for row in cases if row["kind"] == "base"}
    for row in cases:
        if row["kind"] in ("flora", "lora") and row.get("form") != "merged":
            own = groups.setdefault((*_shape(row), _by(row)), {})
            own.setdefault(row["kind"], {})[row["rank"]] = row["us"] * 1e-6
    sizes = {(row["preset"], row["target"]): (row["inputs"], row["outputs"]) for row in cases}
    found = []
    for place, own in groups.items():
        if not own.keys() >= {"flora", "lora"}:
            continue
        preset, target, rows, tokens = place[:4]
        inputs, outputs = sizes[preset, target]
        one = base.get(place[:-1])
        model = eq7.fit(inputs, outputs, rows * tokens, own["flora"], own["lora"], one)
        crossing = eq7.measured_crossing(own["flora"], own["lora"])
        found.append(
            {
                "preset": preset, "target": target, "rows": rows, "tokens": tokens, "by": place[-1],
                "width": inputs, "c1_over_c2": model.c1 / model.c2 if model.c2 else None,
                "fit_error": model.error, "measured_rank": crossing.rank,
                "predicted_rank": eq7.predicted_rank(model, inputs, outputs),
                "verdict": crossing.verdict,
            }
        )  # fmt: skip
    return found


def equation(items: Sequence[Line]) -> str:
    names = {"preset": "model", "target": "projection", "rows": "rows", "tokens": "tokens", "by": "by",
             "c1_over_c2": "c1/c2", "fit_error": "error of the fit", "predicted_rank": "Eq. 7: rank",
             "measured_rank": "measured", "verdict": "in words"}  # fmt: skip
    return _part("Eq. 7: the rank from which FLoRA costs more than LoRA", crossovers(items), names)


def peers(items: Sequence[Line]) -> str:
    names = {"peer": "peer", "preset": "model", "layers": "layers", "rows": "rows", "kind": "kind",
             "rank": "rank", "ms_step": "ms a step", "tok_s": "tokens/s",
             "first_s": "prompts, s"}  # fmt: skip
    return _part("The peers' decode step", select(items, "generate"), names)


def training(items: Sequence[Line]) -> str:
    names = {"by": "by", "preset": "model", "layers": "layers", "rows": "rows", "tokens": "tokens",
             "kind": "kind", "rank": "rank", "adapters": "adapters", "attention": "attention",
             "ms": "ms a step",
             "tok_s": "tokens/s", "peak_GB": "peak, GB"}  # fmt: skip
    rows = [
        {**row, "by": f"PEFT, {row['how']}" if "how" in row else "flora_jax"}
        for row in select(items, "train")
    ]
    return _part("A training step", rows, names)


def engine(items: Sequence[Line]) -> str:
    names = {"preset": "model", "layers": "layers", "rows": "rows", "prompt": "prompt", "new": "new",
             "kind": "kind", "rank": "rank", "prompts": "prompts were",
             "output_throughput": "output tokens/s", "duration": "s",
             "ready_s": "until ready, s"}  # fmt: skip
    # Lines that do not say it are of runs whose untimed one had left the prompts in the cache.
    lines = [{"prompts": "cached", **line} for line in select(items, "engine")]
    return _part("The engine", lines, names)


def host(items: Sequence[Line]) -> str:
    names = {"preset": "model", "layers": "layers", "rows": "rows", "kind": "kind", "rank": "rank",
             "us_lists": "lists, µs a dispatch", "us_arguments": "arguments, µs a step",
             "us_forward": "forward", "us_draw": "draw"}  # fmt: skip
    return _part("What launching costs the host", select(items, "host"), names)


def missing(results: Results) -> str:
    """What has no figure, with its reason, and stages that did not end by themselves."""
    text = []
    for stage in results.stages:
        if stage["rc"] != 0:
            why = "ran past its limit" if stage.get("timed_out") else f"ended with {stage['rc']}"
            text.append(f"- {stage['stage']}: {stage.get('skipped') or why}")
    reasons: dict[tuple[str, str], int] = {}
    for line in results.items:
        if _without_figure(line):
            reason = line["failed"] if "failed" in line else f"left out, {line['skipped']}"
            key = line["stage"], str(reason)
            reasons[key] = reasons.get(key, 0) + 1
    text += [f"- {stage}, {count} items: {reason}" for (stage, reason), count in reasons.items()]
    if results.broken:
        text.append(f"- {results.broken} lines are not whole")
    return "## Without a figure\n\n" + "\n".join(text) + "\n" if text else ""


def _part(title: str, rows: Sequence[Line], columns: Mapping[str, str]) -> str:
    return f"## {title}\n\n{markdown(rows, columns)}" if rows else ""


def figure2(items: Sequence[Line], paper: Sequence[Line] = ()) -> dict[str, Points]:
    """Panels of throughput and time per token for each model, a line for every kind and source."""
    panels: dict[str, Points] = {}
    for preset in ("1b", "3b", "15b"):
        rows = _of_figure(preset, items)
        own = [line for line in paper if line["model"] == preset]
        for metric, key in (("throughput", "tok_s"), ("ms_per_token", "ms_step")):
            series: Points = {}
            for row in rows:
                name = row["kind"] if row["item"] == "decode" else f"torch {row['kind']}"
                series.setdefault(name, []).append((float(row["rank"]), float(row[key])))
            for line in own:
                if line["metric"] == metric:
                    points = series.setdefault(f"paper: {line['kind']}", [])
                    points.append((float(line["rank"]), float(line["value"])))
            if any(not name.endswith("none") for name in series):
                title = "tokens/s" if metric == "throughput" else "ms a token"
                whole = PRESETS[preset].n_layer
                if rows and rows[0]["layers"] < whole:
                    title += f", {rows[0]['layers']} of {whole} layers"
                panels[f"{preset}: {title}"] = _levelled(series)
    return panels


def _of_figure(preset: str, items: Sequence[Line]) -> list[Line]:
    """Of a model the run of the most layers, and of those the one with the most ranks; and the peers'
    with as many layers.
    """
    runs: dict[tuple[Any, ...], list[Line]] = {}
    for row in select(items, "decode", preset=preset):
        runs.setdefault(_place(row), []).append(row)
    if not runs:
        return []
    chosen = max(runs.values(), key=lambda own: (own[0]["layers"], len({r["rank"] for r in own})))
    alike = {"preset": preset, "layers": chosen[0]["layers"], "rows": chosen[0]["rows"]}
    return [*chosen, *select(items, "generate", **alike)]


def _levelled(series: Points) -> Points:
    """Sorted by rank; what has no rank, the base, is level over all of them."""
    ranks = [rank for points in series.values() for rank, _ in points if rank]
    found: Points = {}
    for name, points in series.items():
        level = [value for rank, value in points if not rank]
        ends = sorted({min(ranks), max(ranks)}) if ranks else [1.0]
        found[name] = [(rank, level[-1]) for rank in ends] if level else sorted(points)
    return found


def read_paper(path: Path = PAPER) -> list[dict[str, str]]:
    """The paper's points.

    Raises:
        InputError: a line without a number for its rank and value.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for number, line in enumerate(lines, 2):
        try:
            float(line["rank"]), float(line["value"])
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}, line {number}: expected model,metric,kind,rank,value"
            ) from None
    return lines


def eq7_panels(items: Sequence[Line]) -> dict[str, Points]:
    """Crossover rank over the width, measured and by Eq. 7, a panel for the shape of the batch."""
    panels: dict[str, Points] = {}
    for row in sorted(crossovers(items), key=lambda row: row["width"]):
        if row["target"] != "attn.c_attn":
            continue
        title = f"{row['rows']} rows of {row['tokens']}"
        for source, name in (("measured", "measured"), ("predicted", "Eq. 7")):
            line = panels.setdefault(title, {}).setdefault(f"{row['by']}, {name}", [])
            line.append((row["width"], row[f"{source}_rank"]))
    return panels


PARTS: tuple[Callable[[Sequence[Line]], str], ...] = (
    ceilings, decode, layers, equation, prefill, peers, training, engine, host,
)  # fmt: skip


def text(results: Results, paper: Sequence[Line] = ()) -> str:
    """The report as Markdown."""
    about = results.about
    versions = about.get("versions") or {}
    chosen = ("python", "jax", "jaxlib", "flax", "torch", "transformers", "peft")
    head = [
        f"# {about['card']}\n",
        f"Driver {about['driver']}, commit {about['commit']}, {about['date']}; "
        + ", ".join(f"{n} {versions[n]}" for n in chosen if versions.get(n)) + ".\n",
    ]  # fmt: skip
    if about["rehearse"]:
        head.append("A rehearsal at tiny shapes on a CPU: its numbers mean nothing.\n")
    claims = "\n".join(f"- {claim}" for claim in CLAIMS)
    note = "" if paper else "\nIts points are not in `paper.csv` yet, so no picture has them.\n"
    parts = [part(results.items) for part in PARTS]
    parts += [f"## What the paper says of Figure 2\n\n{claims}\n{note}", missing(results)]
    return "\n".join([*head, *filter(None, parts)])


def main(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Of run.py's results.")],
    output: Annotated[Path | None, typer.Option(help="Directory to write into.")] = None,
) -> None:
    """Writes report.md and the pictures."""
    results, paper = read(directories), read_paper()
    place = output or (directories[0] if directories[0].is_dir() else directories[0].parent)
    place.mkdir(parents=True, exist_ok=True)
    with whole_file(place / "report.md") as file:
        file.write(text(results, paper))
    print(place / "report.md")
    pictures = (
        ("figure2.png", figure2(results.items, paper), "rank", "tokens/s, or ms a token", True),
        ("eq7.png", eq7_panels(results.items), "width d", "crossover rank", False),
    )
    for name, panels, xlabel, ylabel, logy in pictures:
        if panels:
            report.plot_panels(place / name, panels, xlabel, ylabel, logx=True, logy=logy)
            print(place / name)


if __name__ == "__main__":
    run_function(main)
