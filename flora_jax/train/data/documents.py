"""Where training text comes from: JSON lines, Parquet, source files, a hub data set → documents.

Whatever cannot be used is reported with its place and reason. Knows nothing of tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError, listing
from flora_jax.files import is_part
from flora_jax.jsonl import read_lines

COLUMNS = ("content", "text")
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
# How the names of files begin that tell of the data beside them.
ABOUT = ("readme", "license", "licence", "notice", "citation", "dataset_info")
# Files of a kind that a message names.
_NAMED = 3
# A source file beyond this is generated or data.
SOURCE_BYTES = 1_000_000
# With more corrupt lines than this, their share is judged before the end of the source.
PATIENCE = 10
# https://bford.info/cachedir/: a directory with such a file holds what a program can make again.
CACHE_TAG, CACHE_SIGNATURE = "CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55"
# Libraries that log what they raise as well; a user is told once, in one line.
CHATTY = ("datasets", "huggingface_hub")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and where it came from: "FILE:LINE", "PARQUET:ROW" (from 1) or a relative path."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corrupt:
    """A part of a source that could not be used: where it is ("FILE, line 17") and why.

    A ``counted`` one is a line or row of a table, which should have held text. A picture among source
    files is not counted.
    """

    where: str
    reason: str
    counted: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def place_and_reason(corrupt: str) -> tuple[str, str]:
    """The parts of a :class:`Corrupt` as text."""
    place, _, reason = corrupt.partition(": ")
    return place, reason


def read_documents(
    source: str | Path,
    *,
    column: str | None = None,
    max_corrupt: float = 0.01,
    corrupt: list[str] | None = None,
    suffixes: tuple[str, ...] = (),
    limit_bytes: int | None = None,
    leave_out: Collection[Path] = (),
) -> Iterator[Document]:
    """The documents of ``source``, always in the same order.

    ``source`` is a table, that is a ``.jsonl``, ``.jsonl.gz``, ``.jsonl.xz`` or ``.parquet`` file; a
    directory that holds tables itself (all are read, by name; beside them may be what tells of them,
    such as a README) or else source files (all below it by path; only those with one of ``suffixes``
    where given); or, where no such path exists, a hub data set's "train" split as ``owner/name``,
    ``owner/name:configuration`` or ``owner/name:data/dir`` (with a slash). The text is in ``column``,
    by default ``content`` or else ``text``.

    A directory's walk leaves out what is hidden, caches (``__pycache__``, directories with a
    ``CACHEDIR.TAG``), output that is half written, and the paths of ``leave_out`` with all below them.

    Lines and rows that are no UTF-8, no JSON object or have no such text are skipped, as are source
    files that are binary, no UTF-8 or over 1 MB, and tables below a directory's top: each is added to
    ``corrupt`` with its place and reason. Blank lines are nothing. ``limit_bytes`` ends the reading
    after the document that makes this many bytes of UTF-8.

    Raises:
        InputError: nothing is there or it is of another type, a directory holds both tables and source
            files or more tables below its top level than source files, a file is damaged, a table has no
            such column, the hub does not give the data set, there is no document, or more than the share
            ``max_corrupt`` of the lines is corrupt (told before the end once it is over that share of
            the lines so far and over 10).
    """
    if limit_bytes is not None and limit_bytes <= 0:
        return
    documents = read = 0
    skipped: list[Corrupt] = []
    counted: list[Corrupt] = []
    for found in _read(source, column, _Walk(suffixes, _resolved(leave_out))):
        if isinstance(found, Document):
            documents += 1
            yield found
            if limit_bytes is not None:
                read += len(found.text.encode())
                if read >= limit_bytes:
                    break
            continue
        skipped.append(found)
        if corrupt is not None:
            corrupt.append(str(found))
        if found.counted:
            counted.append(found)
            if len(counted) > PATIENCE or max_corrupt <= 0:
                _judge(source, counted, documents, max_corrupt)
    _judge(source, counted, documents, max_corrupt)
    if not documents:
        head = f"{source}: no documents"
        raise InputError(_of_each_reason(head, skipped) if skipped else head)


def _judge(source: str | Path, counted: list[Corrupt], documents: int, share: float) -> None:
    lines = documents + len(counted)
    if len(counted) > share * lines:
        head = f"{source}: {len(counted)} of {lines} lines cannot be used, over {share:.3g} of them"
        raise InputError(_of_each_reason(head, counted))


def _of_each_reason(head: str, problems: list[Corrupt]) -> str:
    """One message: where each reason is found first, and how often it is found elsewhere."""
    by_reason: dict[str, list[Corrupt]] = {}
    for problem in problems:
        by_reason.setdefault(problem.reason, []).append(problem)
    shown = [
        f"{first}" + (f" (and {len(others)} more)" if others else "")
        for first, *others in by_reason.values()
    ]
    return listing(head, shown, most=5)


def content_digest(
    source: str | Path, suffixes: tuple[str, ...] = (), leave_out: Collection[Path] = ()
) -> str | None:
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
    files, tables = _files(Path(source), _Walk(suffixes, _resolved(leave_out)))
    for name, file in files:
        try:
            content = str(file.stat().st_size)
            if _lies_below(name):
                content = "a table, not read"
            elif tables or int(content) <= SOURCE_BYTES:
                with file.open("rb") as raw:
                    content = hashlib.file_digest(raw, "sha256").hexdigest()
        except OSError as error:
            if tables:
                _refuse(error)
            content = str(error)  # The file will be skipped, for that reason.
        digest.update(json.dumps([name, content]).encode() + b"\n")
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Which files below a directory are read."""

    suffixes: tuple[str, ...]
    leave_out: frozenset[Path]

    def enters(self, path: Path) -> bool:
        return self._passes(path) and path.name != "__pycache__" and not _is_cache(path)

    def takes(self, path: Path) -> bool:
        named = not self.suffixes or path.suffix in self.suffixes or _is_table(path)
        return named and self._passes(path) and path.is_file()

    def _passes(self, path: Path) -> bool:
        if path.name.startswith(".") or is_part(path):
            return False
        return not self.leave_out or path.resolve() not in self.leave_out


