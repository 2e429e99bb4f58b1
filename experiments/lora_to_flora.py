"""How much of a trained LoRA a multiplicative adapter keeps, by rank and by way of converting it.

    python experiments/lora_to_flora.py convert CORPORA --output runs/lora_to_flora
    python experiments/lora_to_flora.py random

``convert``: adapters of a model, by default the LoRAs that ship, each NAME=FOLDER of ``--adapters`` with
CORPORA/NAME.train.jsonl.gz and CORPORA/NAME.validation.jsonl.gz, become FLoRA (a sum of components) and
HiRA of ranks 1 to 32 in three ways: without data; with the fit weighted by the second moments of the
projections' inputs (64 training windows under the LoRA); and from there distilled, 200 steps of 8 rows
of 256 training tokens by default, as the LoRAs that ship were trained. ``--to lora`` turns FLoRAs into
LoRAs instead. A fourth way, ``--ways anew``, trains an adapter of that kind and rank on the same number
of tokens, at ``--rate`` or the kind's own.

A result has the share of the adapter's gain in held-out bits per byte over the base that is kept (with
``compare``'s paired intervals of the change itself), the error left in the weights relative to how far
the adapter moves them, and the seconds that it took, compilation included. What the errors bound:

- to LoRA they are the best there is, the singular values of the change beyond the rank;
- to FLoRA and HiRA there is no closed form: the least of five starts of an alternating fit, so that a
  smaller error may exist. The error of a distilled adapter is of its weights all the same, though it
  was not what was made small.

``random``: what a rank-R multiplicative adapter keeps of ‖ΔW‖² where ΔW = a bᵀ is independent of W0:
for a normal W0 with entries of a and b that are signs, or normal; for a W0 of the same sizes but
positive; for one of ones. Beside them R / I, the share of a rank, and that of the largest R singular
values of pure noise, the normal W0 itself. (Of a change with normal a and b a third of the rows and
columns counts in effect, so that about three times as much is kept.)

Results are appended to experiments/results/lora_to_flora.jsonl, and what is there of the same model and
settings is not made again; the tables are lora_to_flora.md beside it.

Receipt: one core of an AMD EPYC (Zen 4), often with another process beside; jax 0.10.2. ``random`` a few
minutes; ``convert`` of three LoRAs without distilling 30 minutes, distilled at three ranks, 100 steps,
2.5 to 5 minutes each.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer

from flora_jax.adapters import fits
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.bench.receipts import collected
from flora_jax.checkpoints import Opened, open_checkpoint
from flora_jax.checkpoints.digest import model_label
from flora_jax.cli.common import named_values, prepare_jax
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.peft.convert import Base, Moments, convert, differences, total_of
from flora_jax.peft.read import read_adapter
from flora_jax.shipped import ASSETS, adapter_source
from flora_jax.train.conversion import moments_of
from flora_jax.train.data.tokens import tokenize
from flora_jax.train.distil import DistilOptions, distil
from flora_jax.train.options import make_options
from flora_jax.train.run import train

try:
    from experiments.finetune_tables import table
    from experiments.held_out import HeldOut
except ModuleNotFoundError:  # Started as a script, whose directory is on the path.
    from finetune_tables import table  # type: ignore[no-redef]
    from held_out import HeldOut  # type: ignore[no-redef]

RESULTS = Path(__file__).parent / "results" / "lora_to_flora.jsonl"
WAYS = ("data-free", "moments", "distilled")
# Of the stage "random": inputs and outputs, ranks, and drawn pairs of a weight and a change.
SIZES, RANDOM_RANKS, DRAWS = (128, 192), (1, 2, 4, 8, 16, 32), 2


class Setting(NamedTuple):
    """What all conversions of a run have in common."""

    model: str
    corpora: Path
    output: Path
    distil: DistilOptions
    windows: int


class Case(NamedTuple):
    """A conversion; lines of results are told apart by it.

    ``steps`` and ``rate`` are of what is distilled or trained, 0 and ``None`` elsewhere;
    ``most_windows`` of held-out text are scored.
    """

    model: str
    adapter: str
    source: str
    to: str
    rank: int
    way: str
    steps: int
    rate: float | None
    rows: int
    length: int
    most_windows: int

    @property
    def key(self) -> dict[str, Any]:
        return {"stage": "convert", **self._asdict()}


def read_results(stage: str) -> list[dict[str, Any]]:
    """The results of a stage that were collected so far."""
    return [line for line in collected.read_lines(RESULTS) if line["stage"] == stage]


class Adapted:
    """One adapter on its model: its text, and what it and the base predict of held-out windows."""

    def __init__(
        self, setting: Setting, opened: Opened, held_out: HeldOut, name: str, source: ModelAdapter
    ) -> None:
        self.setting, self.model, self.name, self.source = setting, held_out.model, name, source
        self._opened, self._held_out = opened, held_out
        self.training, _ = tokenize(
            self.path, *opened.text_tokens("text"), cache=setting.output / "tokens"
        )
        self._source_change = self._change(source)

    @property
    def path(self) -> Path:
        return self.setting.corpora / f"{self.name}.train.jsonl.gz"

    @cached_property
    def moments(self) -> tuple[Moments, float]:
        """Second moments of the projections' inputs, and the seconds that they took."""
        started = time.monotonic()
        found = moments_of(self.model, self.source, self.training, self.setting.distil)
        return found, time.monotonic() - started

    def _change(self, adapter: ModelAdapter) -> dict[str, Any]:
        length, most = self.setting.distil.length, self.setting.windows
        return self._held_out.change(self.name, adapter, length=length, most=most)

    def made(self, case: Case) -> tuple[ModelAdapter, float]:
        """The adapter of a case, and the seconds that it took."""
        own, started = self.setting.distil, time.monotonic()
        if case.way == "anew":
            adapter = self._trained(case)
            return adapter, time.monotonic() - started
        base = Base(self.model.weight, self.model.bias)
        moments, before = (None, 0.0) if case.way == "data-free" else self.moments
        started = time.monotonic()
        found = convert(
            self.source, case.to, base, rank=case.rank, approximate=True, seed=own.seed,
            moments=None if moments is None else lambda: moments,
        )  # fmt: skip
        adapter = found.adapter
        if case.way == "distilled" and len(found.exact) < len(found.differences):
            adapter = distil(self.model, self.source, adapter, self.training, own, held=found.exact)
        return adapter, time.monotonic() - started + before

    def _trained(self, case: Case) -> ModelAdapter:
        own = self.setting.distil
        values = {
            "model": self.setting.model, "kind": case.to, "rank": case.rank, "steps": own.steps,
            "batch_size": own.rows, "seq_len": own.length, "seed": own.seed,
            "data": {self.name: str(self.path)}, "eval_every": own.steps,
            "targets": list(self.source.targets()), "learning_rate": case.rate,
        }  # fmt: skip
        options = make_options(values)
        # One for each combination of what a result is told apart by.
        made = f"{case.to}-r{case.rank}-at-{case.rate:g}-{own.steps}x{own.rows}x{own.length}"
        place = self.setting.output / f"{case.model}-{self.name}-{made}".replace(" ", "-")
        folders = train(options, place, resume=True, cache=self.setting.output / "tokens")
        config = self._opened.config
        return read_adapter(folders[self.name], config.projections(), config.n_layer)

    def result(self, case: Case) -> dict[str, Any]:
        """What a line of the results has beside its key."""
        adapter, seconds = self.made(case)
        measured, source = self._change(adapter), self._source_change
        gain = -source["bits_per_byte_change"]
        base = Base(self.model.weight, self.model.bias)
        error = total_of(differences(self.source, adapter, base))
        return {
            "parameters": adapter.parameters(),
            "weights_error": round(error, 5),
            "kept": round(-measured["bits_per_byte_change"] / gain, 4) if gain > 0 else None,
            "source_bits_per_byte": source["bits_per_byte"],
            "source_bits_per_byte_change": source["bits_per_byte_change"],
            **measured,
            "seconds": round(seconds, 1),
        }


