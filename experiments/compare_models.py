"""Bits per byte of models with other tokenizers, on the same excerpts of held-out files.

    python experiments/compare_models.py CORPORA mini=mini smollm2=DIR [NAME=MODEL ...]

An excerpt is whole lines of a file of CORPORA/LANGUAGE.validation.jsonl.gz, at most --excerpt-bytes of
UTF-8; of each language --most of them, evenly spread. Every model predicts all of an excerpt's tokens,
each from the end token and those before it: all read and predict the same bytes. Excerpts that do not fit
the context of one of the models are left out for all.

Results go to experiments/results/compare_models.json, and as a table to compare_models.md beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flora_jax.bench.receipts import machine
from flora_jax.checkpoints import Opened, open_checkpoint
from flora_jax.checkpoints.digest import model_label
from flora_jax.cli.common import named_values, prepare_jax
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.train.data.documents import read_documents
from flora_jax.train.data.packing import Batch
from flora_jax.train.data.tokens import piece_bytes
from flora_jax.train.loss import bits_per_byte

try:
    from experiments.finetune_tables import table
    from experiments.held_out import score_windows
except ModuleNotFoundError:  # Started as a script, whose directory is on the path.
    from finetune_tables import table  # type: ignore[no-redef]
    from held_out import score_windows  # type: ignore[no-redef]

RESULTS = Path(__file__).parent / "results" / "compare_models.json"
LANGUAGES = ("python", "d", "perl", "ruby", "rust", "racket", "swift", "lua")
ROWS = 8


def excerpts(texts: Sequence[str], most_bytes: int, most: int) -> list[str]:
    """Whole lines of each text, of at most ``most_bytes`` together; ``most`` of these, evenly spread.

    A line that is longer by itself ends an excerpt and is left out.
    """
    found = []
    for text in texts:
        own = ""
        for line in text.splitlines(keepends=True):
            long = len((own + line).encode()) > most_bytes
            if long and own.strip():
                found.append(own)
            own = line if long else own + line
            if len(own.encode()) > most_bytes:
                own = ""
        if own.strip():
            found.append(own)
    if len(found) <= most:
        return found
    return [found[number * len(found) // most] for number in range(most)]


def encoded(opened: Opened, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each, behind the end token.

    Raises:
        InputError: the model has no tokenizer or no end token.
    """
    tokenizer, end_id = opened.text_tokens("text")
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [[end_id, *one.ids] for one in found]


def batches(rows: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Rows of one length, the longest rounded up."""
    length = -(-max(map(len, rows)) // 64) * 64
    for first in range(0, len(rows), ROWS):
        own = rows[first : first + ROWS]
        tokens_BT = np.zeros((ROWS, length + 1), np.int32)
        real_BT = np.zeros((ROWS, length + 1), np.int32)
        for number, row in enumerate(own):
            tokens_BT[number, : len(row)], real_BT[number, : len(row)] = row, 1
        positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (ROWS, length))
        mask_BT = real_BT[:, 1:].astype(np.float32)
        yield Batch(tokens_BT, positions_BT, real_BT[:, :-1], mask_BT)


def main(
    corpora: Path,
    models: Annotated[list[str], typer.Argument(metavar="NAME=MODEL...")],
    languages: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(LANGUAGES),
    most: Annotated[int, typer.Option(min=1, help="Excerpts of a language.")] = 64,
    excerpt_bytes: Annotated[int, typer.Option(min=16)] = 1000,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    results: Annotated[Path, typer.Option()] = RESULTS,
) -> None:
    """Scores every model on every language."""
    prepare_jax()
    named = {
        name: open_checkpoint(source)
        for name, source in named_values(models, "models", "NAME=MODEL").items()
    }
    texts: dict[str, list[str]] = {}
    tokens: dict[tuple[str, str], list[list[int]]] = {}
    left_out = {}
    for language in languages.split(","):
        path = corpora / f"{language}.validation.jsonl.gz"
        read = [found.text for found in read_documents(path, max_corrupt=0.0)]
        own = excerpts(read, excerpt_bytes, most)
        rows = {name: encoded(opened, own) for name, opened in named.items()}
        fits = [
            all(len(rows[name][n]) <= opened.config.n_positions for name, opened in named.items())
            for n in range(len(own))
        ]
        texts[language] = [text for text, fit in zip(own, fits, strict=True) if fit]
        left_out[language] = len(own) - len(texts[language])
        if not texts[language]:
            raise InputError(f"{path}: none of {len(own)} excerpts fits the models' contexts")
        for name, all_rows in rows.items():
            tokens[name, language] = [row for row, fit in zip(all_rows, fits, strict=True) if fit]
    sizes = {
        language: {
            "excerpts": len(own), "bytes": sum(len(text.encode()) for text in own),
            "left_out": left_out[language],
        }
        for language, own in texts.items()
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for name, opened in named.items():
        model = opened.load(dtype)
        lengths = piece_bytes(opened.tokenizer, opened.config.vocab_size)
        found[name] = {
            "model": model_label(opened.source, opened.directory), "vocabulary": opened.config.vocab_size,
            "bits_per_byte": {},
        }  # fmt: skip
        for language in texts:
            windows = score_windows(model, None, batches(tokens[name, language]), lengths)
            bits = bits_per_byte(float(windows.nll.sum()), sizes[language]["bytes"])
            found[name]["bits_per_byte"][language] = round(bits, 4)
            print(f"{name} {language} {bits:.4f}", flush=True)
    report = machine.receipt() | {"excerpts": sizes, "models": found}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n")
    body = [
        [language, *(f"{one['bits_per_byte'][language]:.3f}" for one in found.values()),
         f"{sizes[language]['bytes']:,}"]
        for language in texts
    ]  # fmt: skip
    shown = table(("language", *found, "bytes"), body)
    title = "# Bits per byte of the same held-out text\n\n`experiments/compare_models.py` says how."
    results.with_suffix(".md").write_text(f"{title}\n\n{shown}\n")
    print(shown)


if __name__ == "__main__":
    run_function(main)