def _resolved(paths: Collection[Path]) -> frozenset[Path]:
    return frozenset(path.resolve() for path in paths)


def _is_cache(folder: Path) -> bool:
    try:
        with (folder / CACHE_TAG).open("rb") as file:
            return file.read(len(CACHE_SIGNATURE)) == CACHE_SIGNATURE
    except OSError:
        return False


def _read(source: str | Path, column: str | None, walk: _Walk) -> Iterator[Document | Corrupt]:
    path = Path(source)
    if not path.exists():
        yield from _hub(str(source), column)
        return
    files, tables = _files(path, walk)
    for name, file in files:
        if _lies_below(name):
            yield Corrupt(name, "a table below the top level; give it as data of its own", False)
        elif not tables:
            yield _source_file(name, file)
        elif name.endswith(".parquet"):
            yield from _parquet(name, file, column)
        else:
            yield from _lines(name, file, column)


def _files(path: Path, walk: _Walk) -> tuple[list[tuple[str, Path]], bool]:
    """The files with the names that documents get, in order, and whether they are tables."""
    if not path.is_dir():
        if not path.name.endswith(DATA_SUFFIXES):
            known = ", ".join(DATA_SUFFIXES)
            raise InputError(f"{path}: expected {known} or a directory of source files")
        return [(path.name, path)], True
    tables = [file for file in path.iterdir() if _is_table(file) and walk.takes(file)]
    found = []
    # What lies below tables is not read, so that it need not be readable.
    for folder, folders, names in os.walk(path, onerror=None if tables else _refuse):
        folders[:] = [name for name in folders if walk.enters(Path(folder, name))]
        found += [file for name in names if walk.takes(file := Path(folder, name))]
    named = [(file.relative_to(path).as_posix(), file) for file in sorted(found)]
    _require_plain(path, named)
    if tables:
        named = [(name, file) for name, file in named if _is_table(file)]
    return named, bool(tables)


def _require_plain(path: Path, named: list[tuple[str, Path]]) -> None:
    """Raises ``InputError`` where it is not plain which of a directory's files are the data."""
    tables = [name for name, file in named if _is_table(file)]
    above = [name for name in tables if not _lies_below(name)]
    sources = [name for name, file in named if not (_is_table(file) or _tells_of_data(file))]
    if above and sources:
        raise InputError(
            f"{path}: holds both tables ({above[0]}) and source files ({sources[0]}); give one table, or "
            "a directory of nothing but tables or source files"
        )
    if tables and not (above or sources):
        first = path / tables[0]
        raise InputError(
            f"{path}: its tables are below its top level ({tables[0]}); give {first.parent} or {first}"
        )
    if not above and len(tables) > len(sources):
        # What lies beside so many tables tells of them, whatever it is called.
        first = path / tables[0]
        more = f" and {len(tables) - _NAMED} more" if len(tables) > _NAMED else ""
        raise InputError(
            f"{path}: {len(tables)} tables are below its top level ({', '.join(tables[:_NAMED])}{more}), "
            f"more than it has source files ({len(sources)}, the first is {sources[0]}); give a "
            f"directory that has its tables itself, such as {first.parent}, or one table, such as {first}"
        )


def _is_table(path: Path) -> bool:
    return path.name.endswith(DATA_SUFFIXES)


def _lies_below(name: str) -> bool:
    """Whether a file of a directory, by its name in it, is a table that is not read with it."""
    return "/" in name and name.endswith(DATA_SUFFIXES)


def _tells_of_data(path: Path) -> bool:
    return path.name.lower().startswith(ABOUT)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}")


def _source_file(name: str, file: Path) -> Document | Corrupt:
    try:
        if (size := file.stat().st_size) > SOURCE_BYTES:
            return Corrupt(name, f"{size} bytes, at most {SOURCE_BYTES} are read", False)
        raw = file.read_bytes()
        if b"\0" in raw:
            return Corrupt(name, "binary, has a zero byte", False)
        return Document(name, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Corrupt(name, f"not UTF-8 at byte {error.start}", False)
    except OSError as error:
        return Corrupt(name, str(error.strerror), False)


def _lines(name: str, file: Path, column: str | None) -> Iterator[Document | Corrupt]:
    for line in read_lines(file):
        try:
            if line.problem is not None:
                raise ValueError(line.problem)
            yield Document(f"{name}:{line.number}", _text(line.value, column))
        except ValueError as error:
            yield Corrupt(f"{name}, line {line.number}", str(error))


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
    raise ValueError(
        f"no column {expected}; the columns are {shown}; --text-column NAME reads another"
    )


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
    _reach_hub(name, broken)
    return _rows(source, column, broken, name, options)


def _reach_hub(name: str, broken: str) -> None:
    """Raises ``InputError`` where the network does not answer: the library would retry for 30 s."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:  # What its caches have may still be read.
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError:
        pass  # It answers; reading the data set tells what is wrong.
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"{broken}: {cause}; HF_HUB_OFFLINE=1 reads what is in its cache"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps libraries from logging the errors that they raise."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _rows(
    name: str, column: str | None, broken: str, path: str, options: dict[str, str]
) -> Iterator[Document | Corrupt]:
    import datasets

    datasets.disable_progress_bars()
    number = 0
    try:
        with _quiet():
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
        return Corrupt(f"{name}, row {number}", str(error))


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
