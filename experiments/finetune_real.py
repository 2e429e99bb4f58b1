"""What adapters do to a real model: each kind on each language, and bits per byte of held-out files.

    python experiments/finetune_real.py sweep MODEL CORPORA --output runs/finetune_real
    python experiments/finetune_real.py main MODEL CORPORA --output runs/finetune_real

MODEL is a Hugging Face directory of SmolLM2-135M-Instruct (``flora-jax convert FILE.gguf MODEL --to hf``
makes one), or any other model; CORPORA has LANGUAGE.train.jsonl.gz and LANGUAGE.validation.jsonl.gz.
Stages:

    sweep   learning rates for each kind, and for FLoRA from a frozen first component, on the first
            language; the rate with the fewest bits is used
    main    FLoRA of rank 1, of rank 4 from zero-sum noise and from a frozen first component; LoRA of
            rank 1 and 8; DoRA of rank 8; IA3 where PEFT places it; HiRA of rank 4. A run trains an
            adapter for every language in one step

``--preset cpu``: three languages (Perl, Lua, Racket), rows of 256 tokens, two of each adapter in a step.
``--preset gpu``: seven languages, more ranks, eight rows of 512. Every run resumes where it was stopped;
one whose results are there, of the same model, preset and steps, is not run again. Results are collected
in --results, one object for each adapter, with paired 95 % intervals of its change to the base by a
bootstrap over windows of held-out files (windows of one file are alike, so they are somewhat too narrow),
and as tables beside them.

Receipt: SmolLM2-135M-Instruct from its Q4_1 file, ``--preset cpu``, ``main`` with ``--steps 40``, on 2
cores of an Intel Xeon at 2.5 GHz beside other work: some 100 s a run of the sweep, 7 to 10 minutes one of
the main stage, 120 to 150 tokens/s; jax 0.10.2. The preset gpu has not been run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from flora_jax.bench.receipts import collected
from flora_jax.checkpoints.checkpoint import Opened, open_checkpoint
from flora_jax.checkpoints.digest import model_label
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.peft.read import read_adapter
from flora_jax.train.options import TrainOptions, make_options
from flora_jax.train.run import train

try:
    from experiments.finetune_tables import HEAD, row, table
    from experiments.held_out import HeldOut
except ModuleNotFoundError:  # Started as a script, whose directory is on the path.
    from finetune_tables import HEAD, row, table  # type: ignore[no-redef]
    from held_out import HeldOut  # type: ignore[no-redef]

Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
    "FLoRA r 1": {"kind": "flora"},
    "LoRA r 1": {"kind": "lora"},
    "IA3": {"kind": "ia3"},
    "FLoRA r 4": {"kind": "flora", "rank": 4},
    "FLoRA r 4, frozen ones": {"kind": "flora", "rank": 4, "init": "frozen_ones"},
    "LoRA r 8": {"kind": "lora", "rank": 8},
    "HiRA r 4": {"kind": "hira", "rank": 4},
    "DoRA r 8": {"kind": "dora", "rank": 8},
}
MORE_SHAPES: dict[str, Shape] = {
    f"{name} r {rank}": {"kind": kind, "rank": rank}
    for kind, name in (("flora", "FLoRA"), ("lora", "LoRA"), ("hira", "HiRA"), ("dora", "DoRA"))
    for rank in (2, 8, 16, 32)
    if (kind, rank) not in {("lora", 8), ("dora", 8)}
}
# The shapes that are swept, and their rates; others have that of their kind and start.
SWEPT: dict[str, tuple[float, ...]] = {
    "FLoRA r 1": (2e-3, 8e-3, 3.2e-2, 1.28e-1),
    "FLoRA r 4, frozen ones": (8e-3, 3.2e-2, 6.4e-2, 1.28e-1, 5.12e-1),
    "LoRA r 8": (3e-4, 1e-3, 4e-3, 1.6e-2),
    "IA3": (5e-3, 2e-2, 8e-2),
    "HiRA r 4": (8e-3, 3.2e-2, 1.28e-1),
    "DoRA r 8": (3e-4, 1e-3, 4e-3, 1.6e-2),
}


class Preset(NamedTuple):
    """How much is trained: ``rows`` of ``length`` tokens of each adapter in a step."""

    languages: tuple[str, ...]
    shapes: dict[str, Shape]
    rows: int
    length: int
    steps: int
    sweep_steps: int
    windows: int
    dtype: str


PRESETS = {
    "cpu": Preset(("perl", "lua", "racket"), SHAPES, 2, 256, 60, 20, 64, "float32"),
    "gpu": Preset(
        ("perl", "lua", "racket", "d", "ruby", "rust", "swift"),
        SHAPES | MORE_SHAPES, 8, 512, 250, 60, 192, "bfloat16",
    ),
}  # fmt: skip


class Run(NamedTuple):
    """A run by name: its languages, and what differs from the recipe."""

    name: str
    languages: tuple[str, ...]
    changes: Shape


class Results:
    """A line for each adapter of a run, and tables of them.

    Args:
        path: of the lines.
        settings: the model, preset and steps; lines of others are kept apart.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def key(self, stage: str, run: str, language: str) -> dict[str, Any]:
        return {"stage": stage, "run": run, "language": language, **self.settings}

    def has(self, stage: str, run: Run) -> bool:
        """Whether all adapters of the run are there."""
        keys = [self.key(stage, run.name, language) for language in run.languages]
        return all(collected.made(self.path, key) is not None for key in keys)

    def add(self, stage: str, run: Run, found: dict[str, dict[str, Any]]) -> None:
        """Adds what was found by language, and writes the tables."""
        for language, line in found.items():
            print(
                collected.append_line(self.path, self.key(stage, run.name, language), line),
                flush=True,
            )
        self.path.with_suffix(".md").write_text(tables(collected.read_lines(self.path)))

    def rate(self, shape: Shape) -> float:
        """The rate with the fewest bits in the sweep of the same model, preset, kind and start.

        Raises:
            InputError: there is none.
        """
        wanted = {"stage": "sweep", "kind": shape["kind"], "init": shape.get("init")} | {
            name: self.settings[name] for name in ("model", "preset")
        }
        own = [
            line
            for line in collected.read_lines(self.path)
            if all(line[name] == value for name, value in wanted.items())
        ]
        if not own:
            said = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise InputError(f"{self.path}: no line of {said}; run the sweep first")
        return float(min(own, key=lambda line: line["bits_per_byte"])["learning_rate"])


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown: for each stage, model, preset and length of training a table."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        title = (
            f"{line['stage']}: {line['model']}, preset {line['preset']}, "
            f"{line['tokens_trained']:,} tokens for each adapter"
        )
        grouped.setdefault(title, []).append(line)
    parts = ["# Fine-tuning a real model", "`experiments/finetune_real.py` says how."]
    for title in sorted(grouped, reverse=True):
        parts += [f"## {title}", table(HEAD, map(row, sorted(grouped[title], key=_place)))]
    return "\n\n".join(parts) + "\n"


