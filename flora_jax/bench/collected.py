"""Results of an experiment of many runs, a line of JSON each, so that it can be stopped and go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_jax.bench import machine
from flora_jax.errors import InputError
from flora_jax.files import whole_file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines collected so far, none where there is no file yet.

    Raises:
        InputError: a line that is no JSON object.
    """
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(line, dict):
            raise InputError(f"{path}, line {number}: expected an object, found {text[:40]}")
        found.append(line)
    return found


def find(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """This machine's last line with these values, compared as JSON has them.

    Raises:
        InputError: a line that is no JSON object.
    """
    wanted = json.loads(json.dumps(dict(key)))
    here = _place(machine.describe())
    for line in reversed(read_lines(path)):
        if _place(line.get("machine")) == here and all(
            name in line and line[name] == value for name, value in wanted.items()
        ):
            return line
    return None


def by_preset(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Lines by preset, and by machine where there are several, under a title for both."""
    machines = {_place(line.get("machine")) for line in lines}
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        words = [line["preset"], *(_place(line.get("machine")) if len(machines) > 1 else ())]
        found.setdefault(", ".join(words), []).append(line)
    return found


def _place(about: Any) -> tuple[str, ...]:
    """What makes one machine's times comparable: its processors and devices."""
    if not isinstance(about, dict):
        return ("unknown machine",)
    devices = [name for name in about.get("devices") or () if name != "cpu: cpu"]
    return (f"{about.get('cores')} cores of {about.get('cpu')}", *devices)


def append_line(path: Path, key: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a line with the key, command, date, machine, versions and the result, at once and whole.

    Raises:
        ValueError: a number that is not finite.
    """
    receipt = {
        "command": machine.command(),
        "date": machine.now(),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    line = dict(key) | receipt | dict(result)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    with whole_file(path) as file:
        file.write(old + json.dumps(line, allow_nan=False) + "\n")
    return line
