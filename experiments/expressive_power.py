"""Does a multiplicative adapter express what an additive one of its rank does?

    python experiments/expressive_power.py layer
    python experiments/expressive_power.py model CORPUS.train.jsonl.gz --output runs/expressive

Students of every kind and rank are fitted to teachers.

Teachers are adapters of one target of a model (the embedded one by default): a random LoRA, a random HiRA
(W0 times one plus a random low-rank matrix: FLoRA of a rank more), both of --teacher-rank, and every
adapter of --teacher, by default shipped ones. Students are fresh adapters of every kind and rank.

``layer``: the target's weights alone, layer by layer. The random teachers move each weight by a tenth of
its norm; one more moves it by noise of full rank. A student is the nearest of its kind and rank in least
squares: exact for LoRA, the best of five starts of an alternating fit for FLoRA and HiRA, the best scales
for IA3; DoRA, which has LoRA's and scales beside, is left out. Loss: the share of the squared change of
the weights that is left, over all layers: 0 is the teacher, 1 no better than no adapter.

``model``: students are distilled, --steps steps of AdamW on the KL divergence of the next token, at two
rates of which the better counts. Loss: the divergence on held-out windows as a share of the base's.

Results are appended to experiments/results/expressive_power.jsonl; what is there of the same model,
target and settings is not made again. The tables are expressive_power.md beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

from flora_jax.adapters.kind import KINDS, kind_of
from flora_jax.adapters.model_adapter import ModelAdapter, init_adapter
from flora_jax.bench.receipts import collected
from flora_jax.checkpoints import Opened, open_checkpoint
from flora_jax.checkpoints.digest import model_label
from flora_jax.cli.common import prepare_jax
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.models.model import Model
from flora_jax.peft.read import read_adapter
from flora_jax.shipped import adapter_source
from flora_jax.train.conversion import Text, read_text
from flora_jax.train.distil import DistilOptions, Judge, distil
from flora_jax.train.loop import NonFiniteLossError
from flora_jax.weights.product import explicit

try:
    from experiments.finetune_tables import table
except ModuleNotFoundError:  # Started as a script, whose directory is on the path.
    from finetune_tables import table  # type: ignore[no-redef]

RESULTS = Path(__file__).parent / "results" / "expressive_power.jsonl"
RANKS = (1, 2, 4, 8, 16, 32)
# Of the weight's norm, by which a random teacher moves it.
MOVED = 0.1
RATES = {
    "flora": (3e-2, 1e-1),
    "hira": (3e-2, 1e-1),
    "lora": (3e-3, 1e-2),
    "dora": (3e-3, 1e-2),
    "ia3": (3e-2, 1e-1),
}
SHIPPED = ("lora/lua", "flora/lua", "ia3/lua")


class Student(NamedTuple):
    """A kind and a rank; its line in the results is found by them, the stage and the teacher."""

    kind: str
    rank: int


def students(ranks: tuple[int, ...], kinds: tuple[str, ...]) -> Iterator[Student]:
    """Of each kind those of all ranks; IA3 has one."""
    for kind in kinds:
        for rank in ranks[:1] if KINDS[kind].traits.rank_problem(2) else ranks:
            yield Student(kind, rank)


class Setting(NamedTuple):
    """The model, and the target that adapters are on."""

    opened: Opened
    model: Model
    target: str

    @property
    def layers(self) -> int:
        return self.opened.config.n_layer

    def weight(self, layer: int) -> jax.Array:
        return explicit(self.model.weight(layer, self.target), jnp.float32)

    def fresh(self, student: Student) -> ModelAdapter:
        """An adapter of the kind on the target in every layer."""
        return init_adapter(
            jax.random.key(0), student.kind, self.opened.config.projections(), self.layers,
            rank=student.rank, targets=[self.target], feedforward=[], weights=self.model.weight,
        )  # fmt: skip

    def shipped(self, name: str) -> ModelAdapter:
        """A trained adapter, what it does to the target alone.

        Raises:
            InputError: it leaves the target alone.
        """
        config = self.opened.config
        adapter = read_adapter(adapter_source(name), config.projections(), config.n_layer)
        if not adapter.rank(self.target):
            raise InputError(f"{name}: adapts {', '.join(adapter.targets())}, not {self.target}")
        layers = tuple({self.target: layer[self.target]} for layer in adapter.layers)
        return dataclasses.replace(adapter, layers=layers)

    def random(self, kind: str, rank: int) -> ModelAdapter:
        """A LoRA or HiRA of normal factors that moves every weight by ``MOVED`` of its norm."""
        adapter = self.fresh(Student(kind, rank))
        layers = []
        for number, layer in enumerate(adapter.layers):
            params, W_IO = layer[self.target], self.weight(number)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
            drawn = dataclasses.replace(
                params, down_RI=jax.random.normal(keys[0], params.down_RI.shape),
                up_RO=jax.random.normal(keys[1], params.up_RO.shape),
            )  # fmt: skip
            moved_IO = kind_of(drawn).merge(drawn, W_IO, None)[0] - W_IO
            scale = MOVED * jnp.linalg.norm(W_IO) / jnp.linalg.norm(moved_IO)
            layers.append({self.target: dataclasses.replace(drawn, up_RO=scale * drawn.up_RO)})
        return dataclasses.replace(adapter, layers=tuple(layers))

    def teachers(self, names: tuple[str, ...], rank: int) -> Iterator[tuple[str, ModelAdapter]]:
        """Random ones, and those of ``names``."""
        for kind in ("lora", "hira"):
            yield f"random {kind} of rank {rank}", self.random(kind, rank)
        for name in names:
            yield name, self.shipped(name)


class Results:
    """A line with its receipt for each student of each teacher under the same ``settings``."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def _key(self, teacher: str, student: Student) -> dict[str, Any]:
        return {"settings": self.settings, "teacher": teacher, **student._asdict()}

    def has(self, teacher: str, student: Student) -> bool:
        return collected.made(RESULTS, self._key(teacher, student)) is not None

    def add(self, teacher: str, student: Student, found: dict[str, Any]) -> None:
        collected.append_line(RESULTS, self._key(teacher, student), found)
        print(teacher, student, f"{found['left']:.4f} left", flush=True)