def run_conversions(
    setting: Setting, opened: Opened, adapters: dict[str, Path],
    cases: Callable[[str, str], list[Case]],
) -> None:  # fmt: skip
    """Makes what is not there yet; ``cases`` gives those of an adapter's name and kind."""
    config, held_out = opened.config, None
    for name, folder in adapters.items():
        source = read_adapter(folder, config.projections(), config.n_layer)
        wanted = [
            case for case in cases(name, source.kind) if collected.made(RESULTS, case.key) is None
        ]
        if not wanted:
            print(f"{name}: all its results are in {RESULTS.name} already")
            continue
        if held_out is None:
            model = opened.load("float32")
            held_out = HeldOut(opened, model, setting.corpora, setting.output / "tokens")
        adapted = Adapted(setting, opened, held_out, name, source)
        for case in wanted:
            print(collected.append_line(RESULTS, case.key, adapted.result(case)), flush=True)


def kept_of_random(rank: int, seed: int) -> Iterator[tuple[str, float]]:
    """By the way in which the weight is drawn, what is kept of ``‖ΔW‖²`` of a change of rank 1."""
    inputs, outputs = SIZES
    keys = jax.random.split(jax.random.key(seed), 4)
    normal_IO = jax.random.normal(keys[0], SIZES)
    down_I1, up_1O = (
        jax.random.normal(keys[1], (inputs, 1)),
        jax.random.normal(keys[2], (1, outputs)),
    )
    change_IO, flat_IO = down_I1 * up_1O, jnp.sign(down_I1) * jnp.sign(up_1O)
    drawn = {
        "normal, change of signs": (normal_IO, flat_IO),
        "normal, normal change": (normal_IO, change_IO),
        "its sizes, normal change": (jnp.abs(normal_IO), change_IO),
        "ones, normal change": (jnp.ones(SIZES), change_IO),
    }
    for name, (W_IO, wanted_IO) in drawn.items():
        fit = fits.product_of(W_IO, wanted_IO, rank, jnp.ones(inputs), key=keys[3])
        yield name, 1.0 - float(fit.left)


