"""Trains the small StarCoder that ships in the package, and its tokenizer, from scratch.

    python experiments/pretrain_mini.py CORPORA... --output runs/mini \\
        --sources experiments/mini_sources.md

CORPORA is what `experiments/source_text.py` reads: directories with LANGUAGE.train.jsonl.gz or
LANGUAGE.jsonl.xz and LANGUAGE.validation.jsonl.gz, a directory of source files, or one packed file for a
machine that has nothing else. All of Python is used and at most --other-bytes of every other language.
Killed or stopped, the same command goes on from its last checkpoint, with --seconds to the number of
steps that it had found; as long as the learning rate does not fall yet, also with other --steps, --rows,
--learning-rate and --dtype, and on another machine. OUTPUT/model is what ships as flora_jax/assets/mini.
On a GPU:

    python experiments/pretrain_mini.py packed.jsonl.xz --output runs/mini --seconds 360 --rows 64 \\
        --dtype bfloat16 --sources experiments/mini_sources.md

Receipt: see that folder's README.md for the data, the recipe and the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flora_jax.checkpoints.checkpoint import save_hf
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.files import whole_path
from flora_jax.models.model import Model, init_model
from flora_jax.models.starcoder.config import PRESETS, StarCoderConfig
from flora_jax.train.choice import choose
from flora_jax.train.data.documents import Document
from flora_jax.train.data.packing import windows_at
from flora_jax.train.data.tokens import pack, piece_bytes
from flora_jax.train.loop import LoopOptions, Work, run_loop
from flora_jax.train.loss import bits_per_byte
from flora_jax.train.options import CHECKPOINTS, METRICS
from flora_jax.train.step import StepOptions, TrainState

try:
    from experiments import pretraining, source_text
except ModuleNotFoundError:  # Run as a script, from its own directory.
    import pretraining  # type: ignore[no-redef]
    import source_text  # type: ignore[no-redef]

# Features of a head.
HEAD = 64
# Steps of a first stretch, which compiles, and of a second one, which is timed.
FEW = 40
# What of the time that is left the next stretch takes, each timed by the one before.
SHARES = (0.05, 0.3, 0.4, 1.0)
END = "<|endoftext|>"
# Bytes of text that the tokenizer is trained on: more changes its merges little.
TOKENIZER_BYTES = 40_000_000


def train_tokenizer(documents: list[str], pieces: int) -> Tokenizer:
    """A byte-level BPE with StarCoder's pre-tokenizer: single digits, no prefix space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=pieces,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


class Stream(NamedTuple):
    """Documents end to end as whole windows, whose rows take no notice of where a document ends.

    ``tokens [n]`` is unsigned; ``text_bytes`` counts the UTF-8 bytes of the documents.
    """

    tokens: np.ndarray
    text_bytes: int

    def windows(self, length: int) -> int:
        """How many windows of ``length + 1`` tokens there are, each overlapping the next by one."""
        return (len(self.tokens) - 1) // length

    def window(self, index: int, length: int) -> np.ndarray:
        return self.tokens[index * length : index * length + length + 1]

    def batch(self, step: int, rows: int, length: int, seed: int) -> np.ndarray:
        """Batch number ``step`` as int32 ``[rows, length + 1]``; see :func:`.data.windows_at`.

        Raises:
            InputError: the stream holds no window of this length.
        """
        if (count := self.windows(length)) < 1:
            raise InputError(
                f"{len(self.tokens)} tokens hold no window of {length + 1}; give more documents"
            )
        picked = [self.window(n, length) for n in windows_at(step, rows, count, seed)]
        return np.stack(picked).astype(np.int32)

    def save(self, path: Path) -> None:
        # A file, as of a path savez would change the name.
        with whole_path(path) as part, part.open("wb") as file:
            np.savez(file, tokens=self.tokens, text_bytes=self.text_bytes)

    @classmethod
    def load(cls, path: Path) -> Stream:
        with np.load(path) as arrays:
            return cls(arrays["tokens"], int(arrays["text_bytes"]))