def write_tables() -> None:
    """For each setting and teacher, losses by kind and rank with the numbers of parameters."""
    lines = collected.read_lines(RESULTS)
    parts = ["# Students of every kind", "`experiments/expressive_power.py` says how."]
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        grouped.setdefault((_title(line["settings"]), line["teacher"]), []).append(line)
    for (title, teacher), own in grouped.items():
        kinds = list(dict.fromkeys(line["kind"] for line in own))
        found = {(line["kind"], line["rank"]): line for line in own}
        rows = []
        for rank in sorted({line["rank"] for line in own}):
            cells = [found.get((kind, rank)) for kind in kinds]
            rows.append([str(rank), *(_cell(line) for line in cells)])
        parts += [f"## {title}; teacher: {teacher}", table(("rank", *kinds), rows)]
    RESULTS.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def _title(settings: dict[str, Any]) -> str:
    return ", ".join(
        str(value) if name in ("stage", "model", "target") else f"{name} {value}"
        for name, value in settings.items()
    )


def _cell(line: dict[str, Any] | None) -> str:
    return "" if line is None else f"{line['left']:.3f} ({line['parameters']:,})"


def best_scales(W_IO: jax.Array, wanted_IO: jax.Array) -> jax.Array:
    """``W ∘ 1 lᵀ`` nearest to ``wanted``: IA3 on outputs."""
    square_O = jnp.sum(jnp.square(W_IO), axis=0)
    scale_O = jnp.sum(W_IO * wanted_IO, axis=0) / jnp.where(square_O > 0, square_O, 1.0)
    return W_IO * scale_O[None]


def fitted(student: Student, W_IO: jax.Array, wanted_IO: jax.Array) -> jax.Array:
    """The weight under the nearest adapter of the student's kind and rank."""
    nearest = KINDS[student.kind].nearest
    if nearest is None:
        return best_scales(W_IO, wanted_IO)
    params = nearest(W_IO, wanted_IO, student.rank, jnp.ones(len(W_IO)), jax.random.key(0))
    return kind_of(params).merge(params, W_IO, None)[0]


