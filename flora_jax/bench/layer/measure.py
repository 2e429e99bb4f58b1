"""What one projection costs under each kind of adapter, in each form and at each rank, and Eq. 7."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flora_jax.bench.layer import eq7
from flora_jax.bench.layer.options import BASE, PLAIN, Case, LayerOptions
from flora_jax.bench.layer.programs import Programs, work
from flora_jax.bench.receipts import machine, report
from flora_jax.bench.receipts.device_loop import Calls
from flora_jax.bench.receipts.timing import interleaved
from flora_jax.terminal import progress

_OVERHEAD: Case = ("nothing", PLAIN, None)
_COLUMNS = {
    "kind": "kind", "form": "form", "rank": "rank", "milliseconds": "ms", "relative": "x base",
    "build_milliseconds": "build ms", "share": "share of limit", "skipped": "left out",
}  # fmt: skip
_EQ7_COLUMNS = {
    "form": "form", "c1_over_c2": "c1/c2", "fit_error": "largest error of the fit",
    "predicted_rank": "Eq. 7: crossover rank", "measured_rank": "measured", "verdict": "in words",
}  # fmt: skip


def measure(options: LayerOptions) -> dict[str, Any]:
    """Times every case of the options in turn.

    Returns ``options``; ``limits`` of the machine, or ``None``; ``overhead_seconds``, what of a call's
    time is the measurement's: that of a program that does nothing, or of a round of the loop on the
    device without a projection in it; ``from_cache``, whether weights so small stay in a GPU's cache,
    however many take turns; ``results``, one for each case; ``eq7``, see :func:`crossovers`.

    A result has the median ``seconds`` of a call, the quartiles, ``calls``, how many of them a run had,
    ``relative`` to the base, and ``share``, the shortest time that the limits allow over the measured
    one: it is above 1 where arrays stay in a cache. For merged weights ``build_seconds`` are the time to
    make those of all rows, waited for, not part of ``seconds``. A case that does not fit into memory,
    or that the compiler refuses, has ``skipped``, the reason, and no times.

    Raises:
        InputError: the options cannot be measured at all; see :class:`Programs`.
    """
    limits = machine.limits(options.dtype) if options.measure_limits else None
    cases = options.cases()
    made = Programs(options)
    try:
        programs, skipped = _prepare(made, cases)
    finally:
        made.close()
    with progress("measure", (options.repeats + 1) * len(programs)) as bar:
        runs = {name: program.run for name, program in programs.items()}
        times = {
            name: [seconds / programs[name].calls for seconds in own]
            for name, own in interleaved(runs, options.repeats, bar.advance).items()
        }
    base = times.get((BASE, PLAIN, None))
    results = []
    for case in cases:
        kind, form, rank = case
        row: dict[str, Any] = {"kind": kind, "form": form, "rank": rank}
        if case in skipped:
            results.append(row | {"seconds": None, "skipped": skipped[case]})
            continue
        name = "merged" if form == "merged" else case
        row |= _summary(times[name]) | {"calls": programs[name].calls}
        if base is not None:
            row["relative"] = row["seconds"] / statistics.median(base)
        if limits is not None:
            row["share"] = machine.least_seconds(limits, *work(case, options)) / row["seconds"]
        if form == "merged":
            row["build_seconds"] = statistics.median(times[kind, "build", rank])
        results.append(row)
    return {
        "options": dataclasses.asdict(options),
        "limits": limits,
        "overhead_seconds": statistics.median(times[_OVERHEAD]),
        "from_cache": made.from_cache,
        "results": results,
        "eq7": crossovers(options, results),
    }


def _prepare(made: Programs, cases: Sequence[Case]) -> tuple[dict[Any, Calls], dict[Case, str]]:
    """All programs to time, compiled beside each other, and why others are left out."""
    programs: dict[Any, Calls] = {_OVERHEAD: made.overhead()}
    skipped: dict[Case, str] = {}
    with progress("compile", len(cases)) as bar:
        started = {case: made.start(case) for case in cases}
        for case, wait in started.items():
            kind, form, rank = case
            try:
                program = wait if isinstance(wait, str) else wait()
            except jax.errors.JaxRuntimeError as error:
                program = f"does not compile: {str(error).strip().splitlines()[0]}"
            if isinstance(program, str):
                skipped[case] = program
            elif form == "merged" and rank is not None:
                programs["merged"] = program
                programs[kind, "build", rank] = made.build(kind, rank)
            else:
                programs[case] = program
            bar.advance()
    return programs, skipped


def _summary(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * list(times)
    return {"seconds": middle, "seconds_q1": low, "seconds_q3": high}


def crossovers(options: LayerOptions, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Eq. 7 for every form in which both FLoRA and LoRA were measured; merged weights have no part in it.

    ``c1`` and ``c2`` in seconds per multiplication with ``fit_error``; ``fit_holds``: whether that is
    small enough for a conclusion; ``predicted_rank`` from them, ``None`` where it is not, or where they
    say that FLoRA is cheaper at every rank; ``measured_rank``, ``None`` where there
    is no crossing within the ranks measured, with its ``verdict`` and ``changes``
    (:class:`eq7.Crossing`).
    """

    def seconds(kind: str, form: str) -> dict[int, float]:
        return {
            row["rank"]: row["seconds"]
            for row in results
            if (row["kind"], row["form"]) == (kind, form) and row["seconds"] is not None
        }

    base = next((row["seconds"] for row in results if row["kind"] == BASE), None)
    found = []
    for form in options.forms:
        flora, lora = seconds("flora", form), seconds("lora", form)
        if form == "merged" or not flora or not lora:
            continue
        model = eq7.fit(options.inputs, options.outputs, options.tokens, flora, lora, base)
        crossing = eq7.measured_crossing(flora, lora)
        found.append(
            {
                "form": form,
                "c1": model.c1,
                "c2": model.c2,
                "c1_over_c2": model.c1 / model.c2 if model.c2 else None,
                "fit_error": model.error,
                "fit_holds": model.holds,
                "predicted_rank": (
                    eq7.predicted_rank(model, options.inputs, options.outputs)
                    if model.holds
                    else None
                ),
                "measured_rank": crossing.rank,
                "verdict": crossing.verdict,
                "changes": crossing.changes,
            }
        )
    return found