def stream(tokenizer: Tokenizer, documents: list[str]) -> Stream:
    """The documents' tokens end to end, each closed by the end token (id 0)."""
    packed = pack((Document("", text) for text in documents), tokenizer, end_id=0)
    return Stream(packed.tokens, packed.text_bytes)


class Stage(NamedTuple):
    """How a run goes on from step ``first``."""

    rows: int
    learning_rate: float
    dtype: str
    platform: str
    first: int = 0


class Recipe(NamedTuple):
    """What decides a run's result, and what its card says of it.

    ``steps`` may change between runs, and a stage may follow: before the last ``decay`` steps the
    learning rate does not depend on them. ``None``: they are not known yet.
    """

    roots: tuple[str, ...]
    python_bytes: int | None
    other_bytes: int
    pieces: int
    shape: str
    optimizer: str
    seed: int
    stages: tuple[Stage, ...]
    steps: int | None = None
    decay: int | None = None

    @property
    def falls(self) -> float:
        """The step at which the learning rate begins to fall."""
        return math.inf if self.steps is None else self.steps - (self.decay or 0)

    def stage(self, step: int) -> Stage:
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def windows(self, step: int) -> int:
        """How many windows the steps before ``step`` have."""
        return sum(stage.rows * count for stage, count in self.taken(step))

    def taken(self, step: int) -> list[tuple[Stage, int]]:
        """The stages that began before ``step``, and how many of the steps before it each has."""
        ends = [*(stage.first for stage in self.stages[1:]), step]
        return [
            (stage, min(end, step) - stage.first)
            for stage, end in zip(self.stages, ends, strict=True)
            if stage.first < step
        ]

    def rate(self, step: int) -> float:
        peak = self.stage(step).learning_rate
        return pretraining.rate_at(step, peak, self.steps, self.decay or 0)

    def texts(self, split: str) -> source_text.Texts:
        """The documents by language; held-out ones are all read."""
        limits = source_text.Limits(self.python_bytes, self.other_bytes)
        own = limits if split == "train" else source_text.Limits()
        return source_text.read_texts([Path(root) for root in self.roots], split, own)

    def config(self) -> StarCoderConfig:
        """The model's; its one special token, id 0, ends a document.

        Raises:
            InputError: the shape is not LAYERSxWIDTH, or no such model can be.
        """
        layers, _, width = self.shape.partition("x")
        if not (layers.isdecimal() and width.isdecimal()):
            raise InputError(f"--shape is {self.shape!r}, expected LAYERSxWIDTH, such as 6x256")
        return dataclasses.replace(
            PRESETS["mini"], vocab_size=self.pieces, eos_token_ids=(0,), n_layer=int(layers),
            n_embd=int(width), n_inner=4 * int(width), n_head=max(1, int(width) // HEAD),
        )  # fmt: skip


def prepare(recipe: Recipe, output: Path) -> Tokenizer:
    """Tokenizer and token files in ``output``, made once; the training file comes last."""
    saved = output / "tokenizer.json"
    if (output / "train.npz").exists():
        return Tokenizer.from_file(str(saved))
    training = [text for group in recipe.texts("train").values() for text in group]
    np.random.default_rng(0).shuffle(training)
    ends = np.cumsum([len(text) for text in training])
    few = training[: int(np.searchsorted(ends, TOKENIZER_BYTES)) + 1]
    tokenizer = train_tokenizer(few, recipe.pieces)
    tokenizer.save(str(saved))
    for language, documents in recipe.texts("validation").items():
        stream(tokenizer, documents).save(output / f"validation.{language}.npz")
    stream(tokenizer, training).save(output / "train.npz")
    return tokenizer


def keep_recipe(recipe: Recipe, output: Path) -> Recipe:
    """Writes the recipe beside the run, with the stages that a run in ``output`` has had; gives that.

    Raises:
        InputError: ``output`` holds a run of another recipe, or one whose learning rate has begun to
            fall and that is to go on otherwise.
    """
    path = output / "recipe.json"
    output.mkdir(parents=True, exist_ok=True)
    if path.exists():
        found = read_recipe(path)
        for name in (
            "roots",
            "python_bytes",
            "other_bytes",
            "pieces",
            "shape",
            "optimizer",
            "seed",
        ):
            before, now = getattr(found, name), getattr(recipe, name)
            if before != now:
                raise InputError(f"{path}: {name} was {before!r}, now {now!r}")
        done = _steps_done(output)
        stages = found.stages
        if recipe.stages[0] != stages[-1]._replace(first=0):
            # A stage of no steps gives way.
            kept = tuple(stage for stage in stages if stage.first < done)
            stages = (*kept, recipe.stages[0]._replace(first=done))
        recipe = recipe._replace(stages=stages)
        if recipe != found and done > (falls := min(recipe.falls, found.falls)):
            raise InputError(
                f"{path}: the run is at step {done} of {found.steps} and its learning rate falls from "
                f"step {falls}, so it goes on only as it began, not to step {recipe.steps} with "
                f"{recipe.stages[-1]}"
            )
    write_recipe(recipe, path)
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    stages = [stage._asdict() for stage in recipe.stages]
    path.write_text(json.dumps(recipe._asdict() | {"stages": stages}, indent=1) + "\n")


def read_recipe(path: Path) -> Recipe:
    found = json.loads(path.read_text())
    found["roots"] = tuple(found["roots"])
    found["stages"] = tuple(Stage(**stage) for stage in found["stages"])
    return Recipe(**found)


def _steps_done(output: Path) -> int:
    folders = (output / CHECKPOINTS).glob("*")
    return max((int(one.name) for one in folders if one.name.isdecimal()), default=0)


def windows_of(packed: Stream, length: int, most: int) -> np.ndarray:
    """The first ``most`` windows, int32 ``[windows, length + 1]``."""
    count = min(most, packed.windows(length))
    found = [packed.window(number, length) for number in range(count)]
    return np.array(found, np.int32).reshape(count, length + 1)


def export(
    model: Model, output: Path, training: Stream, validation: dict[str, Any],
    recipe: Recipe, sources: str,
) -> None:  # fmt: skip
    """Leaves OUTPUT/model: float16 safetensors, the tokenizer and a card."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model.params)
    target = output / "model"
    if target.exists():
        shutil.rmtree(target)
    save_hf(model._replace(params=narrow), target, companions=output)
    table = "\n".join(
        f"| {language} | {found['bits_per_byte']:.3f} | {found['bytes']:,} |"
        for language, found in validation.items()
    )
    card = CARD.format(
        parameters=f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,}",
        pieces=f"{recipe.pieces:,}",
        seen=f"{recipe.windows(recipe.steps or 0) * model.config.n_positions:,}",
        sources=sources.strip(),
        recipe=described(recipe, training, model.config.n_positions),
        table=table,
    )
    (target / "README.md").write_text(card)


def described(recipe: Recipe, training: Stream, length: int) -> str:
    """The recipe as a card's paragraph."""
    stages = ", then ".join(
        f"{count:,} steps of {stage.rows} windows on a {stage.platform.upper()}, in "
        f"{stage.dtype}, with a peak learning rate of {stage.learning_rate:g}"
        for stage, count in recipe.taken(recipe.steps or 0)
    )
    python = f"{recipe.python_bytes:,} bytes" if recipe.python_bytes else "all"
    text = (
        f"- **Recipe**: {training.text_bytes:,} bytes of text (of Python {python}, of each other "
        f"language at most {recipe.other_bytes:,}), {len(training.tokens):,} tokens, in windows of "
        f"{length} (the whole context, so that every position is trained): {stages}. Optimizer "
        f"{recipe.optimizer}, {pretraining.WARMUP} warm-up steps, the rate falls linearly to a tenth "
        f"over the last {recipe.decay:,} steps, weight decay 0.1, gradients clipped at norm 1, seed "
        f"{recipe.seed}; saved as float16."
    )
    return textwrap.fill(text, 110, subsequent_indent="  ", break_on_hyphens=False)


CARD = """# A small StarCoder, trained from scratch

A GPTBigCode of {parameters} parameters with a byte-level BPE of {pieces} pieces, both trained by
`experiments/pretrain_mini.py`. It has seen {seen} tokens: it writes what looks like code, and is never
presented as more.

{sources}
{recipe}

Bits per byte on the first windows of held-out files:

| language | bits per byte | bytes measured |
|---|---|---|
{table}
"""


class Pretraining:
    """A run: the model, its text, and what a step is.

    ``recipe`` may get its steps while the run goes on.
    """

    def __init__(
        self, recipe: Recipe, output: Path, evaluation_windows: int, save_seconds: float = 300.0
    ):
        self.recipe, self.output, self.save_seconds = recipe, output, save_seconds
        self.config = recipe.config()
        self.length = self.config.n_positions
        self.dtype = jnp.dtype(recipe.stages[-1].dtype)
        self.lengths = piece_bytes(prepare(recipe, output))
        self.training = Stream.load(output / "train.npz")
        self.validation = {
            file.name.split(".")[1]: windows_of(Stream.load(file), self.length, evaluation_windows)
            for file in sorted(output.glob("validation.*.npz"))
        }
        fresh = init_model(self.config, recipe.seed)
        self.graph, self.params = fresh.graph, fresh.params
        self.attention = choose(
            StepOptions(), self.config, self.dtype, self.length, print
        ).attention
        self.window_loss = jax.jit(self.loss)
        self.optimizer = pretraining.OPTIMIZERS[recipe.optimizer]()
        self.step = pretraining.make_step(self.loss, self.optimizer)

    def loss(self, params: Any, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Nats of windows ``[B, T + 1]``, and their targets' number."""
        model = nnx.merge(self.graph, jax.tree.map(lambda leaf: leaf.astype(self.dtype), params))
        positions_BT = jnp.broadcast_to(jnp.arange(self.length), (windows.shape[0], self.length))
        hidden_BTD, _ = model.hidden(windows[:, :-1], positions_BT, attention=self.attention)
        return pretraining.next_token_loss(model.logits(hidden_BTD), windows[:, 1:])

    def evaluate(self, params: Any) -> dict[str, dict[str, float]]:
        """Bits per byte by language; a language of less than a window is left out."""
        result = {}
        for language, windows in self.validation.items():
            total = sum(float(self.window_loss(params, one[None])[0]) for one in windows)
            if count := int(self.lengths[windows[:, 1:]].sum()):
                bits = round(bits_per_byte(total, count), 4)
                result[language] = {"bits_per_byte": bits, "bytes": count}
        return result

    def batch(self, step: int) -> tuple[np.float32, np.ndarray]:
        """The learning rate of a step, and its windows, which follow those of the steps before."""
        stage = self.recipe.stage(step)
        before = -(-self.recipe.windows(stage.first) // stage.rows)
        number = before + step - stage.first
        windows = self.training.batch(number, stage.rows, self.length, self.recipe.seed)
        return np.float32(self.recipe.rate(step)), windows

    def train(self, steps: int) -> TrainState:
        """Goes on up to step ``steps`` and evaluates."""
        rows = self.recipe.stages[-1].rows
        work = Work(
            self.step, self.batch, tokens_per_batch=rows * self.length, evaluate=self.evaluate
        )
        # A step donates what it is given, and there may be another stretch.
        start = pretraining.init_state(jax.tree.map(jnp.copy, self.params), self.optimizer)
        options = LoopOptions(steps=steps, save_seconds=self.save_seconds)
        return run_loop(start, work, self.output, options)

    def plan(self, seconds: float) -> Recipe:
        """Trains as long as the rate is constant; the recipe with steps that end after ``seconds``.

        How long a step takes is measured over stretches of the run, each longer than the one
        before: what the first steps take says little of a device that gets warm.
        """
        end = time.monotonic() + seconds
        done, count = _steps_done(self.output) + FEW, FEW
        self.train(done)  # Compiles.
        for share in SHARES:
            began = time.monotonic()
            self.train(done + count)
            done += count
            now = time.monotonic()
            count = max(FEW, int(share * (end - now) * count / (now - began)))
        total = done + count
        return self.recipe._replace(steps=total, decay=min(count, default_decay(total)))

    def last_validation(self) -> dict[str, Any]:
        """Of the last step, as it was logged."""
        last = (self.output / METRICS).read_text().splitlines()[-1]
        return dict(json.loads(last)["validation"])


def default_decay(steps: int) -> int:
    """How many of a run's last steps have a falling learning rate: a fifth."""
    return max(1, steps // 5)


def main(
    roots: Annotated[list[Path], typer.Argument(metavar="CORPORA...")],
    output: Annotated[Path, typer.Option()],
    steps: int = 7_000,
    seconds: Annotated[
        float | None, typer.Option(help="Instead of --steps: of this start, without reading text.")
    ] = None,
    decay: Annotated[
        int | None, typer.Option(help="Last steps with a falling rate; default a fifth.")
    ] = None,
    shape: Annotated[str, typer.Option(metavar="LAYERSxWIDTH")] = "6x256",
    rows: Annotated[int, typer.Option(help="Windows of a step.")] = 8,
    optimizer: Annotated[str, typer.Option(help="muon or adamw")] = "muon",
    learning_rate: Annotated[float, typer.Option(help="The peak.")] = 3e-3,
    dtype: Annotated[str, typer.Option(help="Of the products: float32 or bfloat16.")] = "float32",
    pieces: Annotated[int, typer.Option(help="Of the tokenizer.")] = 8192,
    python_bytes: Annotated[int | None, typer.Option(help="Of Python; default all.")] = None,
    other_bytes: Annotated[int, typer.Option(help="Of every other language.")] = 8_000_000,
    seed: int = 0,
    save_seconds: float = 300.0,
    evaluation_windows: int = 32,
    sources: Annotated[
        Path | None, typer.Option(help="Markdown about CORPORA and its licences, for the card.")
    ] = None,
) -> None:
    """Pre-trains the mini model on CORPORA; leaves it and its token files in OUTPUT."""
    if optimizer not in pretraining.OPTIMIZERS:
        known = ", ".join(pretraining.OPTIMIZERS)
        raise InputError(f"--optimizer is {optimizer!r}, expected one of {known}")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype is {dtype!r}, expected float32 or bfloat16")
    about = f"- **Data**: {', '.join(map(str, roots))}." if sources is None else sources.read_text()
    if decay is not None and not 1 <= decay <= steps:
        raise InputError(f"--decay is {decay}, expected 1 to {steps}, of --steps")
    stage = Stage(rows, learning_rate, dtype, jax.default_backend())
    recipe = Recipe(
        tuple(map(str, roots)), python_bytes, other_bytes, pieces, shape, optimizer, seed, (stage,),
        steps, decay or default_decay(steps),
    )  # fmt: skip
    recipe.config()
    found = output / "recipe.json"
    if seconds is not None:
        # What an earlier start has found, if it came so far.
        planned = read_recipe(found) if found.exists() else recipe._replace(steps=None, decay=None)
        recipe = recipe._replace(steps=planned.steps, decay=planned.decay)
    recipe = keep_recipe(recipe, output)
    run = Pretraining(recipe, output, evaluation_windows, save_seconds)
    print(f"{len(run.training.tokens):,} tokens of {run.training.text_bytes:,} bytes")
    if recipe.steps is None:
        assert seconds is not None
        recipe = run.recipe = run.plan(seconds)
        write_recipe(recipe, found)
    assert recipe.steps is not None
    if seconds is not None:
        print(f"{recipe.steps:,} steps fit {seconds:g} seconds")
    state = run.train(recipe.steps)
    model = Model(run.config, run.graph, state.params)
    export(model, output, run.training, run.last_validation(), recipe, about)


if __name__ == "__main__":
    run_function(main)
