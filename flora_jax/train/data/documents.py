"""Where training text comes from: JSON lines, Parquet, source files, a hub data set → documents.

Whatever cannot be used is reported with its place and reason. Knows nothing of tokens.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError, listing

COLUMNS = ("content", "text")
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# A source file beyond this is generated or data.
SOURCE_BYTES = 1_000_000
# Up to so many corrupt lines are borne until the end shows their share of all.
PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and where it came from: "FILE:LINE", "PARQUET:ROW" (from 1) or a relative path."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corrupt:
    """What could not be used and why, as "FILE, line 17: not JSON: …".

    A ``counted`` one is a line or row, which should have been text; a picture among source files is
    none.
    """

    place: str
    counted: bool = True


def read_documents(
    source: str | Path,
    *,
    column: str | None = None,
    max_corrupt: float = 0.01,
    corrupt: list[str] | None = None,
    suffixes: tuple[str, ...] = (),
    limit_bytes: int | None = None,
) -> Iterator[Document]:
    """The documents of ``source``, always in the same order.

    ``source`` is a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file; a directory that directly holds
    such files (all are read, by name) or else source files (all below it that are not hidden, by
    path; only those with one of ``suffixes`` where given); or, where no such path exists, a hub data
    set's "train" split as ``owner/name``, ``owner/name:configuration`` or ``owner/name:data/dir``
    (with a slash). The text is in ``column``, by default ``content`` or else ``text``.

    Lines and rows that are no UTF-8, no JSON object or have no such text are skipped, as are source
    files that are binary, no UTF-8 or over 1 MB: each is added to ``corrupt`` with its place and
    reason. Blank lines are nothing. ``limit_bytes`` ends the reading after the document that makes
    this many bytes of UTF-8.

    Raises:
        InputError: nothing is there or it is of another type, a file is damaged, a table has no such
            column, the hub does not give the data set, there is no document, or more than the share
            ``max_corrupt`` of the lines is corrupt (told before the end once it is over that share
            of the lines so far and over 10).
    """
    if limit_bytes is not None and limit_bytes <= 0:
        return
    documents = read = 0
    skipped: list[str] = []
    counted: list[str] = []
    for found in _read(source, column, suffixes):
        if isinstance(found, Document):
            documents += 1
            yield found
            if limit_bytes is not None:
                read += len(found.text.encode())
                if read >= limit_bytes:
                    break
            continue
        skipped.append(found.place)
        if corrupt is not None:
            corrupt.append(found.place)
        if found.counted:
            counted.append(found.place)
            if len(counted) > PATIENCE or max_corrupt <= 0:
                _judge(source, counted, documents, max_corrupt)
    _judge(source, counted, documents, max_corrupt)
    if not documents:
        raise InputError(listing(f"{source}: no documents", skipped, most=5))


def _judge(source: str | Path, counted: list[str], documents: int, share: float) -> None:
    lines = documents + len(counted)
    if len(counted) > share * lines:
        head = f"{source}: {len(counted)} of {lines} lines cannot be used, over {share:.3g} of them"
        raise InputError(listing(head, counted, most=5))


def content_digest(source: str | Path, suffixes: tuple[str, ...] = ()) -> str | None:
    """SHA-256 (hex) of the names and bytes of the files that ``source`` stands for.

    Of a hub data set: of its name and revision; ``None`` where the hub does not tell the revision.

    Raises:
        InputError: nothing is there or it is of another type.
    """
    digest = hashlib.sha256()
    if not Path(source).exists():
        name, _ = _hub_name(source)
        revision = _hub_revision(name)
        return revision and hashlib.sha256(f"{source} {revision}".encode()).hexdigest()
    files, tables = _files(Path(source), suffixes)
    for name, file in files:
        try:
            content = str(file.stat().st_size)
            if tables or int(content) <= SOURCE_BYTES:
                with file.open("rb") as raw:
                    content = hashlib.file_digest(raw, "sha256").hexdigest()
        except OSError as error:
            if tables:
                _refuse(error)
            content = str(error)  # The file will be skipped, for that reason.
        digest.update(json.dumps([name, content]).encode() + b"\n")
    return digest.hexdigest()


def _read(
    source: str | Path, column: str | None, suffixes: tuple[str, ...]
) -> Iterator[Document | Corrupt]:
    path = Path(source)
    if not path.exists():
        yield from _hub(str(source), column)
        return
    files, tables = _files(path, suffixes)
    for name, file in files:
        if not tables:
            yield _source_file(name, file)
        elif name.endswith(".parquet"):
            yield from _parquet(name, file, column)
        else:
            yield from _lines(name, file, column)


def _files(path: Path, suffixes: tuple[str, ...]) -> tuple[list[tuple[str, Path]], bool]:
    """The files with the names that documents get, in order, and whether they are tables."""
    if not path.is_dir():
        if not path.name.endswith(DATA_SUFFIXES):
            known = ", ".join(DATA_SUFFIXES)
            raise InputError(f"{path}: expected {known} or a directory of source files")
        return [(path.name, path)], True
    tables = sorted(p for p in path.iterdir() if p.name.endswith(DATA_SUFFIXES) and p.is_file())
    if tables:
        return [(file.name, file) for file in tables], True
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        found += [p for p in files if p.is_file() and (not suffixes or p.suffix in suffixes)]
    return [(file.relative_to(path).as_posix(), file) for file in sorted(found)], False


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}")


def _source_file(name: str, file: Path) -> Document | Corrupt:
    try:
        if (size := file.stat().st_size) > SOURCE_BYTES:
            return Corrupt(f"{name}: {size} bytes, at most {SOURCE_BYTES} are read", False)
        raw = file.read_bytes()
        if b"\0" in raw:
            return Corrupt(f"{name}: binary, has a zero byte", False)
        return Document(name, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Corrupt(f"{name}: not UTF-8 at byte {error.start}", False)
    except OSError as error:
        return Corrupt(f"{name}: {error.strerror}", False)


def _lines(name: str, file: Path, column: str | None) -> Iterator[Document | Corrupt]:
    number = 0
    with gzip.open(file) if name.endswith(".gz") else file.open("rb") as lines:
        try:
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                try:
                    yield Document(f"{name}:{number}", _text(_parse(line.strip()), column))
                except ValueError as error:
                    yield Corrupt(f"{name}, line {number}: {error}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{file}: damaged after line {number}: {error}") from None


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None


def _text(record: object, column: str | None) -> str:
    """The text of a row. Raises ``ValueError`` with the reason where it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"not an object but of type {type(record).__name__}")
    key = _column(record, column)
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is of type {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} has half a surrogate pair at {error.start}") from None
    return text


