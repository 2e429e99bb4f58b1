"""What a model directory holds, as one number: two that complete in other ways have other digests."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flora_jax.checkpoints.describe import is_ours
from flora_jax.checkpoints.tensor_files import open_directory
from flora_jax.errors import InputError

_PART = 64 << 20  # Bytes hashed at a time by one thread.
_BLOCK = 1 << 20
# What is read beside the weights: sizes and end tokens, and how text or a chat becomes tokens.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def model_digest(directory: Path) -> str:
    """SHA-256 (hex) over all bytes of the files that a model and its tokenizer are read from.

    Every weight counts, as it is stored: the same numbers in other files (other shards, another format)
    have another digest. Nothing is remembered from an earlier call, because neither size nor date tells
    that a file is the same. A core hashes 1 to 2 GB/s where the disk gives as much, and up to 8
    cores work at once.

    Args:
        directory: with Hugging Face's files or one that we wrote.

    Raises:
        InputError: it has no weights, or a file cannot be read.
    """
    if is_ours(directory):
        weights = sorted(path for path in (directory / "params").rglob("*") if path.is_file())
    else:
        weights = open_directory(directory)[1]
    companions = [directory / name for name in _COMPANIONS if (directory / name).is_file()]
    parts: list[tuple[Path, int]] = []
    sizes: list[tuple[str, int]] = []
    try:
        for file in [*companions, *weights]:
            size = file.stat().st_size
            sizes.append((file.relative_to(directory).as_posix(), size))
            parts += [(file, start) for start in range(0, size, _PART)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashed = list(pool.map(_hash, parts))
    except OSError as error:
        raise InputError(
            f"{error.filename or directory}: cannot be read: {error.strerror}"
        ) from None
    return hashlib.sha256(json.dumps([sizes, hashed]).encode()).hexdigest()


def _hash(part: tuple[Path, int]) -> str:
    file, start = part
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        left = _PART
        while left and (block := stream.read(min(_BLOCK, left))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def model_label(source: str, directory: Path) -> str:
    """What a line of results calls a model: the name it was asked for by, and its digest's start."""
    return f"{Path(source).name} {model_digest(directory)[:12]}"
