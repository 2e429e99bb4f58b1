"""Ratios of times within one run, each against a bound: to be run before a release.

    python experiments/regression.py            # exit code 1 and a line for each bound that is missed
    python experiments/regression.py --update   # writes the bounds that this run would just keep

The 164M shape with random weights in float32, a different adapter in every row, prompts of 64 tokens and
64 new ones; "whole throughput" is a load of 48 requests on 16 rows, an eighth as long as ShareGPT's.
Over the same weights there is an engine without room for adapters, the base; one that holds the
adapters of all contenders, so that nothing differs between them but what a request names; and one for
"unmerged", the paper's formula in prompts too. "Host" is what a decode dispatch of 32 rows, each under
its own FLoRA of rank 8, costs in Python and in handling arguments at 40 layers, over programs of the
same arguments that do nothing. Programs run in turns, in another order in every round,
and the medians of at least five rounds are divided. Every ratio is written so that more is better; only
ratios are kept, so the bounds of regression_bounds.json hold on machines alike. No peer is needed:
experiments/peers has those.

Receipt: 14 minutes on 2 cores of an AMD EPYC (Zen 4); measured values, bounds and machine are in
experiments/results/regression_bounds.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import typer

from flora_jax.bench.layer.products import products_alone
from flora_jax.bench.receipts import machine, report
from flora_jax.bench.receipts.timing import interleaved
from flora_jax.cli.common import prepare_jax, say
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError, RunError
from flora_jax.files import require_file
from flora_jax.platforms import CPU, GPU
from flora_jax.serve.engine import Engine
from flora_jax.terminal import progress

try:
    from experiments import regression_host as host
    from experiments import regression_programs as made
except ModuleNotFoundError:  # Started as a script, whose directory is on the path.
    import regression_host as host  # type: ignore[no-redef]
    import regression_programs as made  # type: ignore[no-redef]

BOUNDS = Path(__file__).parent / "results" / "regression_bounds.json"
ROWS, LONG, FEW, MANY, BATCH = made.ROWS, made.LONG, made.FEW, made.MANY, made.BATCH


class Ratio(NamedTuple):
    """How many times as fast ``measured`` is as ``reference``; ``target`` is what it should be."""

    measured: str
    reference: str
    target: float | None


RATIOS = {
    "decode, FLoRA r 1 / base": Ratio("decode flora 1", "decode base 16", 0.97),
    "decode, LoRA r 8 on c_fc / base": Ratio("decode lora 8", "decode base 16", None),
    "decode, FLoRA r 8 / r 1": Ratio("decode flora 8", "decode flora 1", None),
    **{
        f"decode, base / weight products alone, {n} rows": Ratio(
            f"decode base {n}", f"products {n}", 0.85
        )
        for n in ROWS
    },
    f"prefill {LONG}, FLoRA r 8 / base": Ratio("long flora 8", "long base", 1 / 1.1),
    "engine's decode step / bare loop's, 16 rows": Ratio("engine", "bare", 1 / 1.1),
    f"decode, {MANY} / {FEW} resident adapters": Ratio(f"resident {MANY}", f"resident {FEW}", 0.9),
    f"prefill {LONG}, FLoRA r 8 unmerged / base": Ratio("long unmerged 8", "long base", None),
    "whole throughput, FLoRA r 8 / r 1": Ratio("mix flora 8", "mix flora 1", 0.75),
    "whole throughput, FLoRA r 8 unmerged / r 1": Ratio("mix unmerged 8", "mix flora 1", None),
}
# Of a decode dispatch at 40 layers, whatever the machine; not a ratio.
HOST_SECONDS = 0.003


def measure(
    preset: str, rounds: int, seed: int, prompt: int = 64, new: int = 64
) -> dict[str, float]:
    """Median seconds by name, of programs that ran in turns; of a decoding what it takes longer than
    one token for every row.
    """
    base, engine, names = made.build(preset, seed)
    programs: dict[str, Callable[[], Any]] = {}
    least: dict[str, str] = {}

    def add(title: str, own_engine: Engine, rows: Sequence[str | None]) -> None:
        programs[title] = made.generate(own_engine, rows, prompt, new)
        programs[f"{title} first"] = made.generate(own_engine, rows, prompt, 1)
        least[title] = f"{title} first"

    for rows in ROWS:
        add(f"decode base {rows}", base, [None] * rows)
        programs[f"products {rows}"] = products_alone(base.model, rows, 1, new - 1)
    for title, own in names.items():
        add(f"decode {title}", engine, own[:BATCH])
    programs["long base"] = made.generate(base, [None], LONG, 1)
    unmerged = made.unmerged(engine, names["flora 8"], seed)
    for title, own_engine in (("flora 8", engine), ("unmerged 8", unmerged)):
        programs[f"long {title}"] = made.generate(own_engine, names["flora 8"][:1], LONG, 1)
        programs[f"mix {title}"] = made.mixed(own_engine, names["flora 8"], seed)
    programs["mix flora 1"] = made.mixed(engine, names["flora 1"], seed)
    programs |= (few_and_many := made.resident_programs(preset, prompt, new, seed))
    least |= {n: f"{n} first" for n in few_and_many if not n.endswith("first")}
    # Outside the timed rounds: whatever these shapes need is compiled here.
    for program in programs.values():
        jax.block_until_ready(program())
    engines = (base, engine, unmerged)
    if not sum(own_engine.compilations.reset() for own_engine in engines):
        raise RunError("no compilation was counted before measuring: the counter does not count")
    with progress("rounds", (rounds + 1) * len(programs)) as bar:
        times = interleaved(programs, rounds, bar.advance)
    if compiled := sum(own_engine.compilations.count for own_engine in engines):
        raise RunError(f"{compiled} programs compiled while measuring, expected 0")
    middle = {name: statistics.median(own) for name, own in times.items()}
    found = {n: s - middle[least[n]] if n in least else s for n, s in middle.items()}
    rows_1 = names["flora 1"][:BATCH]
    pairs = [made.step_seconds(engine, rows_1, prompt, 3) for _ in range(max(rounds, 5))]
    found["engine"] = statistics.median(pair[0] for pair in pairs)
    found["bare"] = statistics.median(pair[1] for pair in pairs)
    return found


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    return {
        name: seconds[ratio.reference] / seconds[ratio.measured] for name, ratio in RATIOS.items()
    }


def read_bounds(path: Path) -> dict[str, float]:
    """The least value of every ratio.

    Raises:
        InputError: no such file, or not a bound for exactly the ratios there are.
    """
    try:
        found = json.loads(path.read_text())["bounds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no bounds ({error!r}); --update writes them") from None
    if set(found) != set(RATIOS):
        wrong = sorted(set(found) ^ set(RATIOS))
        raise InputError(f"{path}: bounds for {len(found)} ratios, expected {len(RATIOS)}: {wrong}")
    return dict(found)


def missed(found: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    """A line for each ratio under its bound."""
    return [
        f"{name}: {found[name]:.3f}, expected at least {bound:.3f}"
        for name, bound in bounds.items()
        if not found[name] >= bound
    ]


def host_seconds() -> dict[str, float]:
    """What a decode dispatch costs the host, by whether the device or the host loops over the steps."""
    return {
        "host, a dispatch at 40 layers": host.dispatch_seconds(CPU),
        "host, a step at 40 layers as a GPU has it": host.dispatch_seconds(GPU),
    }


def main(
    preset: Annotated[str, typer.Option(help="mini or 164m; bounds are for 164m.")] = "164m",
    rounds: Annotated[int, typer.Option(help="Of all programs; medians count. At least 5.")] = 5,
    update: Annotated[bool, typer.Option(help="Write the bounds, lower by --margin.")] = False,
    margin: Annotated[float, typer.Option(help="Share of a ratio that may be lost.")] = 0.1,
    bounds: Annotated[Path, typer.Option(help="JSON file of the bounds.")] = BOUNDS,
    seed: int = 0,
) -> None:
    """Measures all ratios and compares them with their bounds."""
    if rounds < 5:
        raise InputError(f"--rounds is {rounds}, expected at least 5")
    if not 0 <= margin < 1:
        raise InputError(f"--margin is {margin}, expected 0 to below 1")
    if preset not in ("mini", "164m"):
        raise InputError(f"--preset is {preset!r}, expected mini or 164m")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}, expected 0 to 2^32 - 1")
    least = {} if update else read_bounds(bounds)
    if update:
        require_file(bounds, overwrite=True, option="bounds")
    prepare_jax()
    seconds = measure(preset, rounds, seed)
    found = ratios(seconds)
    if update:
        least = {name: round(value * (1 - margin), 3) for name, value in found.items()}
        report.write_results(
            bounds,
            {"preset": preset, "rounds": rounds, "margin": margin, "bounds": least,
             "measured": found, "seconds": seconds},
        )  # fmt: skip
    rows = [
        {"ratio": name, "measured": value, "bound": least[name], "target": RATIOS[name].target}
        for name, value in found.items()
    ]
    report.table(f"{preset} on {machine.describe()['cpu']}", rows, [*rows[0]])
    own = host_seconds()
    most = 1e3 * HOST_SECONDS
    report.table("host", [{"what": name, "ms": 1e3 * s} for name, s in own.items()], ["what", "ms"])
    below = missed(found, least)
    below += [
        f"{name}: {1e3 * seconds:.2f} ms, expected at most {most:.0f}"
        for name, seconds in own.items()
        if seconds > HOST_SECONDS
    ]
    for line in below:
        say(f"regression: {line}")
    if below:
        sys.exit(1)


if __name__ == "__main__":
    run_function(main)
