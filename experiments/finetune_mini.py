"""Fine-tunes the embedded small StarCoder on seven languages, and compares kinds, rates, ranks, inits.

    python experiments/finetune_mini.py STAGE CORPORA --output runs/finetune

CORPORA is a directory with LANGUAGE.train.jsonl.gz and LANGUAGE.validation.jsonl.gz. Stages:

    sweep      learning rates x 100 steps for each kind, and for FLoRA of rank 4 from a frozen first
               component, Perl
    languages  FLoRA, LoRA and IA3 of rank 1 for D, Perl, Ruby, Rust, Racket, Swift and Lua, seven
               adapters in one run, DoRA and HiRA for Perl and Lua. What ships is
               OUTPUT/languages-150-256/KIND/LANGUAGE, as flora_jax/assets/adapters/KIND/LANGUAGE
    ranks      FLoRA 1/2/4/8, of 2/4/8 from a frozen first component too, LoRA 1/4/8, both IA3
               placements, 3 seeds, Perl and Lua
    inits      FLoRA of rank 4 from zero-sum noise, all ones and a frozen first component, Perl and
               Lua; singular values of what was learned

A run is 150 steps of 2,048 tokens for each adapter, in rows of --length, at the rate that the sweep of
that length found best for its kind. The model has seen these languages, and a long window tells it which
one it is in; a window of 64 tokens does so less, so that more is left to the adapter. What ships was
trained on windows of 256. Adapters of `languages` are scored on windows of both lengths.

Every run resumes where it was stopped; one that is finished is not run again, unless the embedded model
is another since. Results are collected in experiments/results/finetune_mini.jsonl, one object for each
adapter, with paired 95 % intervals of its change to the base by a bootstrap over windows of held-out
files (windows of one file are alike, so they are somewhat too narrow; the sweep chooses on the windows
that are reported).

Receipt: 2 cores of an AMD EPYC (Zen 4), float32, each core with a process of its own at 2,000
tokens/s: sweep 25 minutes, `languages` 40, `ranks --seeds 0` about 35, `inits` 9. The tables are in
experiments/results/finetune_mini.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from held_out import HeldOut

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.bench.receipts import collected
from flora_jax.checkpoints.checkpoint import open_checkpoint
from flora_jax.checkpoints.digest import model_label
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.peft.read import read_adapter
from flora_jax.train.options import TrainOptions, make_options
from flora_jax.train.run import train

LANGUAGES = ("d", "perl", "ruby", "rust", "racket", "swift", "lua")
_WIDE, _NARROW = (2e-3, 8e-3, 3.2e-2, 1.28e-1, 5.12e-1), (3e-3, 1e-2, 3e-2, 1e-1)
FROZEN = {"kind": "flora", "rank": 4, "init": "frozen_ones"}
# What is swept: its changes of the recipe, and the rates.
SWEPT: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "flora": ({"kind": "flora"}, _WIDE),
    "flora-frozen": (FROZEN, (*_WIDE, 6.4e-2)),
    "lora": ({"kind": "lora"}, _NARROW),
    "dora": ({"kind": "dora"}, _NARROW),
    "ia3": ({"kind": "ia3"}, (1.25e-3, 5e-3, 2e-2, 8e-2, 3.2e-1)),
    "hira": ({"kind": "hira"}, _WIDE),
}
# Tokens of an adapter in a step, of its held-out text, and lengths of windows that are scored.
TOKENS, HELD_OUT, LENGTHS = 2048, 192 * 256, (64, 256)
RESULTS = Path(__file__).parent / "results" / "finetune_mini.jsonl"
MINI = "mini"


class Run(NamedTuple):
    """A run by name: its languages, and what differs from the recipe."""

    name: str
    languages: tuple[str, ...]
    changes: dict[str, Any]


def runs(stage: str) -> Iterator[Run]:
    """The runs of a stage."""
    if stage == "sweep":
        for name, (changes, rates) in SWEPT.items():
            for rate in rates:
                yield Run(f"{name}-{rate:g}", ("perl",), changes | {"learning_rate": rate})
    elif stage == "languages":
        for kind in ("flora", "lora", "ia3"):
            yield Run(kind, LANGUAGES, {"kind": kind})
        for kind in ("dora", "hira"):
            yield Run(kind, ("perl", "lua"), {"kind": kind})
    elif stage == "ranks":
        shapes: list[dict[str, Any]] = [
            *({"kind": "flora", "rank": rank} for rank in (1, 2, 4, 8)),
            *(FROZEN | {"rank": rank} for rank in (2, 4, 8)),
            *({"kind": "lora", "rank": rank} for rank in (1, 4, 8)),
            {"kind": "ia3"},
            {"kind": "ia3", "targets": ["c_attn", "mlp.c_proj"]},
        ]
        for seed in range(3):
            for shape in shapes:
                placed = "-peft" if "targets" in shape else ""
                name = f"{swept_name(shape)}{placed}-r{shape.get('rank', 1)}-seed{seed}"
                yield Run(name, ("perl", "lua"), shape | {"seed": seed})
    elif stage == "inits":
        for init in ("zero_sum", "ones", "frozen_ones"):
            yield Run(init, ("perl", "lua"), {"kind": "flora", "rank": 4, "init": init})
    else:
        raise InputError(f"STAGE is {stage!r}, expected sweep, languages, ranks or inits")


def swept_name(changes: dict[str, Any]) -> str:
    """Whose rate a run of these changes has."""
    return "flora-frozen" if changes.get("init") == FROZEN["init"] else str(changes["kind"])


def best_rates(lines: list[dict[str, Any]]) -> dict[str, float]:
    """By what is swept the rate with the lowest validation loss."""
    swept = [line for line in lines if line["stage"] == "sweep"]
    found: dict[str, float] = {}
    for line in sorted(swept, key=lambda line: -line["bits_per_byte"]):
        found[line["run"].rpartition("-")[0]] = line["learning_rate"]
    return found


def options_of(
    stage: str, run: Run, corpora: Path, steps: int, length: int, rates: dict[str, float]
) -> TrainOptions:
    """The recipe with the run's changes and its best rate."""
    values = {
        "model": "mini",
        "data": {name: str(corpora / f"{name}.train.jsonl.gz") for name in run.languages},
        "validation": {name: str(corpora / f"{name}.validation.jsonl.gz") for name in run.languages},
        "steps": steps,
        "batch_size": TOKENS // length * len(run.languages),
        "seq_len": length,
        "eval_every": steps,
        "eval_windows": 48,
        "save_every": 25,
    } | run.changes  # fmt: skip
    if stage != "sweep":
        name = swept_name(run.changes)
        if name not in rates:
            raise InputError(
                f"{RESULTS}: no sweep of {name} on windows of {length} tokens; run that stage first"
            )
        values["learning_rate"] = rates[name]
    return make_options(values)


