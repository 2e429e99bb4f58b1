"""Lines of JSON objects: read from a file, checked field by field, and kept in a journal.

The one reader of such files: every message names file and line. Knows nothing of what lines mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from flora_jax.errors import InputError

# How a file is read, by the end of its name; others are plain.
_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Line:
    """One line of a file: ``value`` is its object, or ``problem`` says in a few words why there is none.

    ``number`` counts all lines from 1, blank ones too.
    """

    file: str
    number: int
    value: dict[str, Any]
    problem: str | None = None

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.file}, line {self.number}"


def parse_object(line: bytes | str) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        ValueError: the line is not UTF-8, not JSON, not an object, or an object in it has a key twice;
            the message has no file, since none is known here.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        raw = json.loads(text, object_pairs_hook=_once_each)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("malformed JSON: nested too deeply") from None
    if not isinstance(raw, dict):
        raise ValueError(f"found {kind_of(raw)}, expected an object")
    return raw


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return found


def parse_lines(lines: Iterable[bytes | str], file: str) -> Iterator[Line]:
    """Every line with its object or its problem, as they come; blank lines are passed over.

    Args:
        lines: of a file or of standard input; a byte order mark in front of the first is dropped.
        file: what messages call it.
    """
    for number, line in enumerate(lines, 1):
        if number == 1:
            mark: Any = b"\xef\xbb\xbf" if isinstance(line, bytes) else "\ufeff"
            line = line.removeprefix(mark)
        if not line.strip():
            continue
        try:
            yield Line(file, number, parse_object(line.strip()))
        except ValueError as error:
            yield Line(file, number, {}, str(error))


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, packed where its name ends in ``.gz`` or ``.xz``; see :func:`parse_lines`.

    Raises:
        InputError: no such file, it cannot be read, or the packed stream is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    number = 0
    try:
        with cast(BinaryIO, _OPENERS.get(path.suffix, Path.open)(path, "rb")) as file:
            for line in parse_lines(file, str(path)):
                number = line.number
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise InputError(f"{path}: damaged after line {number}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where (file and line, for messages) and what, line by line; blank lines are passed over.

    Raises:
        InputError: see :func:`read_lines`; or a line that is no JSON object.
    """
    for line in read_lines(path):
        if line.problem is not None:
            raise InputError(f"{line.where}: {line.problem}")
        yield line.where, line.value


def text(raw: Mapping[str, Any], field: str, where: str) -> str:
    """The field as a string; ``InputError`` if it is missing or something else."""
    value = _present(raw, field, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} is {kind_of(value)}, expected a string")
    return value


def texts(raw: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    """The field as a list of strings; ``InputError`` if it is missing or something else."""
    value = _present(raw, field, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: {field} is {kind_of(value)}, expected a list of strings")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise InputError(f"{where}: {field}[{index}] is {kind_of(item)}, expected a string")
    return tuple(value)


def _present(raw: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in raw:
        raise InputError(f"{where}: {field} is missing, found {', '.join(raw) or 'nothing'}")
    return raw[field]


def kind_of(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


class Journal:
    """A file that objects are appended to as they come, by one process at a time.

    A process that is killed leaves at most its last line half written; that line is dropped.
    """

    def __init__(self, path: Path) -> None:
        """Opens and locks it.

        Raises:
            InputError: another process has it open, or it cannot be written to.
        """
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path}: cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(f"{path}: another process is writing to it") from None
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All lines. A last line that a killed process left half written is cut off.

        Raises:
            InputError: a line before the last is no JSON object. Nothing is cut off then.
        """
        found, ends = self._lines()
        self._keep(ends[-1])
        return found

    def cut(self, count: int) -> None:
        """Keeps the first ``count`` lines.

        Raises:
            InputError: see :meth:`read`.
        """
        _, ends = self._lines()
        self._keep(ends[min(count, len(ends) - 1)])

    def _lines(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The whole lines, and the position in the file before and after each."""
        self._file.seek(0)
        found: list[dict[str, Any]] = []
        ends, problem = [0], ""
        for number, line in enumerate(self._file, 1):
            if problem:
                raise InputError(f"{self.path}, line {number - 1}: {problem}")
            try:
                found.append(parse_object(line))
                if line.endswith(b"\n"):
                    ends.append(ends[-1] + len(line))
                else:
                    found.pop()
            except ValueError as error:
                problem = str(error)
        return found, ends

    def _keep(self, end: int) -> None:
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() != end:
            self._file.truncate(end)

    def append(self, raw: Mapping[str, Any]) -> None:
        """Writes one line, whole in the file (though maybe not yet on the disk) on return.

        Raises:
            ValueError: a number that is not finite, which JSON does not have.
        """
        self._file.write(json.dumps(dict(raw), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.close()
