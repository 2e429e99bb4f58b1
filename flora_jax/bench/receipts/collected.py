"""Results of an experiment of many runs, a line of JSON each, so that it can be stopped and go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_jax.bench.receipts import machine
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
    """Lines that may be compared, under a title: the preset, and what else differs between lines of
    one preset, the machine and settings such as lengths, scale and dtype. Seeds and repeats may.
    """
    settings = [_comparable(line) for line in lines]
    found: dict[str, list[dict[str, Any]]] = {}
    for line, own in zip(lines, settings, strict=True):
        alike = [other for other in settings if other["preset"] == own["preset"]]
        differing = [name for name in own if any(other.get(name) != own[name] for other in alike)]
        words = [own[n] if n == "machine" else f"{n} {own[n]}" for n in differing]
        found.setdefault(", ".join([line["preset"], *words]), []).append(line)
    return found


def _comparable(line: Mapping[str, Any]) -> dict[str, str]:
    """What lines of one figure have in common, as text."""
    workload = line.get("workload", {})
    plan = {name: line.get(name) for name in ("dtype", "max_num_seqs", "max_num_batched_tokens")}
    plan |= {name: workload.get(name) for name in ("lengths", "min_total", "max_total", "scale")}
    about = {"preset": line["preset"], "machine": ", ".join(_place(line.get("machine")))}
    return about | {name: str(value) for name, value in plan.items()}


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
