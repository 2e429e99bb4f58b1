"""Documents on disk → one packed stream of tokens → batches that are a function of the step.

Because batch ``n`` depends on the seed and ``n`` alone, a run that resumes at step ``n`` neither
repeats nor skips a window. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flora_jax.errors import InputError


def read_documents(path: Path, suffixes: tuple[str, ...] = ()) -> Iterator[str]:
    """The texts of a ``.jsonl``/``.jsonl.gz`` file (column ``content``, else ``text``), or of all
    files below a directory in the order of their paths (only those with one of ``suffixes``).

    Raises:
        FileNotFoundError: nothing is there.
        InputError: a line is not a JSON object with a text column, or a file is damaged or of another
            type.
    """
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            if not suffixes or file.suffix in suffixes:
                yield file.read_text(encoding="utf-8", errors="replace")
        return
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path}: expected .jsonl, .jsonl.gz or a directory of source files")
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    with opener(path, "rb") as lines:
        try:
            for line in lines:
                number += 1
                yield _text(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged after line {number}: {error}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a string 'content' or 'text'"
            ) from None


def _text(line: bytes) -> str:
    record = json.loads(line)
    text = record["content"] if "content" in record else record["text"]
    if not isinstance(text, str):
        raise TypeError
    return text


def take_bytes(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """Whole documents from the start until they make ``limit`` bytes of UTF-8 (``None``: all)."""
    total = 0
    for text in documents:
        if limit is not None and total >= limit:
            return
        total += len(text.encode())
        yield text


@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Documents end to end, each closed by the end token.

    ``tokens [n]`` is unsigned; ``text_bytes`` counts the UTF-8 bytes of the documents, which is what
    bits per byte divides by.
    """

    tokens: np.ndarray
    text_bytes: int

    def windows(self, length: int) -> int:
        """How many windows of ``length + 1`` tokens there are, each overlapping the next by one."""
        return (len(self.tokens) - 1) // length

    def window(self, index: int, length: int) -> np.ndarray:
        return self.tokens[index * length : index * length + length + 1]

    def batch(self, step: int, rows: int, length: int, seed: int) -> np.ndarray:
        """Batch number ``step`` as int32 ``[rows, length + 1]``.

        Epoch ``e`` visits every window once in the order drawn from ``(seed, e)``.

        Raises:
            InputError: the stream holds no window of this length.
        """
        count = self.windows(length)
        if count < 1:
            raise InputError(
                f"{len(self.tokens)} tokens hold no window of {length + 1}; give more documents"
            )
        numbers = np.arange(step * rows, (step + 1) * rows)
        orders = {
            int(epoch): np.random.default_rng([seed, int(epoch)]).permutation(count)
            for epoch in np.unique(numbers // count)
        }
        picked = [self.window(orders[int(n // count)][n % count], length) for n in numbers]
        return np.stack(picked).astype(np.int32)


def save_packed(path: Path, packed: PackedTokens) -> None:
    """Writes the stream as ``.npz``, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:  # Of a path, savez would change the name.
        np.savez(file, tokens=packed.tokens, text_bytes=packed.text_bytes)
    temporary.rename(path)


def load_packed(path: Path) -> PackedTokens:
    with np.load(path) as arrays:
        return PackedTokens(arrays["tokens"], int(arrays["text_bytes"]))