def noise(rank: int, seed: int) -> float:
    """The share of a normal matrix that its largest singular values have."""
    normal_IO = jax.random.normal(jax.random.split(jax.random.key(seed), 4)[0], SIZES)
    return 1.0 - float(fits.sum_of(normal_IO, rank, jnp.ones(SIZES[0])).left)


def run_random() -> None:
    """Makes what is not there yet of the stage "random"."""
    for rank in RANDOM_RANKS:
        key = {"stage": "random", "sizes": SIZES, "rank": rank}
        if collected.made(RESULTS, key) is not None:
            continue
        found: dict[str, list[float]] = {}
        for seed in range(DRAWS):
            for name, kept in kept_of_random(rank, seed):
                found.setdefault(name, []).append(kept)
        collected.append_line(RESULTS, key, {
            "kept": {name: round(statistics.mean(own), 4) for name, own in found.items()},
            "share of the rank": round(rank / min(SIZES), 4),
            "of noise": round(statistics.mean(noise(rank, seed) for seed in range(DRAWS)), 4),
        })  # fmt: skip


def mean_and_range(values: Iterable[float], form: str) -> str:
    """The mean, and the least and the most where there are several."""
    own = list(values)
    mean = format(statistics.mean(own), form)
    return mean if len(own) == 1 else f"{mean} ({min(own):{form}} to {max(own):{form}})"


def conversion_tables(lines: list[dict[str, Any]]) -> Iterator[str]:
    """For each model, kinds and sizes of text: rows of way, rank, steps and rate, over the adapters."""
    common = ("model", "source", "to", "rows", "length", "most_windows")
    own = ("way", "rank", "steps", "rate")
    head = (*own, "parameters", "adapters", "gain kept", "weights' error", "seconds")
    for group in _alike(lines, common):
        rows = []
        for cell in _alike(group, own):
            kept = [line["kept"] for line in cell if line["kept"] is not None]
            first = cell[0]
            rows.append(
                (
                    first["way"],
                    str(first["rank"]),
                    str(first["steps"] or ""),
                    f"{first['rate']:g}" if first["rate"] else "",
                    f"{first['parameters']:,}",
                    str(len(cell)),
                    mean_and_range(kept, ".1%") if kept else "",
                    mean_and_range([line["weights_error"] for line in cell], ".3f"),
                    mean_and_range([line["seconds"] for line in cell], ".0f"),
                )
            )
        line = group[0]
        yield (
            f"## {line['source']} as {line['to']}, {line['model']}: rows of {line['rows']} x "
            f"{line['length']} tokens, up to {line['most_windows']} held-out windows"
        )
        yield table(head, rows)