def learned_spectrum(adapter: ModelAdapter) -> list[list[float]]:
    """Singular values of ``s·BᵀA - 1``, what each layer's first target has learned; the largest 6."""
    result = []
    for layer in adapter.layers:
        params = next(iter(layer.values()))
        share = 1.0 / len(params.down_RI) if params.reduction == "mean" else 1.0
        product_IO = share * np.asarray(params.down_RI, np.float64).T @ np.asarray(params.up_RO)
        values = np.linalg.svd(product_IO - 1.0, compute_uv=False)[:6]
        result.append([round(float(value), 5) for value in values])
    return result


def main(
    stage: Annotated[str, typer.Argument(help="sweep, languages, ranks or inits")],
    corpora: Path,
    output: Annotated[Path, typer.Option()],
    steps: Annotated[int | None, typer.Option(help="[default: 150, sweep 100]")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a training window.")] = 256,
    kinds: Annotated[
        str, typer.Option(help="Only these, comma-separated.")
    ] = "flora,lora,dora,ia3,hira",
    seeds: Annotated[str, typer.Option(help="Only these, comma-separated.")] = "0,1,2",
) -> None:
    """Runs what is not yet done of a stage and appends its results."""
    if length < 1 or TOKENS % length:
        raise InputError(f"--length is {length}, expected a divisor of {TOKENS}")
    steps = steps or (100 if stage == "sweep" else 150)
    opened = open_checkpoint(MINI)
    model, config = opened.load("float32"), opened.config
    label = model_label(MINI, opened.directory)
    held_out = HeldOut(opened, model, corpora, output / "tokens")
    lines = [
        line
        for line in collected.read_lines(RESULTS)
        if (line["model"], line["length"]) == (label, length)
    ]
    finished = {(line["stage"], line["run"], line["language"], line["steps"]) for line in lines}
    rates = best_rates(lines)
    for run in runs(stage):
        if run.changes["kind"] not in kinds.split(","):
            continue
        if str(run.changes.get("seed", 0)) not in seeds.split(","):
            continue
        missing = [name for name in run.languages if (stage, run.name, name, steps) not in finished]
        if not missing:
            print(f"{stage} {run.name}: its results are in {RESULTS.name} already")
            continue
        options = options_of(stage, run, corpora, steps, length, rates)
        directory = output / f"{stage}-{steps}-{length}" / run.name
        started = time.monotonic()
        folders = train(options, directory, resume=True, cache=output / "tokens", say=print)
        seconds = time.monotonic() - started
        for language in missing:
            adapter = read_adapter(folders[language], config.projections(), config.n_layer)
            key = {
                "stage": stage,
                "run": run.name,
                "language": language,
                "steps": steps,
                "length": length,
            }
            line = {
                "model": label,
                "kind": options.kind,
                "rank": options.rank,
                "targets": list(options.targets or ("c_attn",)),
                "learning_rate": options.rate,
                "init": options.init,
                "seed": options.seed,
                "parameters": adapter.parameters(),
                **held_out.change(language, adapter, length=length, most=HELD_OUT // length),
                "seconds": round(seconds, 1),
            }
            if stage == "languages":
                line["on_windows_of"] = {
                    other: held_out.change(language, adapter, length=other, most=HELD_OUT // other)
                    for other in LENGTHS
                    if other != length
                }
            if stage == "inits":
                line["spectrum"] = learned_spectrum(adapter)
            print(collected.append_line(RESULTS, key, line))


if __name__ == "__main__":
    run_function(main)
