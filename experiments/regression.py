"""Ratios of times within one run, each against a bound: to be run before a release.

    python experiments/regression.py            # exit code 1 and a line for each bound that is missed
    python experiments/regression.py --update   # writes the bounds that this run would just keep

The 164M shape with random weights in float32, a different adapter in every row, prompts of 64 tokens and
32 new ones. One engine holds the adapters of all contenders, so that nothing differs but what a request
names; programs run in turns, in another order in every round, and the medians of at least five
rounds are divided. Every ratio is written so that more is better; only ratios are kept, so the bounds of
regression_bounds.json hold on machines alike. No peer is needed: experiments/peers has those.

Receipt: 9 minutes on 2 cores of an Intel Xeon (Emerald Rapids), of which programs not compiled before
take two; measured values, bounds and machine are in experiments/results/regression_bounds.json.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer

from flora_jax.bench import machine, report
from flora_jax.bench import serving_setup as setup
from flora_jax.bench.products import products_alone
from flora_jax.bench.serving import run_throughput
from flora_jax.bench.timing import interleaved
from flora_jax.bench.workload import WorkloadOptions
from flora_jax.cli.common import prepare_jax, say
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError, RunError
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Request

BOUNDS = Path(__file__).parent / "results" / "regression_bounds.json"
ROWS, LONG, FEW, MANY = (1, 16, 32), 512, 8, 512
CONTEXT = LONG + 128
CONTENDERS = {
    "flora 1": setup.Contender("flora", 1),
    "flora 8": setup.Contender("flora", 8),
    "lora 8": setup.Contender("lora", 8, ("c_fc",)),
}


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
    "whole throughput, FLoRA r 8 / r 1": Ratio("mix flora 8", "mix flora 1", 0.75),
}


def generate(
    engine: Engine, names: Sequence[str | None], prompt: int, new: int
) -> Callable[[], None]:
    """A program: a row for every name, all at once, with a prompt of random tokens."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, engine.model.config.vocab_size, (len(names), prompt)).tolist()

    def run() -> None:
        for row, name in enumerate(names):
            engine.add(Request(row, tuple(prompts[row]), name, max_tokens=new, ignore_eos=True))
        while engine.has_work:
            for update in engine.step():
                if update.error is not None:
                    raise RunError(update.error)

    return run


def step_seconds(engine: Engine, rows: int, prompt: int, dispatches: int) -> tuple[float, float]:
    """Seconds of a full dispatch of decoding: the engine's iteration, and the bare device's.

    Both over the same rows, prefilled before; they take turns, so that both see the same lengths.
    """
    steps = engine.options.decode_steps
    tickets = [
        engine.add(
            Request(
                row, (1 + row,) * prompt, max_tokens=2 * dispatches * steps + 8, ignore_eos=True
            )
        )
        for row in range(rows)
    ]
    while any(s.stage != "decode" for s in engine.scheduler.running) or not engine.stats.running:
        engine.step()
    engine.step()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(dispatches):
        began = time.perf_counter()
        engine.step()
        seconds[0].append(time.perf_counter() - began)
        own = [*engine.scheduler.running]
        for sequence in own:
            if not engine.scheduler.reserve(sequence, sequence.cached + steps):
                raise RunError("the cache is too small for the bare loop")
        began = time.perf_counter()
        tokens_BN = engine.device.decode(own, steps, eager=False)
        seconds[1].append(time.perf_counter() - began)
        for sequence, own_N in zip(own, tokens_BN, strict=True):
            sequence.content.stream.add(own_N.tolist())
            sequence.drawn += steps
    for ticket in tickets:
        engine.cancel(ticket)
    engine.step()
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def build(preset: str, rows: int, seed: int) -> tuple[Engine, dict[str, list[str]]]:
    """An engine with as many adapters of every contender as it has rows, and their names."""
    base = setup.find_base(None, preset)
    wide = dataclasses.replace(base.config, n_positions=max(base.config.n_positions, CONTEXT))
    model = setup.load_base(base._replace(config=wide), "float32", seed)
    adapters: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for title, contender in CONTENDERS.items():
        names[title] = [f"{title}, {n}" for n in range(rows)]
        adapters |= setup.make_adapters(model.config, contender, names[title], seed)
    options = EngineOptions(max_num_seqs=rows, max_model_len=CONTEXT, row_buckets=ROWS)
    return Engine(model, adapters, options=options), names