def _alike(lines: list[dict[str, Any]], names: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """Lines by their values of ``names``, in order of these."""

    def place(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple((line[name] is not None, line[name]) for name in names)

    ordered = sorted(lines, key=place)
    return [list(group) for _, group in itertools.groupby(ordered, place)]


def write_tables() -> None:
    """Writes and prints the tables."""
    parts = ["# LoRA as FLoRA and HiRA", "`experiments/lora_to_flora.py` says how."]
    parts += conversion_tables(read_results("convert"))
    drawn = read_results("random")
    if drawn:
        names = list(drawn[0]["kept"])
        head = ("rank", *(f"W0 {name}" for name in names), "R / I", "noise")
        rows = [
            (
                str(line["rank"]),
                *(f"{line['kept'][name]:.1%}" for name in names),
                f"{line['share of the rank']:.1%}",
                f"{line['of noise']:.1%}",
            )
            for line in drawn
        ]
        inputs, outputs = drawn[0]["sizes"]
        title = f"What is kept of a random change of rank 1 of a weight of {inputs} x {outputs}"
        parts += [f"## {title}", table(head, rows)]
    text = "\n\n".join(parts) + "\n"
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


def main(
    stage: Annotated[str, typer.Argument(help="convert or random")],
    corpora: Annotated[Path | None, typer.Argument()] = None,
    output: Annotated[Path, typer.Option()] = Path("runs/lora_to_flora"),
    model: Annotated[str, typer.Option()] = "mini",
    adapters: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="[default: those that ship]")
    ] = None,
    to: Annotated[str, typer.Option(help="Comma-separated.")] = "flora,hira",
    ranks: Annotated[str, typer.Option()] = "1,2,4,8,16,32",
    ways: Annotated[str, typer.Option(help="Also: anew.")] = ",".join(WAYS),
    steps: Annotated[int, typer.Option()] = 200,
    rate: Annotated[float | None, typer.Option(help="[default: the kind's own]")] = None,
    rows: Annotated[int, typer.Option()] = 8,
    length: Annotated[int, typer.Option()] = 256,
    windows: Annotated[int, typer.Option(help="Held-out windows of an adapter.")] = 192,
) -> None:
    """Runs what is not yet done of a stage, appends its results and writes the tables."""
    prepare_jax()
    if stage == "random":
        run_random()
    elif stage == "convert":
        if corpora is None:
            raise InputError("CORPORA is missing, expected the directory of NAME.train.jsonl.gz")
        wrong = sorted(set(ways.split(",")) - {*WAYS, "anew"})
        if wrong:
            raise InputError(f"--ways is {wrong[0]!r}, expected some of {', '.join(WAYS)}, anew")
        kind = "flora" if to == "lora" else "lora"
        shipped = sorted((ASSETS / "adapters" / kind).iterdir())
        found = {folder.name: folder for folder in shipped}
        if adapters:
            named = named_values(adapters, "adapters", "NAME=FOLDER")
            found = {name: adapter_source(folder) for name, folder in named.items()}
        opened = open_checkpoint(model)
        setting = Setting(model, corpora, output, DistilOptions(steps, rate, rows, length), windows)
        label = model_label(model, opened.directory)

        def learning(kind: str, way: str) -> tuple[int, float | None]:
            return (0, None) if way in WAYS[:2] else (steps, setting.distil.rate(kind))

        sizes = rows, length, windows

        def cases(name: str, source: str) -> list[Case]:
            return [
                Case(label, name, source, kind, int(rank), way, *learning(kind, way), *sizes)
                for kind in to.split(",")
                for rank in ranks.split(",")
                for way in ways.split(",")
            ]

        run_conversions(setting, opened, found, cases)
    else:
        raise InputError(f"STAGE is {stage!r}, expected convert or random")
    write_tables()


if __name__ == "__main__":
    run_function(main)
