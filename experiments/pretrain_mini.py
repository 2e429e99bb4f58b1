"""Trains the small StarCoder that ships in the package, and its tokenizer, from scratch.

    python experiments/pretrain_mini.py CORPORA --output runs/mini

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
import shutil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flora_jax.starcoder.checkpoint import save_hf
from flora_jax.starcoder.config import PRESETS
from flora_jax.starcoder.model import Model, init_model
from flora_jax.train import data, loss, step
from flora_jax.train.loop import LoopOptions, run_loop

END = "<|endoftext|>"


def corpus(root: Path, split: str, other_bytes: int) -> dict[str, list[str]]:
    """Documents by language: all of Python, at most ``other_bytes`` of each other."""
    files = sorted(root.glob(f"*.{split}.jsonl.gz"))
    if files:
        return {
            file.name.split(".")[0]: list(
                data.take_bytes(
                    data.read_documents(file),
                    None if file.name.startswith("python.") else other_bytes,
                )
            )
            for file in files
        }
    documents = list(data.read_documents(root))
    held = max(1, len(documents) // 20)
    return {"source": documents[:held] if split == "validation" else documents[held:]}


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


def pack(tokenizer: Tokenizer, documents: list[str]) -> data.PackedTokens:
    """The documents' tokens end to end, each closed by the end token (id 0)."""
    streams = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(documents)]
    tokens = np.concatenate([np.asarray(ids, np.uint16) for ids in streams])
    return data.PackedTokens(tokens, sum(len(text.encode()) for text in documents))


def prepare(root: Path, output: Path, pieces: int, other_bytes: int) -> Tokenizer:
    """Tokenizer and token files in ``output``, made once."""
    output.mkdir(parents=True, exist_ok=True)
    saved = output / "tokenizer.json"
    training = corpus(root, "train", other_bytes)
    if not saved.exists():
        everything = [text for texts in training.values() for text in texts]
        train_tokenizer(everything, pieces).save(str(saved) + ".part")
        Path(str(saved) + ".part").rename(saved)
    tokenizer = Tokenizer.from_file(str(saved))
    if not (output / "train.npz").exists():
        mixed = [text for texts in training.values() for text in texts]
        np.random.default_rng(0).shuffle(mixed)
        data.save_packed(output / "train.npz", pack(tokenizer, mixed))
        for language, texts in corpus(root, "validation", other_bytes).items():
            data.save_packed(output / f"validation.{language}.npz", pack(tokenizer, texts))
    return tokenizer


class Recipe(NamedTuple):
    """What the card says of a run."""

    steps: int
    rows: int
    length: int
    learning_rate: float
    other_bytes: int
    seed: int


def export(
    model: Model, output: Path, training: data.PackedTokens, bits: dict[str, float], recipe: Recipe
) -> None:
    """Leaves OUTPUT/model: float16 safetensors, the tokenizer and a card."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model.params)
    target = output / "model"
    if target.exists():
        shutil.rmtree(target)
    # One end token, id 0, which is also the tokenizer's only special piece.
    save_hf(model._replace(params=narrow), target, companions=output)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    seen = recipe.steps * recipe.rows * recipe.length
    table = "\n".join(f"| {language} | {value:.3f} |" for language, value in bits.items())
    (target / "README.md").write_text(
        CARD.format(
            parameters=f"{count:,}",
            text_bytes=f"{training.text_bytes:,}",
            tokens=f"{len(training.tokens):,}",
            seen=f"{seen:,}",
            table=table,
            **recipe._asdict(),
        )
    )


CARD = """# The embedded small StarCoder

A GPTBigCode of {parameters} parameters with a byte-level BPE of 4,096 pieces, both trained from
scratch on a CPU by `experiments/pretrain_mini.py`, so that every command works on a machine without
hub access. It has seen {seen} tokens: it writes something that looks like code, and is never
presented as more.

- **Data**: whole source files from Debian, npm and CPython packages, exact duplicates removed, split
  by hash of the file; all of the Python (CPython's standard library and tests) and at most
  {other_bytes} bytes each of D, Lua, Perl, Racket, Ruby, Rust and Swift: {text_bytes} bytes,
  {tokens} tokens.
- **Licences of the sources**: Python PSF; Perl Artistic or GPL-1+; Ruby its own, BSD and MIT; Rust and
  Swift MIT or Apache-2.0; Racket MIT, in part LGPL; D Boost-1.0; Lua MIT or Apache-2.0, a few files
  LGPL. No evaluation problem is among them. The weights ship under the project's Apache-2.0.
- **Recipe**: {steps} steps of {rows} windows of {length} tokens (the whole context, so that every
  position is trained), AdamW (0.9, 0.95, decay 0.1), peak learning rate {learning_rate} after 100
  warm-up steps, decayed linearly over the last fifth, gradients clipped at norm 1, seed {seed},
  float32; saved as float16.

Bits per byte on held-out files (up to 32 windows a language):

| language | bits per byte |
|---|---|
{table}
"""


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
) -> None:
    """Pre-trains the mini model on CORPORA and leaves checkpoints, metrics and token files in OUTPUT."""
    config = dataclasses.replace(PRESETS["mini"], vocab_size=pieces, eos_token_ids=(0,))
    length = config.n_positions
    prepare(root, output, pieces, other_bytes)
    training = data.load_packed(output / "train.npz")
    validation = {
        file.name.split(".")[1]: data.load_packed(file)
        for file in sorted(output.glob("validation.*.npz"))
    }
    print(f"{len(training.tokens):,} tokens of {training.text_bytes:,} bytes")
    _, graph, params = init_model(config, seed)
    positions_BT = jnp.broadcast_to(jnp.arange(length), (rows, length))

    def loss_function(params: Any, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        hidden_BTD, _ = model.hidden(windows[:, :-1], positions_BT)
        return loss.next_token_loss(model.logits(hidden_BTD), windows[:, 1:])

    evaluate_windows = jax.jit(loss_function)

    def evaluate(params: Any, most: int = 8) -> dict[str, float]:
        """Bits per byte by language over the first ``most`` batches of windows."""
        result = {}
        for language, packed in validation.items():
            batches = min(most, packed.windows(length) // rows)
            if not batches:
                continue
            total = 0.0
            for start in range(0, batches * rows, rows):
                windows = [packed.window(start + row, length) for row in range(rows)]
                total += float(evaluate_windows(params, np.stack(windows).astype(np.int32))[0])
            share = batches * rows * length / len(packed.tokens)
            result[language] = round(loss.bits_per_byte(total, packed.text_bytes * share), 4)
        return result

    optimizer = step.adamw(step.warmup_stable_decay(learning_rate, steps))
    state = run_loop(
        step.init_state(params, optimizer),
        step.make_step(loss_function, optimizer),
        functools.partial(training.batch, rows=rows, length=length, seed=seed),
        output,
        LoopOptions(steps=steps, save_seconds=save_seconds),
        tokens_per_batch=rows * length,
        evaluate=evaluate,
    )
    recipe = Recipe(steps, rows, length, learning_rate, other_bytes, seed)
    export(Model(config, graph, state.params), output, training, evaluate(state.params), recipe)


if __name__ == "__main__":
    typer.run(main)
