"""Trains the small StarCoder that ships in the package, and its tokenizer, from scratch.

    python experiments/pretrain_mini.py CORPORA --output runs/mini --sources experiments/mini_sources.md

CORPORA is a directory with LANGUAGE.train.jsonl.gz and LANGUAGE.validation.jsonl.gz (a JSON object a
line, source text in "content"), or any directory of source files. All of Python is used and at most
--other-bytes of every other language. Killed or stopped, the same command goes on from its last
checkpoint. OUTPUT/model is what ships as flora_jax/assets/mini.

Receipt: see that folder's README.md for the data, the recipe and the result; 2 cores of an AMD EPYC
(Zen 1, 70 GFLOP/s in float32), about 950 tokens/s undisturbed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flora_jax.checkpoints.checkpoint import load_model, save_hf
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.files import whole_path
from flora_jax.models.model import Model, init_model
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.train.data.documents import Document, read_documents
from flora_jax.train.data.packing import windows_at
from flora_jax.train.data.tokens import pack, piece_bytes
from flora_jax.train.loop import LoopOptions, Work, run_loop
from flora_jax.train.loss import bits_per_byte

try:
    from experiments import pretraining
except ModuleNotFoundError:  # Run as a script, from its own directory.
    import pretraining  # type: ignore[no-redef]

END = "<|endoftext|>"
# What counts as source in a directory that is not a corpus.
SUFFIXES = (".py", ".d", ".lua", ".pl", ".pm", ".rkt", ".rb", ".rs", ".swift")


def corpus(root: Path, split: str, other_bytes: int) -> dict[str, list[str]]:
    """Documents by language: all of Python, at most ``other_bytes`` of each other."""
    files = sorted(root.glob(f"*.{split}.jsonl.gz"))
    if files:
        return {
            file.name.split(".")[0]: texts(
                file, limit_bytes=None if file.name.startswith("python.") else other_bytes
            )
            for file in files
        }
    documents = texts(root, suffixes=SUFFIXES)
    held = max(1, len(documents) // 20)
    return {"source": documents[:held] if split == "validation" else documents[held:]}


def texts(source: Path, **options: Any) -> list[str]:
    """The documents of ``source``; a corrupt line stops the run."""
    return [found.text for found in read_documents(source, max_corrupt=0.0, **options)]


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


def prepare(
    root: Path, output: Path, pieces: int, other_bytes: int, start_from: Path | None = None
) -> Tokenizer:
    """Tokenizer and token files in ``output``, made once; the training file comes last."""
    output.mkdir(parents=True, exist_ok=True)
    saved = output / "tokenizer.json"
    if (output / "train.npz").exists():
        return Tokenizer.from_file(str(saved))
    training = [text for group in corpus(root, "train", other_bytes).values() for text in group]
    np.random.default_rng(0).shuffle(training)
    if start_from is None:
        tokenizer = train_tokenizer(training, pieces)
    else:
        tokenizer = Tokenizer.from_file(str(start_from / "tokenizer.json"))
    tokenizer.save(str(saved))
    for language, documents in corpus(root, "validation", other_bytes).items():
        stream(tokenizer, documents).save(output / f"validation.{language}.npz")
    stream(tokenizer, training).save(output / "train.npz")
    return tokenizer


class Recipe(NamedTuple):
    """What decides a run's result, and what its card says of it.

    ``steps`` may change between runs: before the decay the learning rate does not depend on it.
    """

    root: str
    pieces: int
    other_bytes: int
    rows: int
    learning_rate: float
    seed: int
    steps: int
    start_from: str | None = None
    seen_before: int = 0


def keep_recipe(recipe: Recipe, output: Path) -> None:
    """Raises ``InputError`` where ``output`` holds a run of another recipe."""
    path = output / "recipe.json"
    output.mkdir(parents=True, exist_ok=True)
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in recipe._asdict().items():
            if name != "steps" and found.get(name) != value:
                raise InputError(f"{path}: {name} was {found.get(name)!r}, now {value!r}")
    path.write_text(json.dumps(recipe._asdict(), indent=1) + "\n")


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
        text_bytes=f"{training.text_bytes:,}",
        tokens=f"{len(training.tokens):,}",
        seen=f"{recipe.seen_before + recipe.steps * recipe.rows * model.config.n_positions:,}",
        start=START.format(**recipe._asdict()) if recipe.start_from else "",
        length=model.config.n_positions,
        sources=sources.strip(),
        table=table,
        **recipe._asdict(),
    )
    (target / "README.md").write_text(card)


CARD = """# A small StarCoder, trained from scratch

