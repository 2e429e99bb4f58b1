"""Table 1: pass@1 on MultiPL-E's HumanEval under the base, FLoRA, LoRA and IA3.

    python experiments/table1.py mini --problems DIR --output runs/table1
    python experiments/table1.py starcoderbase-3b --problems hub --data DIR --output runs/table1-3b
    python experiments/table1.py starcoder --problems hub --data DIR --output runs/table1-15b

Stages, each of which goes on where it was stopped when the same command is given again: adapters are
trained (a run a method with all languages in it; the mini's are shipped), all methods and languages are
completed in one stream of batches, programs are run (what methods have in common once), tables and
charts are written to ``results/table1_PRESET*``. DATA holds ``LANGUAGE.train.jsonl.gz`` by the paper's
names of the languages (d, perl, ruby, rust, racket, swift, lua). Languages without a toolchain are named
and left out, the others are what ``--language`` says. ``--stop-tokens given`` cuts completions as the
problems' files say, by default as MultiPL-E's current release does.

The presets of StarCoder have the paper's 1,500 steps of 8 rows for each adapter, 8-bit base, rates,
temperature 0.1 and 100 samples; rank 1 for the 15B and 4 for the 3B are our choice within its 1 to 8, and
512 tokens are MultiPL-E's. They need a GPU with room for the weights and have not been run.
``results/table1_mini.md`` has the mini's result, and what it took on one core of an AMD EPYC beside other
work (programs that do not end take half as long alone): 97 minutes of generation, some 66 of programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flora_jax.checkpoints import open_checkpoint
from flora_jax.checkpoints.digest import model_digest
from flora_jax.checkpoints.sources import resolve
from flora_jax.cli.common import dtype_of, prepare_jax
from flora_jax.errors import InputError, RunError, listing
from flora_jax.evaluate.completions import Generation, Sampling, Store
from flora_jax.evaluate.doctor import examine
from flora_jax.evaluate.execution import Runner
from flora_jax.evaluate.languages import select
from flora_jax.evaluate.local import Job, Local
from flora_jax.evaluate.multipl_e import evaluate
from flora_jax.evaluate.problems import STOP_TOKENS, Problem, first, read_problems, with_stop_tokens
from flora_jax.files import directory_lock
from flora_jax.sandbox.sandbox import Sandbox
from flora_jax.serve.registry import digest
from flora_jax.shipped import ASSETS

try:
    from experiments import table1_report
except ModuleNotFoundError:  # Started as a script, whose directory is on the path.
    import table1_report  # type: ignore[no-redef]

LANGUAGES = {"d": "d", "pl": "perl", "rb": "ruby", "rs": "rust", "rkt": "racket", "swift": "swift",
             "lua": "lua"}  # fmt: skip
KINDS = ("flora", "lora", "ia3")


@dataclass(frozen=True)
class Preset:
    """A model, how it is sampled, and how its adapters are trained (the mini's are shipped)."""

    model: str
    sampling: Sampling
    rows: int
    quantize: Any = None
    rank: int = 1
    steps: int = 1500
    batch: int = 8


PRESETS = {
    "mini": Preset("mini", Sampling(n_samples=10, max_tokens=256), rows=64),
    "starcoderbase-3b": Preset("bigcode/starcoderbase-3b", Sampling(), 64, "int8", rank=4),
    "starcoder": Preset("bigcode/starcoder", Sampling(), 32, "int8", rank=1),
}


def train(preset: Preset, data: Path, output: Path) -> dict[str, dict[str, Path]]:
    """Adapter folders by kind and language, trained where they are not there yet."""
    folders: dict[str, dict[str, Path]] = {}
    for kind in KINDS:
        run = output / "adapters" / kind
        command = [
            sys.executable,
            "-m",
            "flora_jax.cli",
            "train",
            preset.model,
            "--output",
            str(run),
        ]
        if (run / "config.json").is_file():
            command += ["--resume", "--config", str(run / "config.json")]
        else:
            # Rows are split evenly over the adapters.
            rows = preset.batch * len(LANGUAGES)
            command += ["--kind", kind, "--steps", str(preset.steps), "--batch-size", str(rows)]
            command += ["--quantize", preset.quantize] if preset.quantize else []
            command += [] if kind == "ia3" else ["--rank", str(preset.rank)]
            for name in LANGUAGES.values():
                command += ["--data", f"{name}={data / f'{name}.train.jsonl.gz'}"]
        subprocess.run(command, check=True)
        folders[kind] = {key: run / name for key, name in LANGUAGES.items()}
    return folders


def generate(
    preset: Preset,
    problems: list[Problem],
    folders: Mapping[str, Mapping[str, Path]],
    output: Path,
) -> dict[str, list[Generation]]:
    """All methods' generations, those that are missing by one stream over all of them."""
    languages = {problem.language for problem in problems}
    adapters = {
        f"{kind}/{language}": path
        for kind, by_language in folders.items()
        for language, path in by_language.items()
        if language in languages
    }
    local = Local(
        resolve(preset.model), problems, adapters, preset.rows, dtype_of(None),
        preset.quantize,
    )  # fmt: skip
    context, weights = local.context(preset.sampling), model_digest(local.directory)
    with ExitStack() as stack:
        stores: dict[str, Store] = {}
        for method in ("base", *KINDS):
            own = {n: digest(path) for n, path in adapters.items() if n.startswith(method)}
            settings = {
                **asdict(preset), "model_sha256": weights, "context": context, "adapters": own
            }  # fmt: skip
            (output / method).mkdir(parents=True, exist_ok=True)
            stores[method] = stack.enter_context(Store(problems, output / method, settings))
        missing = {method: {*store.missing} for method, store in stores.items()}
        jobs = [
            Job(problem, None if method == "base" else f"{method}/{problem.language}")
            for problem in _by_place(problems)
            for method in stores
            if problem in missing[method]
        ]
        started = time.monotonic()
        for done, (job, one) in enumerate(local.stream(jobs, preset.sampling) if jobs else (), 1):
            stores["base" if job.adapter is None else job.adapter.split("/")[0]].add(one)
            if done % 50 == 0:
                seconds, started = time.monotonic() - started, time.monotonic()
                _add_seconds(output, "generate", seconds)
                print(f"{done} of {len(jobs)} generated, 50 in {seconds:.0f} s", flush=True)
        _add_seconds(output, "generate", time.monotonic() - started)
        return {method: store.finish() for method, store in stores.items()}


def _by_place(problems: list[Problem]) -> list[Problem]:
    """Every language's first problem, then the second ones: a run cut short does for a ``--limit``."""
    count: Counter[str] = Counter()
    placed = []
    for problem in problems:
        placed.append((count[problem.language], problem))
        count[problem.language] += 1
    return [problem for _, problem in sorted(placed, key=lambda one: one[0])]


def runnable(asked: str) -> tuple[list[str], list[str]]:
    """The languages of ``--language``, comma-separated: those with a toolchain, and the others.

    Raises:
        InputError: a name that is no language, or none of them has a toolchain.
    """
    names = select(asked.split(","))
    report = examine(Sandbox())
    ready = {one.language for one in report.findings if one.state == "ready"}
    languages = [name for name in names if name in ready]
    if not languages:
        why = [report.trouble] if report.trouble else []
        why += [one.advice for one in report.findings if one.language in names and one.advice]
        raise InputError(listing(f"--language is {asked}, none of it can be run here", why))
    return languages, [name for name in names if name not in ready]


def run(generations: Mapping[str, list[Generation]], output: Path) -> None:
    """Runs the programs of every method."""
    started = time.monotonic()
    for method, own in generations.items():
        summary = evaluate(
            own, output / method, Runner(Sandbox()), source=method,
            executions=output / "executions.jsonl",
        )  # fmt: skip
        passed = {language: f"{100 * one['pass@1']:.2f}" for language, one in summary.items()}
        print(f"{method}: {passed}", flush=True)
    _add_seconds(output, "run", time.monotonic() - started)


def _add_seconds(output: Path, stage: str, seconds: float) -> None:
    """Adds up what a stage took over all the calls it was done in."""
    path = output / "seconds.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[stage] = known.get(stage, 0.0) + seconds
    path.write_text(json.dumps(known), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    parser = argparse.ArgumentParser(description="Table 1: train, complete, run, tabulate.")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--problems", required=True, help="directory, or hub")
    parser.add_argument("--data", type=Path, help="training data; the mini needs none")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--language", default=",".join(LANGUAGES))
    parser.add_argument("--limit", type=int, help="problems of each language")
    parser.add_argument("--stop-tokens", choices=STOP_TOKENS, default="current")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    preset, output = PRESETS[arguments.preset], arguments.output
    if preset.model != "mini" and arguments.data is None:
        parser().error("--data is missing, expected a directory of LANGUAGE.train.jsonl.gz")
    languages, left_out = runnable(arguments.language)
    if left_out:
        print(f"left out, no toolchain: {', '.join(left_out)}", flush=True)
    problems = with_stop_tokens(
        first(read_problems(arguments.problems, languages), arguments.limit), arguments.stop_tokens
    )
    prepare_jax()
    with directory_lock(output):
        run_stages(arguments, preset, problems, left_out)


def run_stages(
    arguments: argparse.Namespace, preset: Preset, problems: list[Problem], left_out: list[str]
) -> None:
    """All stages of a preset, each from where it was stopped; the output is locked."""
    output = arguments.output
    folders = (
        {k: {key: ASSETS / "adapters" / k / n for key, n in LANGUAGES.items()} for k in KINDS}
        if preset.model == "mini"
        else train(preset, arguments.data, output)
    )
    generations = generate(preset, problems, folders, output)
    run(generations, output)
    with (output / "executions.jsonl").open(encoding="utf-8") as lines:
        programs = {json.loads(line)["key"] for line in lines}  # One that ran again has two lines.
    receipt = {
        "command": command(arguments),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "stop tokens": f"{arguments.stop_tokens}: {_stops(problems)}",
        "parameters": f"{open_checkpoint(resolve(preset.model)).describe().parameters:,}",
        "left out": ", ".join(left_out) or "nothing",
        "seconds": json.loads((output / "seconds.json").read_text(encoding="utf-8")),
        "empty completions under the base, %": empty(generations["base"]),
        "programs run": len(programs),
        "empty for want of context": sum(
            not any(one.completions)
            for one in generations["base"]
            if (one.language, one.name) in _beyond(preset, problems)
        ),
    }
    table1_report.write(arguments.preset, output, ("base", *KINDS), receipt, arguments.results)


def command(arguments: argparse.Namespace) -> str:
    """What makes the same again; directories of data are called DIR."""
    words = ["python experiments/table1.py", arguments.preset, "--problems"]
    words += ["hub" if arguments.problems == "hub" else "DIR", "--output", str(arguments.output)]
    words += ["--data", "DIR"] if arguments.data else []
    words += ["--language", arguments.language] if arguments.language != ",".join(LANGUAGES) else []
    words += ["--limit", str(arguments.limit)] if arguments.limit else []
    return " ".join([*words, "--stop-tokens", arguments.stop_tokens])


def _stops(problems: list[Problem]) -> str:
    """By language the lists in use."""
    found = {one.language: one.stop_tokens for one in problems}
    return "; ".join(f"{name} {[*stops]}" for name, stops in found.items())


def empty(generations: list[Generation]) -> dict[str, float]:
    """By language the share of completions that a stop token ended at once."""
    texts: dict[str, list[str]] = {}
    for one in generations:
        texts.setdefault(one.language, []).extend(one.completions)
    return {name: 100 * own.count("") / len(own) for name, own in texts.items()}


def _beyond(preset: Preset, problems: list[Problem]) -> set[tuple[str, str]]:
    local = Local(resolve(preset.model), problems)
    return {(problem.language, problem.name) for problem in local.beyond()}


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as error:
        sys.exit(f"table1: {error}")