def _column(columns: Iterable[str], wanted: str | None) -> str:
    found = list(columns)
    for name in COLUMNS if wanted is None else (wanted,):
        if name in found:
            return name
    expected = " or ".join(map(repr, COLUMNS if wanted is None else (wanted,)))
    shown = ", ".join(map(repr, found[:20])) or "none"
    raise ValueError(f"no column {expected}; the columns are {shown}")


def _parquet(name: str, file: Path, column: str | None) -> Iterator[Document | Corrupt]:
    # A name may hold what a pattern would make something of.
    pattern = glob.escape(str(file.absolute()))
    return _rows(name, column, f"{file}: damaged", "parquet", {"data_files": pattern})


def _hub(source: str, column: str | None) -> Iterator[Document | Corrupt]:
    name, part = _hub_name(source)
    options: dict[str, str] = {}
    if part:
        options = {"data_dir": part.rstrip("/")} if "/" in part else {"name": part}
    broken = f"{source}: no such file or directory, and not reachable as a data set of the hub"
    return _rows(source, column, broken, name, options)


def _rows(
    name: str, column: str | None, broken: str, path: str, options: dict[str, str]
) -> Iterator[Document | Corrupt]:
    import datasets

    datasets.disable_progress_bars()
    number = 0
    try:
        rows: Any = datasets.load_dataset(path, split="train", streaming=True, **options)
        if rows.column_names is not None:
            rows = rows.select_columns([_present(name, rows.column_names, column)])
        for row in rows:
            number += 1
            yield _row(name, number, row, column)
    except InputError:
        raise
    except Exception as error:  # Files, the network, and several libraries of their own errors.
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{broken} (after row {number}): {cause}") from None


def _present(name: str, columns: list[str], wanted: str | None) -> str:
    try:
        return _column(columns, wanted)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def _row(name: str, number: int, row: object, column: str | None) -> Document | Corrupt:
    try:
        return Document(f"{name}:{number}", _text(row, column))
    except ValueError as error:
        return Corrupt(f"{name}, row {number}: {error}")


def _hub_name(source: str | Path) -> tuple[str, str]:
    """Name, and configuration or directory, of what may be a hub data set."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", str(source))
    if not found or str(source).endswith(DATA_SUFFIXES) or str(source).startswith("."):
        raise InputError(f"{source}: no such file or directory")
    return found[1], found[2] or ""


def _hub_revision(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # It is about a cache; reading the data set tells what is wrong.
        return None