def print_tables(measured: Mapping[str, Any]) -> None:
    """The table of all cases and, where there is one, that of Eq. 7."""
    options = LayerOptions(**measured["options"])
    rows = [
        row
        | {
            name.replace("seconds", "milliseconds"): None if row[name] is None else 1e3 * row[name]
            for name in ("seconds", "build_seconds")
            if name in row
        }
        for row in measured["results"]
    ]
    where = ", weights from the cache" if measured["from_cache"] else ""
    report.table(title(options) + where, rows, _COLUMNS)
    if measured["eq7"]:
        report.table("Eq. 7: FLoRA against bmm-LoRA", measured["eq7"], _EQ7_COLUMNS)
    for row in measured["eq7"]:
        if not row["fit_holds"]:
            print(
                f"{row['form']}: Eq. 7's model is off by up to {100 * row['fit_error']:.0f} % from what "
                f"was measured, over {100 * eq7.LARGEST_ERROR:.0f} %: it says nothing of a crossover"
            )


def title(options: LayerOptions) -> str:
    """What was measured, in one line."""
    quantized = "" if options.quantize == "none" else f", weight in {options.quantize}"
    return (
        f"{options.inputs} -> {options.outputs}, {options.batch} x {options.length} tokens, "
        f"{options.dtype}{quantized}"
    )


def plot(path: Path, measured: Mapping[str, Any]) -> None:
    """A PNG of the times over the rank, a line for every kind and form.

    The base is a level line, and so are merged weights, whose product takes as long for every kind and
    rank. What was left out is not drawn.
    """
    options = LayerOptions(**measured["options"])
    level = (min(options.ranks), max(options.ranks))
    series: dict[str, list[tuple[float, float | None]]] = {}
    for row in measured["results"]:
        if row["seconds"] is None:
            continue
        milliseconds = 1e3 * row["seconds"]
        if row["form"] in (PLAIN, "merged"):
            name = BASE if row["form"] == PLAIN else "merged"
            series[name] = [(rank, milliseconds) for rank in level]
        else:
            points = series.setdefault(f"{row['kind']} {row['form']}", [])
            points.append((row["rank"], milliseconds))
    report.plot_lines(
        path, series, "rank", "milliseconds a call", title(options), logx=True, logy=True
    )