def resident_programs(preset: str, prompt: int, new: int, seed: int) -> dict[str, Any]:
    """The same batch of 16 rows under 8 adapters, in a bank of 8 and among 512 that are there."""
    base = setup.find_base(None, preset)
    model = setup.load_base(base, "float32", seed)
    found = {}
    for resident in (FEW, MANY):
        named = [str(n) for n in range(resident)]
        adapters = setup.make_adapters(model.config, CONTENDERS["flora 8"], named, seed)
        options = EngineOptions(max_num_seqs=16, max_model_len=prompt + new, row_buckets=(16,))
        engine = Engine(model, adapters, options=options)
        for name in named:
            setup.preload(engine, name)
        rows = named[:FEW] * 2
        found[f"resident {resident}"] = generate(engine, rows, prompt, new)
        found[f"resident {resident} first"] = generate(engine, rows, prompt, 1)
    return found


def measure(
    preset: str, rounds: int, seed: int, prompt: int = 64, new: int = 32
) -> dict[str, float]:
    """Median seconds by name, of programs that ran in turns; of a decoding what it takes longer than
    one token for every row.
    """
    engine, names = build(preset, max(ROWS), seed)
    programs: dict[str, Callable[[], Any]] = {}
    least: dict[str, str] = {}

    def add(title: str, rows: Sequence[str | None]) -> None:
        programs[title] = generate(engine, rows, prompt, new)
        programs[f"{title} first"] = generate(engine, rows, prompt, 1)
        least[title] = f"{title} first"

    for rows in ROWS:
        add(f"decode base {rows}", [None] * rows)
        programs[f"products {rows}"] = products_alone(engine.model, rows, 1, new - 1)
    for title, own in names.items():
        add(f"decode {title}", own[:16])
    programs["long base"] = generate(engine, [None], LONG, 1)
    programs["long flora 8"] = generate(engine, names["flora 8"][:1], LONG, 1)
    programs |= (few_and_many := resident_programs(preset, prompt, new, seed))
    least |= {n: f"{n} first" for n in few_and_many if not n.endswith("first")}
    for title in ("flora 1", "flora 8"):
        programs[f"mix {title}"] = mixed(engine, names[title], seed)
    # Outside the timed rounds: whatever these shapes need is compiled here.
    for program in programs.values():
        jax.block_until_ready(program())
    engine.compilations.reset()
    with report.progress("rounds", (rounds + 1) * len(programs)) as advance:
        times = interleaved(programs, rounds, advance)
    if engine.compilations.count:
        raise RunError(f"{engine.compilations.count} programs compiled while measuring, expected 0")
    middle = {name: statistics.median(own) for name, own in times.items()}
    found = {n: s - middle[least[n]] if n in least else s for n, s in middle.items()}
    pairs = [step_seconds(engine, 16, prompt, 3) for _ in range(max(rounds, 5))]
    found["engine"] = statistics.median(pair[0] for pair in pairs)
    found["bare"] = statistics.median(pair[1] for pair in pairs)
    return found


def mixed(engine: Engine, names: Sequence[str], seed: int) -> Callable[[], Any]:
    """A program: a ShareGPT-like load, an adapter of ``names`` for every request in turn."""
    options = WorkloadOptions(num_prompts=len(names), scale=0.125, seed=seed)
    workload, _ = setup.plan_workload(
        setup.Base("", engine.model.config, None), options, adapted=False
    )
    requests = [
        dataclasses.replace(request, adapter=name)
        for request, name in zip(workload.requests, names, strict=True)
    ]

    def run() -> None:
        if run_throughput(engine, requests)["failed"]:
            raise RunError("a request of the load failed")

    return run


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
    least = {} if update else read_bounds(bounds)
    if update:
        report.check_output(bounds, "bounds")
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
    below = missed(found, least)
    for line in below:
        say(f"regression: {line}")
    if below:
        sys.exit(1)


if __name__ == "__main__":
    run_function(main)
