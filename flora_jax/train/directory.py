"""A run's directory: whose it is, what it was given, and what a killed process left in it.

config.json      the effective options        checkpoints/  the last states, by orbax
data.json        what was read and skipped    NAME/         an adapter's folder, at the end
metrics.jsonl    losses and validation        curve.png     their picture, at the end
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError
from flora_jax.files import entries, is_part, require_new, whole_file
from flora_jax.train.data.documents import place_and_reason
from flora_jax.train.data.packing import PackedTokens
from flora_jax.train.options import CONFIG, DATA, TrainOptions, as_fields, read_file

# What a resumed run may change: none of it touches the result.
_FREE = ("keep", "save_every")
# What no run is without.
_NEEDED = {"model", "kind", "data"}
# Reasons of what was skipped that are shown; data.json has all.
_SHOWN = 5

Tokenized = Mapping[str, tuple[PackedTokens, list[str]]]


def options_to_resume(output: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run in ``output``, what is given among them: all that a run to resume needs.

    Without a run there, ``given``: who always asks to resume starts one so.

    Args:
        output: of the run.
        given: by the names of the fields; ``None`` is what is not given.

    Raises:
        InputError: what is given is not what the run has, there is none and nothing that could start
            one, or its file is damaged.
    """
    saved = output / CONFIG
    if not saved.exists():
        if not given.keys() & _NEEDED:
            raise InputError(f"{saved}: no such file, so there is no run to resume")
        return dict(given)
    before = _of_run(saved)
    wanted = {
        name: value
        for name, value in as_fields(given).items()
        if value is not None or name not in before
    }
    for name in sorted(wanted.keys() & before.keys()):
        # As JSON has it, but for 1 and 1.0.
        own = json.loads(json.dumps(wanted[name], default=str))
        if own != before[name] or (isinstance(own, dict) and [*own] != [*before[name]]):
            _require_same(saved, name, before[name], own)
    return before | wanted


def check_directory(options: TrainOptions, output: Path, resume: bool) -> None:
    """Whether the run may use ``output``; writes nothing.

    Raises:
        InputError: something is there and ``resume`` is not asked for, or what is there is no run or
            one with other options (the order of the adapters is one of them).
    """
    saved = output / CONFIG
    if not resume or not saved.exists():
        if not (resume and output.is_dir() and all(map(is_part, entries(output)))):
            require_new(output)
        return
    before, now = _of_run(saved), json.loads(options.model_dump_json())
    for name in sorted(before.keys() | now.keys()):
        _require_same(saved, name, before.get(name), now.get(name))


def _of_run(saved: Path) -> dict[str, Any]:
    """The options in a run's file."""
    before = read_file(saved)
    if not before.keys() >= _NEEDED:
        raise InputError(f"{saved}: not the options of a training run")
    return before


def _require_same(saved: Path, name: str, before: Any, now: Any) -> None:
    """Raises ``InputError`` where the run in ``saved`` has another value, and must not."""
    # As text: two objects of another order are equal otherwise.
    old, new = json.dumps(before), json.dumps(now)
    if name not in _FREE and old != new:
        raise InputError(f"{saved}: the run to resume has {name} {old}, now {new}")


def is_finished(options: TrainOptions, output: Path) -> bool:
    """Whether every adapter is there. A run without its picture is finished all the same."""
    return all((output / name).exists() for name in (DATA, *options.data))


def claim_directory(
    options: TrainOptions,
    output: Path,
    training: Tokenized,
    validation: Tokenized,
    digest: str,
) -> None:
    """Saves the options and what was read, and removes what a killed process left half written.

    Raises:
        InputError: the data, or the base's content ``digest``, are not what the run to resume has read.
    """
    described = {
        split: {name: _described(packed, skipped) for name, (packed, skipped) in data.items()}
        for split, data in (("training", training), ("validation", validation))
    }
    saved = output / DATA
    if saved.exists():
        before = read_file(saved)
        if before.get("model", digest) != digest:
            raise InputError(f"{saved}: the weights of {options.model} are not what they were")
        for split, found in described.items():
            for name, entry in found.items():
                if before.get(split, {}).get(name, {}).get("sha256") != entry["sha256"]:
                    raise InputError(f"{saved}: {split} data of {name!r} are not what they were")
    for path in filter(is_part, entries(output)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with whole_file(output / CONFIG) as file:
        file.write(options.model_dump_json(indent=1) + "\n")
    with whole_file(saved) as file:
        file.write(json.dumps(described | {"model": digest}, indent=1) + "\n")


def report_data(
    training: Tokenized, validation: Tokenized, say: Callable[[str], None], where: str | None = DATA
) -> None:
    """:func:`report_documents` of each data set."""
    for split, data in (("data", training), ("validation", validation)):
        for name, (packed, skipped) in data.items():
            report_documents(f"{split} {name}", packed, skipped, say, where)


def report_documents(
    name: str,
    packed: PackedTokens,
    skipped: list[str],
    say: Callable[[str], None],
    where: str | None = None,
) -> None:
    """A line for a data set and for each of the first reasons why documents were skipped.

    ``where`` is the file that has all of them, if there is one.
    """
    say(f"{name}: {len(packed.starts):,} documents, {len(packed.tokens):,} tokens")
    see = "" if where is None else f"; see {where}"
    groups = _by_reason(skipped)
    for first, *others in groups[:_SHOWN]:
        place, reason = place_and_reason(first)
        if not others:
            say(f"{name}: skipped {first}")
            continue
        part = re.search(r", (line|row) \d+$", place)
        things = f"{len(others) + 1:,} {'file' if part is None else part[1]}s"
        say(f"{name}: {things} skipped: {reason} ({place}, {len(others):,} more){see}")
    if rest := sum(map(len, groups[_SHOWN:])):
        say(f"{name}: skipped {rest:,} more for other reasons{see}")


def _by_reason(skipped: list[str]) -> list[list[str]]:
    """Those whose reasons differ in numbers alone together, in the order of the first ones."""
    groups: dict[str, list[str]] = {}
    for line in skipped:
        groups.setdefault(re.sub(r"\d+", "0", place_and_reason(line)[1]), []).append(line)
    return [*groups.values()]


def _described(packed: PackedTokens, skipped: list[str]) -> dict[str, Any]:
    return {
        "documents": len(packed.starts),
        "tokens": len(packed.tokens),
        "text_bytes": packed.text_bytes,
        "sha256": hashlib.sha256(packed.tokens.tobytes() + packed.starts.tobytes()).hexdigest(),
        "skipped": skipped,
    }
