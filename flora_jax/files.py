"""Output that appears under its name only when it is whole. Knows nothing of what is written."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from flora_jax.errors import InputError

Target = str | os.PathLike[str]


def require_new(target: Target) -> Path:
    """``target`` as an absolute path, links followed.

    Raises:
        InputError: it is a file, a directory with something in it, or where a file system is mounted.
    """
    path = Path(target).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{target}: exists already, and is not an empty directory")
    if path.is_mount():  # Nothing can be renamed to it.
        raise InputError(f"{target}: a file system is mounted there; give a directory inside it")
    return path


@contextlib.contextmanager
def whole_directory(target: Target) -> Iterator[Path]:
    """A directory to write into that gets the name ``target`` once all is written, or goes away.

    Raises:
        InputError: see :func:`require_new`.
    """
    path = require_new(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    part.mkdir()
    try:
        yield part
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Target) -> Iterator[TextIO]:
    """A UTF-8 text file to write into; see :func:`whole_path`."""
    with whole_path(target) as part, part.open("w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def whole_path(target: Target) -> Iterator[Path]:
    """Where to write a file that replaces ``target`` once all is written, or goes away.

    What a symbolic link points to is replaced, not the link.
    """
    path = Path(target).resolve()
    part = _part(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Whether this is output that a killed process left half written."""
    return path.name.endswith(".part")


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