def _place(line: dict[str, Any]) -> tuple[str, float]:
    return line["language"], line["bits_per_byte"]


def runs(stage: str, preset: Preset) -> Iterator[Run]:
    """The runs of a stage."""
    if stage == "sweep":
        for name, rates in SWEPT.items():
            for rate in rates:
                changes = SHAPES[name] | {"learning_rate": rate}
                yield Run(f"{name} at {rate:g}", preset.languages[:1], changes)
    elif stage == "main":
        for name, shape in preset.shapes.items():
            yield Run(name, preset.languages, shape)
    else:
        raise InputError(f"STAGE is {stage!r}, expected sweep or main")


class Study(NamedTuple):
    """A model, its texts, and how much of them is used."""

    model: str
    opened: Opened
    corpora: Path
    output: Path
    preset: Preset

    def options(self, run: Run, steps: int) -> TrainOptions:
        """The recipe with the run's changes."""

        def files(part: str) -> dict[str, str]:
            return {n: str(self.corpora / f"{n}.{part}.jsonl.gz") for n in run.languages}

        own = self.preset
        values = {
            "model": self.model, "data": files("train"), "steps": steps,
            "batch_size": own.rows * len(run.languages), "seq_len": own.length,
            "eval_every": steps, "save_every": 10, "keep": 1, "dtype": own.dtype,
        }  # fmt: skip
        return make_options(values | run.changes)


def main(
    stage: Annotated[str, typer.Argument(help="sweep or main")],
    model: str,
    corpora: Path,
    output: Annotated[Path, typer.Option()],
    preset: Annotated[str, typer.Option(help="cpu or gpu")] = "cpu",
    steps: Annotated[int | None, typer.Option(help="Default: the preset's.")] = None,
    results: Annotated[Path, typer.Option(help="JSON lines; a table is written beside it.")] = Path(
        "experiments/results/finetune_real.jsonl"
    ),
) -> None:
    """Runs what is not yet done of a stage and appends its results."""
    if preset not in PRESETS:
        raise InputError(f"--preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    own = PRESETS[preset]
    steps = steps or (own.sweep_steps if stage == "sweep" else own.steps)
    study = Study(model, open_checkpoint(model), corpora, output, own)
    label = model_label(model, study.opened.directory)
    found = Results(results, {"model": label, "preset": preset, "steps": steps})
    held_out: HeldOut | None = None
    for run in runs(stage, own):
        if found.has(stage, run):
            print(f"{stage}: {run.name} is in {results.name} already")
            continue
        changes = run.changes
        if stage == "main":
            changes = changes | {"learning_rate": found.rate(changes)}
        options = study.options(run._replace(changes=changes), steps)
        directory = output / f"{stage}-{steps}" / run.name.replace(" ", "-").replace(",", "")
        started = time.monotonic()
        folders = train(options, directory, resume=True, cache=output / "tokens", say=print)
        seconds = time.monotonic() - started
        if held_out is None:
            loaded = study.opened.load(own.dtype)
            held_out = HeldOut(study.opened, loaded, corpora, output / "tokens")
        config = study.opened.config
        lines = {}
        for language in run.languages:
            adapter = read_adapter(folders[language], config.projections(), config.n_layer)
            lines[language] = {
                "kind": options.kind, "rank": options.rank, "init": options.init,
                "learning_rate": options.rate, "tokens_trained": steps * own.rows * own.length,
                "parameters": adapter.parameters(),
                **held_out.change(language, adapter, length=own.length, most=own.windows),
                "seconds": round(seconds, 1),
            }  # fmt: skip
        found.add(stage, run, lines)


if __name__ == "__main__":
    run_function(main)
