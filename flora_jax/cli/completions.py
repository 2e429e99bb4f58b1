"""Where ``generate`` writes: a file that a killed job goes on with, or standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from flora_jax.errors import InputError
from flora_jax.files import require_file, whole_file
from flora_jax.jsonl import Journal

# How a part file begins.
_HEAD = b'{"job": '


class Output(Protocol):
    """Takes lines by the index of their request, in any order."""

    def begin(self, job: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """The lines that an earlier run of the same job left, by index."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Keeps a line; its ``index`` says which."""

    def finish(self) -> None:
        """Ends it: all lines are there."""

    def close(self) -> None:
        """Lets go of it, finished or not."""


def open_output(path: Path, overwrite: bool) -> Output:
    """Standard output for "-", else the file, tried by making what it is written through.

    Raises:
        InputError: it exists already and is not to be overwritten, it cannot be written, or another
            process is writing to it.
    """
    return StandardOutput() if str(path) == "-" else CompletionsFile(path, overwrite)


class CompletionsFile:
    """``PATH.part`` while it is written, with what the job is in its first line; whole at the end."""

    def __init__(self, path: Path, overwrite: bool):
        self._path, self._overwrite = require_file(path, overwrite), overwrite
        target = path.resolve()
        self._part = target.with_name(f"{target.name}.part")
        self._journal = Journal(self._part)
        with self._part.open("rb") as file:
            if not _HEAD.startswith(file.read(len(_HEAD))):
                self._journal.close()
                raise InputError(f"{self._part}: no file that this command left; move it away")
        self._earlier = self._journal.read()
        self._lines: dict[int, dict[str, Any]] = {}
        # Whether there is anything in it for a later run.
        self._keep = len(self._earlier) > 1

    def begin(self, job: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        wanted = json.loads(json.dumps(job))
        earlier = self._earlier
        found = earlier[0].get("job") if earlier else None
        if earlier and found != wanted:
            if not self._overwrite:
                found = found if isinstance(found, dict) else {}
                fields = [name for name in wanted if found.get(name) != wanted[name]]
                raise InputError(
                    f"{self._part}: left by a run with other {', '.join(fields)}; the same command "
                    "goes on with it, --overwrite starts anew"
                )
            self._journal.cut(0)
            earlier = []
        if not earlier:
            self._journal.append({"job": wanted})
        self._lines = {line["index"]: line for line in earlier[1:]}
        self._keep = bool(self._lines)
        return dict(self._lines)

    def add(self, line: Mapping[str, Any]) -> None:
        self._journal.append(line)
        self._lines[line["index"]] = dict(line)
        self._keep = True

    def finish(self) -> None:
        with whole_file(self._path) as file:
            for _, line in sorted(self._lines.items()):
                file.write(_text(line))
        self._keep = False

    def close(self) -> None:
        # Removed while it is still locked: nobody else has begun to write to it.
        if not self._keep:
            self._part.unlink(missing_ok=True)
        self._journal.close()


class StandardOutput:
    """Lines in the order of their requests, each as soon as those before it are there."""

    def __init__(self) -> None:
        self._waiting: dict[int, Mapping[str, Any]] = {}
        self._following = 0

    def begin(self, job: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        return {}

    def add(self, line: Mapping[str, Any]) -> None:
        self._waiting[line["index"]] = line
        while self._following in self._waiting:
            sys.stdout.write(_text(self._waiting.pop(self._following)))
            self._following += 1
        sys.stdout.flush()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