A GPTBigCode of {parameters} parameters with a byte-level BPE of {pieces} pieces, both trained on a CPU
by `experiments/pretrain_mini.py`. It has seen {seen} tokens: it writes something that looks like code,
and is never presented as more.

{sources}
- **Recipe**: {text_bytes} bytes of text (at most {other_bytes} of each language but Python), {tokens}
  tokens; {steps} steps of {rows} windows of {length} tokens (the whole context, so that every position
  is trained), AdamW (0.9, 0.95, decay 0.1), peak learning rate {learning_rate} after 100 warm-up steps,
  decayed linearly over the last fifth, gradients clipped at norm 1, seed {seed}, float32; saved as
  float16.{start}

Bits per byte on the first windows of held-out files:

| language | bits per byte | bytes measured |
|---|---|---|
{table}
"""
START = """
- **Start**: the weights and the tokenizer of an earlier run of the same recipe, which had seen
  {seen_before:,} tokens."""


def main(
    root: Path,
    output: Annotated[Path, typer.Option()],
    steps: int = 2000,
    rows: int = 4,
    learning_rate: float = 1.5e-3,
    pieces: int = 4096,
    other_bytes: int = 700_000,
    seed: int = 0,
    save_seconds: float = 300.0,
    evaluation_windows: int = 32,
    sources: Annotated[
        Path | None, typer.Option(help="Markdown about CORPORA and its licences, for the card.")
    ] = None,
    start_from: Annotated[Path | None, typer.Option(help="An earlier run's OUTPUT/model.")] = None,
    seen_before: Annotated[int, typer.Option(help="Tokens that START_FROM saw, for the card.")] = 0,
) -> None:
    """Pre-trains the mini model on CORPORA; leaves it and its token files in OUTPUT."""
    recipe = Recipe(str(root), pieces, other_bytes, rows, learning_rate, seed, steps)
    if start_from is not None:
        recipe = recipe._replace(start_from=str(start_from), seen_before=seen_before)
    about = f"- **Data**: {root}." if sources is None else sources.read_text()
    keep_recipe(recipe, output)
    # One end token, id 0, which is also the tokenizer's only special piece.
    config = dataclasses.replace(PRESETS["mini"], vocab_size=pieces, eos_token_ids=(0,))
    length = config.n_positions
    lengths = piece_bytes(prepare(root, output, pieces, other_bytes, start_from))
    training = Stream.load(output / "train.npz")
    validation = {
        file.name.split(".")[1]: windows_of(Stream.load(file), length, evaluation_windows)
        for file in sorted(output.glob("validation.*.npz"))
    }
    print(f"{len(training.tokens):,} tokens of {training.text_bytes:,} bytes")
    fresh = init_model(config, seed) if start_from is None else load_model(start_from, "float32")
    graph, params = fresh.graph, fresh.params

    def loss_function(params: Any, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        positions_BT = jnp.broadcast_to(jnp.arange(length), (windows.shape[0], length))
        hidden_BTD, _ = model.hidden(windows[:, :-1], positions_BT)
        return pretraining.next_token_loss(model.logits(hidden_BTD), windows[:, 1:])

    window_loss = jax.jit(loss_function)

    def evaluate(params: Any) -> dict[str, dict[str, float]]:
        """Bits per byte by language; a language of less than a window is left out."""
        result = {}
        for language, windows in validation.items():
            total = sum(float(window_loss(params, window[None])[0]) for window in windows)
            if count := int(lengths[windows[:, 1:]].sum()):
                bits = round(bits_per_byte(total, count), 4)
                result[language] = {"bits_per_byte": bits, "bytes": count}
        return result

    optimizer = pretraining.adamw(pretraining.warmup_stable_decay(learning_rate, steps))
    work = Work(
        pretraining.make_step(loss_function, optimizer),
        functools.partial(training.batch, rows=rows, length=length, seed=seed),
        tokens_per_batch=rows * length,
        evaluate=evaluate,
    )
    loop = LoopOptions(steps=steps, save_seconds=save_seconds)
    state = run_loop(pretraining.init_state(params, optimizer), work, output, loop)
    model = Model(fresh.config, graph, state.params)
    export(model, output, training, evaluate(state.params), recipe, about)


if __name__ == "__main__":
    run_function(main)
