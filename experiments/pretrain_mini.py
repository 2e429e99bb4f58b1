"""Trains the small StarCoder that ships in the package, and its tokenizer, from scratch.

    python experiments/pretrain_mini.py CORPORA... --output runs/mini \\
        --sources experiments/mini_sources.md

CORPORA is what `experiments/source_text.py` reads: directories with LANGUAGE.train.jsonl.gz or
LANGUAGE.jsonl.xz and LANGUAGE.validation.jsonl.gz, a directory of source files, or one packed file for a
machine that has nothing else. All of Python is used and at most --other-bytes of every other language.
Killed or stopped, the same command goes on from its last checkpoint, with --seconds to the number of
steps that it had found; as long as the learning rate does not fall yet, also with other --steps.
OUTPUT/model is what ships as flora_jax/assets/mini. On a GPU:

    python experiments/pretrain_mini.py packed.jsonl.xz --output runs/mini --seconds 360 --shape 8x384 \\
        --rows 64 --dtype bfloat16 --sources experiments/mini_sources.md

Receipt: see that folder's README.md for the data, the recipe and the result.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
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
from flora_jax.train.options import CHECKPOINTS
from flora_jax.train.step import StepOptions, TrainState

try:
    from experiments import pretraining, source_text
except ModuleNotFoundError:  # Run as a script, from its own directory.
    import pretraining  # type: ignore[no-redef]
    import source_text  # type: ignore[no-redef]

# Features of a head.
HEAD = 64
# Steps of a trial, thrown away, that tells how many fit a time; the last ten are timed.
TRIAL = 40
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


class Recipe(NamedTuple):
    """What decides a run's result, and what its card says of it.

    ``steps`` may change between runs: before the decay the learning rate does not depend on it. 0: they
    are not known yet.
    """

    roots: tuple[str, ...]
    python_bytes: int | None
    other_bytes: int
    pieces: int
    shape: str
    rows: int
    optimizer: str
    learning_rate: float
    dtype: str
    seed: int
    steps: int

    @property
    def decay(self) -> int:
        """The step at which the learning rate begins to fall."""
        return self.steps - pretraining.decay_steps(self.steps)

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


def keep_recipe(recipe: Recipe, output: Path) -> None:
    """Writes the recipe beside the run.

    Raises:
        InputError: ``output`` holds a run of another recipe, or one whose learning rate has begun to
            fall towards another last step.
    """
    path = output / "recipe.json"
    output.mkdir(parents=True, exist_ok=True)
    if path.exists():
        found = json.loads(path.read_text())
        found["roots"] = tuple(found["roots"])
        for name, value in recipe._asdict().items():
            if name != "steps" and found.get(name) != value:
                raise InputError(f"{path}: {name} was {found.get(name)!r}, now {value!r}")
        before, done = Recipe(**found), _steps_done(output)
        if before.steps and recipe.steps != before.steps and done > min(recipe.decay, before.decay):
            raise InputError(
                f"{path}: steps were {before.steps}, now {recipe.steps}, but the run is at step {done} "
                f"and the learning rate falls from step {min(recipe.decay, before.decay)}"
            )
    path.write_text(json.dumps(recipe._asdict(), indent=1) + "\n")


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
    everything = f"{recipe.python_bytes:,} bytes" if recipe.python_bytes else "all"
    card = CARD.format(
        parameters=f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,}",
        text_bytes=f"{training.text_bytes:,}",
        tokens=f"{len(training.tokens):,}",
        seen=f"{recipe.steps * recipe.rows * model.config.n_positions:,}",
        length=model.config.n_positions,
        platform=jax.default_backend().upper(),
        sources=sources.strip(),
        table=table,
        **recipe._asdict() | {"python_bytes": everything, "other_bytes": f"{recipe.other_bytes:,}"},
    )
    (target / "README.md").write_text(card)


CARD = """# A small StarCoder, trained from scratch

A GPTBigCode of {parameters} parameters with a byte-level BPE of {pieces} pieces, both trained on a
{platform} by `experiments/pretrain_mini.py`. It has seen {seen} tokens: it writes something that looks
like code, and is never presented as more.

{sources}
- **Recipe**: {text_bytes} bytes of text (of Python {python_bytes}, of each other language at most
  {other_bytes}), {tokens} tokens; {steps} steps of {rows} windows of {length} tokens (the whole context,
  so that every position is trained), {optimizer} with a peak learning rate of {learning_rate} after 100
  warm-up steps, decayed linearly over the last fifth, weight decay 0.1, gradients clipped at norm 1, seed
  {seed}, computed in {dtype}; saved as float16.

