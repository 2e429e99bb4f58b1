"""Lines of JSON in a file, and what each must hold. Knows nothing of what they mean."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where (file and line, for messages) and what, line by line; blank lines are passed over.

    Raises:
        InputError: no such file, or a line that is not a JSON object in UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: malformed JSON: {error}") from None
            if not isinstance(raw, dict):
                raise InputError(f"{where}: found {_kind(raw)}, expected an object")
            yield where, raw


def text(raw: Mapping[str, Any], field: str, where: str) -> str:
    """The field as a string; ``InputError`` if it is missing or something else."""
    value = _present(raw, field, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} is {_kind(value)}, expected a string")
    return value


def texts(raw: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    """The field as a list of strings; ``InputError`` if it is missing or something else."""
    value = _present(raw, field, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: {field} is {_kind(value)}, expected a list of strings")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise InputError(f"{where}: {field}[{index}] is {_kind(item)}, expected a string")
    return tuple(value)


def _present(raw: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in raw:
        raise InputError(f"{where}: {field} is missing, found {', '.join(raw) or 'nothing'}")
    return raw[field]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


class Journal:
    """A file that objects are appended to as they come, by one process at a time.

    A process that is killed leaves at most its last line half written; that line is dropped.
    """

    def __init__(self, path: Path) -> None:
        """Opens and locks it.

        Raises:
            InputError: another process has it open.
        """
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(f"{path}: another process is writing to it") from None
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; what a killed process left behind the last is cut off."""
        self._file.seek(0)
        found, end = [], 0
        for line in self._file:
            try:
                raw = json.loads(line)
            except ValueError:
                raw = None
            if not isinstance(raw, dict) or not line.endswith(b"\n"):
                break
            found.append(raw)
            end += len(line)
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() != end:
            self._file.truncate(end)
        return found

    def append(self, raw: Mapping[str, Any]) -> None:
        """Writes one line, whole in the file (though maybe not yet on the disk) on return."""
        self._file.write(json.dumps(raw).encode() + b"\n")
        self._file.flush()

    def clear(self) -> None:
        """Takes all lines out."""
        self._file.truncate(0)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.close()
