"""Results of an experiment of many runs, a line of JSON each, so that it can be stopped and go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_jax.bench.receipts import machine
from flora_jax.errors import InputError
from flora_jax.files import directory_lock, whole_file
from flora_jax.jsonl import read_objects


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines collected so far, none where there is no file yet.

    Raises:
        InputError: a line that is no JSON object.
    """
    return [line for _, line in read_objects(path)] if path.exists() else []


def run_presets(
    results: Path,
    presets: Sequence[str],
    known: Collection[str],
    repeats: int,
    run: Callable[[str, int], None],
) -> None:
    """Calls ``run(preset, repeat)`` for all of them, while no other process measures into ``results``.

    Raises:
        InputError: a preset that is not ``known``, or another process has the directory of ``results``.
    """
    for preset in presets:
        if preset not in known:
            raise InputError(f"PRESET is {preset!r}, expected some of {', '.join(known)}")
    if presets:
        with directory_lock(results.parent):
            for repeat in range(repeats):
                for preset in presets:
                    run(preset, repeat)


def find(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last line with these values, compared as JSON has them, of this machine and this code.

    Another machine's times, and those of another commit, are other results.

    Raises:
        InputError: a line that is no JSON object.
    """
    here = _place(machine.describe()), _code({"versions": machine.versions()})
    for line in reversed(_with(path, key)):
        if (_place(line.get("machine")), _code(line)) == here:
            return line
    return None


def made(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last line with these values, whatever machine and code it is of: for what is no time.

    The key has everything that decides a result.

    Raises:
        InputError: a line that is no JSON object.
    """
    found = _with(path, key)
    return found[-1] if found else None


def _with(path: Path, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    wanted = json.loads(json.dumps(dict(key)))
    return [
        line
        for line in read_lines(path)
        if all(name in line and line[name] == value for name, value in wanted.items())
    ]


def by_preset(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Lines that may be compared, under a title: the preset, and what differs between lines of it.

    That is the machine, the commit, and settings such as lengths, scale and dtype, but not seeds and
    repeats.
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
    about = {
        "preset": line["preset"],
        "machine": ", ".join(_place(line.get("machine"))),
        "commit": _code(line),
    }
    return about | {name: str(value) for name, value in plan.items()}


def _code(line: Mapping[str, Any]) -> str:
    """The code that was measured: its commit, or the version where there is none."""
    versions = line.get("versions") or {}
    commit = str(versions.get("commit") or versions.get("flora_jax"))
    return commit[:12] + commit[40:]


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
    line = dict(key) | machine.receipt() | dict(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    with whole_file(path) as file:
        file.write(old + json.dumps(line, allow_nan=False) + "\n")
    return line