def run_layer(setting: Setting, results: Results, names: tuple[str, ...], rank: int) -> None:
    """The stage of weights alone."""
    wanted: dict[str, list[jax.Array]] = {}
    for name, adapter in setting.teachers(names, rank):
        wanted[name] = [
            kind_of(layer[setting.target]).merge(layer[setting.target], setting.weight(n), None)[0]
            for n, layer in enumerate(adapter.layers)
        ]
    rng = np.random.default_rng(2)
    wanted["noise of full rank"] = []
    for number in range(setting.layers):
        W_IO = setting.weight(number)
        noise_IO = jnp.asarray(rng.normal(size=W_IO.shape), jnp.float32)
        scale = MOVED * jnp.linalg.norm(W_IO) / jnp.linalg.norm(noise_IO)
        wanted["noise of full rank"].append(W_IO + scale * noise_IO)
    for name, weights in wanted.items():
        for student in students(RANKS, ("lora", "flora", "hira", "ia3")):
            if results.has(name, student):
                continue
            left = moved = 0.0
            for number, wanted_IO in enumerate(weights):
                W_IO = setting.weight(number)
                left += float(jnp.sum(jnp.square(fitted(student, W_IO, wanted_IO) - wanted_IO)))
                moved += float(jnp.sum(jnp.square(wanted_IO - W_IO)))
            parameters = setting.fresh(student).parameters()
            results.add(name, student, {"parameters": parameters, "left": left / moved})


def run_model(
    setting: Setting, results: Results, text: Text, options: DistilOptions, names: tuple[str, ...],
    rank: int,
) -> None:  # fmt: skip
    """The stage of predictions."""
    for name, teacher in setting.teachers(names, rank):
        judge = Judge(setting.model, teacher, text.held_out, text.piece_bytes, options, 64)
        # A fresh adapter is the base.
        alone = judge.divergence(setting.fresh(Student("lora", 1)))
        for student in students((1, 4, 16), ("lora", "dora", "flora", "hira", "ia3")):
            if results.has(name, student):
                continue
            found = {}
            for rate in RATES[student.kind]:
                own = dataclasses.replace(options, learning_rate=rate)
                start = setting.fresh(student)
                try:
                    made = distil(setting.model, teacher, start, text.training, own)
                except NonFiniteLossError:
                    continue
                found[rate] = judge.divergence(made) / alone
            if not found:
                raise InputError(f"{student}: diverged at all of {RATES[student.kind]}")
            best = min(found, key=lambda rate: found[rate])
            results.add(name, student, {
                "parameters": setting.fresh(student).parameters(), "left": found[best],
                "rate": best, "by_rate": {f"{rate:g}": left for rate, left in found.items()},
                "base_divergence": alone,
            })  # fmt: skip


def main(
    stage: Annotated[str, typer.Argument(help="layer or model")],
    corpus: Annotated[str | None, typer.Argument(help="Text, for the stage model.")] = None,
    model: Annotated[str, typer.Option()] = "mini",
    target: Annotated[str, typer.Option()] = "attn.c_attn",
    teacher: Annotated[
        list[str] | None, typer.Option(help="A shipped adapter or a folder.")
    ] = None,
    teacher_rank: Annotated[int, typer.Option(help="Of the random ones.")] = 4,
    steps: int = 150,
    rows: int = 4,
    length: int = 128,
    output: Annotated[Path, typer.Option(help="For tokenised text.")] = Path("runs/expressive"),
) -> None:
    """Runs what is not yet done of a stage, appends its results and writes the tables."""
    prepare_jax()
    opened = open_checkpoint(model)
    setting = Setting(opened, opened.load("float32"), target)
    names = tuple(teacher) if teacher else SHIPPED
    settings: dict[str, Any] = {
        "stage": stage, "model": model_label(model, opened.directory),
        "target": target,
    }  # fmt: skip
    if stage == "layer":
        run_layer(setting, Results(settings), names, teacher_rank)
    elif stage == "model":
        if corpus is None:
            raise InputError("CORPUS is missing, expected a file of text")
        options = DistilOptions(steps=steps, rows=rows, length=length)
        text = read_text(corpus, opened, length, cache=output / "tokens")
        settings |= {"text": Path(corpus).name, "steps": steps, "rows": rows, "length": length}
        run_model(setting, Results(settings), text, options, names, teacher_rank)
    else:
        raise InputError(f"STAGE is {stage!r}, expected layer or model")
    write_tables()


if __name__ == "__main__":
    run_function(main)
