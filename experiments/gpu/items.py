"""What every stage has in common: JSON lines as it goes, a deadline, items that may fail one by one.

A stage is a process that ``run.py`` starts; what it must know is in its environment. A line is appended
with one write, so that what is there survives a kill. Standard library only.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS, STAGE = "FLORA_JAX_GPU_RESULTS", "FLORA_JAX_GPU_STAGE"
DEADLINE, REHEARSE = "FLORA_JAX_GPU_DEADLINE", "FLORA_JAX_GPU_REHEARSE"


class Skip(Exception):
    """An item that this machine cannot do; the message says why."""


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line, on a line of its own even where a killed process left half a one.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(dict(line), allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()


@dataclasses.dataclass
class Stage:
    """One stage's results; ``deadline`` is in seconds of ``time.time()``.

    With ``rehearse`` it runs at tiny shapes, on a CPU: its numbers mean nothing.
    """

    name: str
    results: Path
    deadline: float
    rehearse: bool
    started: float = dataclasses.field(default_factory=time.time)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def put(self, item: str, **found: Any) -> None:
        """Writes one line: ``stage``, ``item``, ``at_s`` since the stage began, and what was found."""
        at_s = round(time.time() - self.started, 2)
        line = {"stage": self.name, "item": item, "at_s": at_s, **found}
        append(self.results, line)
        print(json.dumps(line), flush=True)

    def attempt(
        self, item: str, measure: Callable[[], Mapping[str, Any]], need_s: float = 0.0, **about: Any
    ) -> Mapping[str, Any] | None:
        """Measures one item and writes its line, with ``about``; what it found, ``None`` without.

        Whatever goes wrong becomes ``failed`` with the reason; what this machine cannot do, or with
        less time left than ``need_s``, ``skipped``.
        """
        if self.left < need_s:
            self.put(
                item, skipped=f"{max(0.0, self.left):.0f} s left, it needs {need_s:g}", **about
            )
            return None
        began = time.time()
        try:
            found = measure()
            self.put(item, **about, **found, took_s=round(time.time() - began, 2))
            return found
        except Skip as reason:
            self.put(item, skipped=str(reason), **about)
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            self.put(item, failed=f"{type(error).__name__}: {words}", **about)
            traceback.print_exc(limit=6)
        return None


def from_environment() -> Stage:
    """The stage that this process is."""
    return Stage(
        os.environ[STAGE],
        Path(os.environ[RESULTS]),
        float(os.environ[DEADLINE]),
        os.environ.get(REHEARSE) == "1",
    )


def require(*packages: str) -> None:
    """Raises ``Skip`` where a package that the item needs is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise Skip(f"no {name}")


def main(stage: Callable[[Stage, list[str]], None]) -> None:
    """Runs a stage with the words of its command line, and ends the process without waiting for threads
    that may still compile.
    """
    stage(from_environment(), sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