Bits per byte on the first windows of held-out files:

| language | bits per byte | bytes measured |
|---|---|---|
{table}
"""


class Pretraining:
    """A run: the model, its text, and what a step is."""

    def __init__(self, recipe: Recipe, output: Path, evaluation_windows: int):
        self.recipe, self.output = recipe, output
        self.config = recipe.config()
        self.length = self.config.n_positions
        self.lengths = piece_bytes(prepare(recipe, output))
        self.training = Stream.load(output / "train.npz")
        self.validation = {
            file.name.split(".")[1]: windows_of(Stream.load(file), self.length, evaluation_windows)
            for file in sorted(output.glob("validation.*.npz"))
        }
        fresh = init_model(self.config, recipe.seed)
        self.graph, self.params = fresh.graph, fresh.params
        dtype = jnp.dtype(recipe.dtype)
        self.attention = choose(StepOptions(), self.config, dtype, self.length, print).attention
        self.window_loss = jax.jit(self.loss)

    def loss(self, params: Any, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Nats of windows ``[B, T + 1]``, and their targets' number."""
        dtype = jnp.dtype(self.recipe.dtype)
        model = nnx.merge(self.graph, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
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

    def run(self, steps: int, options: LoopOptions, output: Path | None = None) -> TrainState:
        """Trains up to ``options.steps`` of ``steps`` and evaluates; in ``output``, or the run's own."""
        recipe = self.recipe
        schedule = pretraining.warmup_stable_decay(recipe.learning_rate, steps)
        optimizer = pretraining.OPTIMIZERS[recipe.optimizer](schedule)
        work = Work(
            pretraining.make_step(self.loss, optimizer),
            functools.partial(
                self.training.batch, rows=recipe.rows, length=self.length, seed=recipe.seed
            ),
            tokens_per_batch=recipe.rows * self.length,
            evaluate=self.evaluate,
        )
        # A step donates what it is given, and there may be another run.
        start = pretraining.init_state(jax.tree.map(jnp.copy, self.params), optimizer)
        return run_loop(start, work, self.output if output is None else output, options)


def steps_within(run: Pretraining, seconds: float) -> int:
    """How many steps fit the time with what stands beside them, by a trial.

    The time that it took itself is part of ``seconds``.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run.run(10 * TRIAL, LoopOptions(steps=TRIAL), folder)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    each = run.recipe.rows * run.length / last["tokens_per_second"]
    took = time.monotonic() - began
    # The run compiles its step and evaluates as the trial did.
    return max(TRIAL, int((seconds - took - (took - TRIAL * each)) / each))


def main(
    roots: Annotated[list[Path], typer.Argument(metavar="CORPORA...")],
    output: Annotated[Path, typer.Option()],
    steps: int = 12_500,
    seconds: Annotated[
        float | None, typer.Option(help="Instead of --steps: of the run, without reading text.")
    ] = None,
    shape: Annotated[str, typer.Option(metavar="LAYERSxWIDTH")] = "6x256",
    rows: Annotated[int, typer.Option(help="Windows of a step.")] = 4,
    optimizer: Annotated[str, typer.Option(help="muon or adamw")] = "muon",
    learning_rate: Annotated[float, typer.Option(help="The peak.")] = 3e-3,
    dtype: Annotated[str, typer.Option(help="Of the products: float32 or bfloat16.")] = "float32",
    pieces: Annotated[int, typer.Option(help="Of the tokenizer.")] = 4096,
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
    recipe = Recipe(
        tuple(map(str, roots)), python_bytes, other_bytes, pieces, shape, rows, optimizer,
        learning_rate, dtype, seed, steps,
    )  # fmt: skip
    recipe.config()
    found = output / "recipe.json"
    if seconds is not None:
        # None yet, until a trial has told.
        planned = json.loads(found.read_text())["steps"] if found.exists() else 0
        recipe = recipe._replace(steps=planned)
    keep_recipe(recipe, output)
    run = Pretraining(recipe, output, evaluation_windows)
    print(f"{len(run.training.tokens):,} tokens of {run.training.text_bytes:,} bytes")
    if seconds is not None and not recipe.steps:
        recipe = run.recipe = recipe._replace(steps=steps_within(run, seconds))
        keep_recipe(recipe, output)
    if seconds is not None:
        print(f"{recipe.steps:,} steps fit {seconds:g} seconds")
    state = run.run(recipe.steps, LoopOptions(steps=recipe.steps, save_seconds=save_seconds))
    model = Model(run.config, run.graph, state.params)
    export(model, output, run.training, run.evaluate(state.params), recipe, about)


if __name__ == "__main__":
    run_function(main)
