"""A run's directory: whose it is, what it was given, and what a killed process left in it.

config.json      the effective options        checkpoints/  the last states, by orbax
data.json        what was read and skipped    NAME/         an adapter's folder, at the end
metrics.jsonl    losses and validation        curve.png     their picture, at the end
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flora_jax.errors import InputError
from flora_jax.files import entries, is_part, require_new, whole_file
from flora_jax.train.data.packing import PackedTokens
from flora_jax.train.options import CONFIG, DATA, TrainOptions, read_file

# What a resumed run may change: none of it touches the result.
_FREE = ("keep", "save_every")
# Skipped lines that are shown; data.json has all.
_SHOWN = 20

Tokenized = Mapping[str, tuple[PackedTokens, list[str]]]


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
    before, now = read_file(saved), json.loads(options.model_dump_json())
    if not before.keys() >= {"model", "kind", "data"}:
        raise InputError(f"{saved}: not the options of a training run")
    for name in sorted(before.keys() | now.keys()):
        # As text: two objects of another order are equal otherwise.
        old, new = json.dumps(before.get(name)), json.dumps(now.get(name))
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
    """A line for each data set and for each of its first skipped documents; ``where`` has all of them."""
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
    """A line for a data set and for each of its first skipped documents; ``where`` has all of them."""
    say(f"{name}: {len(packed.starts):,} documents, {len(packed.tokens):,} tokens")
    for line in skipped[:_SHOWN]:
        say(f"{name}: skipped {line}")
    if len(skipped) > _SHOWN:
        see = "" if where is None else f", see {where}"
        say(f"{name}: skipped {len(skipped) - _SHOWN} more{see}")


def _described(packed: PackedTokens, skipped: list[str]) -> dict[str, Any]:
    return {
        "documents": len(packed.starts),
        "tokens": len(packed.tokens),
        "text_bytes": packed.text_bytes,
        "sha256": hashlib.sha256(packed.tokens.tobytes() + packed.starts.tobytes()).hexdigest(),
        "skipped": skipped,
    }
