"""Source text by language, from directories of corpora or from one packed file; and packing it.

    python experiments/source_text.py CORPORA [CORPORA ...] --output packed.jsonl.xz

A root is a directory with LANGUAGE.train.jsonl.gz, LANGUAGE.jsonl.xz (both for training) and
LANGUAGE.validation.jsonl.gz, a JSON object a line, text in "content"; or a directory of source files, a
twentieth of which is held out; or a file that this program has packed, for a machine that has nothing
else. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.files import whole_path
from flora_jax.jsonl import read_objects, text
from flora_jax.train.data.documents import read_documents

# What counts as source in a directory that is not a corpus.
SUFFIXES = (".py", ".d", ".lua", ".pl", ".pm", ".rkt", ".rb", ".rs", ".swift")
# Names of a language's files, by what they are for.
FILES = {
    "train": (".train.jsonl.gz", ".jsonl.xz"),
    "validation": (".validation.jsonl.gz",),
}
MAIN_LANGUAGE = "python"
Texts = dict[str, list[str]]


class Limits(NamedTuple):
    """Bytes of UTF-8 of each language at most, ``None`` for all; ``main`` is Python's.

    The files of the roots given first are read first.
    """

    main: int | None = None
    other: int | None = None

    def of(self, language: str) -> int | None:
        return self.main if language == MAIN_LANGUAGE else self.other


def read_texts(roots: Sequence[Path], split: str, limits: Limits) -> Texts:
    """Documents by language, ``split`` "train" or "validation".

    Raises:
        InputError: a root is missing, has no documents, or has a corrupt line.
    """
    found: Texts = {}
    for root in roots:
        for language, texts in _read_root(root, split, limits):
            own = found.setdefault(language, [])
            own += _up_to(texts, limits.of(language), sum(len(one.encode()) for one in own))
    return found


def _read_root(root: Path, split: str, limits: Limits) -> list[tuple[str, list[str]]]:
    if root.is_file():
        lines = [_packed_line(line, where) for where, line in read_objects(root)]
        languages = dict.fromkeys(language for language, _, _ in lines)
        return [
            (language, [own for name, part, own in lines if (name, part) == (language, split)])
            for language in languages
        ]
    files = [
        (language, file)
        for file in sorted(root.glob("*.jsonl.*"))
        for language, _, rest in [file.name.partition(".")]
        if "." + rest in FILES[split]
    ]
    if files or any(root.glob("*.jsonl.*")):
        return [(name, _documents(file, limit_bytes=limits.of(name))) for name, file in files]
    documents = _documents(root, suffixes=SUFFIXES)
    held = max(1, len(documents) // 20)
    return [("source", documents[:held] if split == "validation" else documents[held:])]


def _packed_line(line: dict[str, Any], where: str) -> tuple[str, str, str]:
    language, split, content = (
        text(line, name, where) for name in ("language", "split", "content")
    )
    return language, split, content


def _documents(source: Path, **options: Any) -> list[str]:
    """The documents of ``source``; a corrupt line stops the run."""
    return [found.text for found in read_documents(source, max_corrupt=0.0, **options)]


def _up_to(texts: list[str], limit: int | None, had: int) -> list[str]:
    """The texts up to the one that makes ``limit`` bytes, of which there were ``had``."""
    if limit is None:
        return texts
    taken = []
    for one in texts:
        if had >= limit:
            break
        taken.append(one)
        had += len(one.encode())
    return taken


def pack_texts(roots: Sequence[Path], output: Path, limits: Limits, held_out: Limits) -> int:
    """Writes the roots' texts as one ``.jsonl.xz``; gives its size in bytes."""
    with whole_path(output) as part, lzma.open(part, "wt", encoding="utf8", preset=9) as file:
        for split, bounds in (("validation", held_out), ("train", limits)):
            for language, texts in read_texts(roots, split, bounds).items():
                for one in texts:
                    line = {"language": language, "split": split, "content": one}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return output.stat().st_size


def main(
    roots: list[Path],
    output: Annotated[Path, typer.Option(help="A .jsonl.xz file.")],
    python_bytes: Annotated[int | None, typer.Option(help="Of Python; default all.")] = None,
    other_bytes: Annotated[int, typer.Option(help="Of every other language.")] = 8_000_000,
    held_out_bytes: Annotated[int, typer.Option(help="Of every language, held out.")] = 150_000,
    most_bytes: Annotated[int, typer.Option(help="The file may have.")] = 35_000_000,
) -> None:
    """Packs the texts of ROOTS into one file."""
    if not output.name.endswith(".jsonl.xz"):
        raise InputError(f"--output is {output}, expected a name that ends in .jsonl.xz")
    size = pack_texts(
        roots, output, Limits(python_bytes, other_bytes), Limits(held_out_bytes, held_out_bytes)
    )
    if size > most_bytes:
        output.unlink()
        raise InputError(
            f"{output} would have {size:,} bytes, expected at most {most_bytes:,}: lower "
            "--python-bytes or --other-bytes"
        )
    print(f"{output}: {size:,} bytes")


if __name__ == "__main__":
    run_function(main)
