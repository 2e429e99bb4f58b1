"""What a checkpoint is: its configuration, format and size, from config.json and the headers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.checkpoints.match import match_tensors
from flora_jax.checkpoints.tensor_files import CheckpointError, open_directory, stored_tensors
from flora_jax.errors import InputError
from flora_jax.models.family import (
    DTYPES,
    ModelConfig,
    changed,
    family_of,
    parameters,
    read_family_config,
)

MARKER = "flora_jax.json"
# 2: weights by outputs, [O, I]; 1 had [I, O].
VERSION = 2
Source = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint is. ``format`` is "safetensors", "pytorch", "orbax" or "hub".

    ``parameters`` and ``bytes`` count the parameters once each, in the checkpoint's own dtype; ``bytes``
    is ``None`` for a hub id whose config.json names no dtype, before its weights are there to say it;
    ``disk_bytes`` is the size of the files of weights (0 for a hub id, whose weights stay there).
    """

    source: str
    format: str
    config: ModelConfig
    parameters: int
    bytes: int | None
    disk_bytes: int


def describe_directory(
    source: str, directory: Path, config: ModelConfig, from_hub: bool
) -> Description:
    """Checks the files' headers of a checkpoint against its configuration; of an orbax directory and of a
    ``pytorch_model.bin`` only the sizes are looked at, of a hub id nothing.

    Raises:
        CheckpointError: safetensors that do not fit config.json, or an unknown version of our layout.
    """
    kind, files = format_of(directory, from_hub)
    if kind == "safetensors":
        match_tensors(directory, stored_tensors(directory), config)
    count = parameters(config)
    known = kind != "hub" or _says_dtype(directory)
    return Description(
        source=source,
        format=kind,
        config=config,
        parameters=count,
        bytes=count * parameter_dtype(None, config).itemsize if known else None,
        disk_bytes=sum(file.stat().st_size for file in files),
    )


def format_of(directory: Path, from_hub: bool) -> tuple[str, list[Path]]:
    """How a checkpoint holds its weights, as :class:`Description` has it, and the files of them.

    Raises:
        CheckpointError: no weights, a broken index, or an unknown version of our layout.
    """
    if from_hub:
        return "hub", []
    if is_ours(directory):
        return "orbax", [file for file in (directory / "params").rglob("*") if file.is_file()]
    kind, files, _ = open_directory(directory)
    return kind, files


def is_ours(directory: Path) -> bool:
    """Whether :func:`~flora_jax.checkpoints.checkpoint.save_orbax` wrote it.

    Raises:
        CheckpointError: it did, in a version of the layout that is unknown here.
    """
    marker = directory / MARKER
    if not marker.is_file():
        return False
    try:
        version = json.loads(marker.read_text())["version"]
    except (ValueError, KeyError, TypeError):
        version = None
    if version != VERSION:
        raise CheckpointError(
            f"{marker}: version is {version!r}, expected {VERSION}: convert the checkpoint anew"
        )
    return True


def read_config(directory: Path) -> ModelConfig:
    """What config.json and generation_config.json say; of the tensors nothing is looked at.

    The tokens that end a generation are generation_config.json's where it names any, as in
    transformers. Where config.json names no dtype, the embedding's in a safetensors file counts, so that
    of a hub id it is known once the weights are fetched.

    Raises:
        CheckpointError: a file is missing or damaged; another architecture, an unknown field, or a value
            that cannot be honoured.
    """
    path = directory / "config.json"
    raw = _read_object(path)
    try:
        config = read_family_config(raw, str(path))
        config = _with_end_tokens(config, directory / "generation_config.json")
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(str(error)) from None
    if _named_dtype(raw) or not any(directory.glob("*.safetensors")):
        return config
    family = family_of(config)
    wanted = family.tensors(config)[family.embedding].name.removeprefix(family.optional_prefix)
    for name, tensor in stored_tensors(directory).items():
        same = name.removeprefix(family.optional_prefix) == wanted
        if same and tensor.dtype is not None and tensor.dtype.name in DTYPES:
            return changed(config, dtype=tensor.dtype.name)
    return config


def _named_dtype(raw: Mapping[str, Any]) -> Any:
    return raw.get("dtype") or raw.get("torch_dtype")


def _says_dtype(directory: Path) -> bool:
    """Whether config.json or weights that are there say what :func:`read_config` has as the dtype."""
    if _named_dtype(_read_object(directory / "config.json")):
        return True
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def _with_end_tokens(config: ModelConfig, path: Path) -> ModelConfig:
    if not path.is_file():
        return config
    found = _read_object(path).get("eos_token_id")
    if found is None:
        return config
    tokens = found if isinstance(found, list) else [found]
    if not tokens or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise CheckpointError(f"{path}: eos_token_id is {found!r}, expected token ids")
    # config.json's first, where it is among them: it ends the documents of a training run.
    own = [token for token in config.eos_token_ids if token in tokens]
    return changed(config, eos_token_ids=tuple(dict.fromkeys([*own, *tokens])))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # Huge integers, deep nesting, not UTF-8.
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def parameter_dtype(dtype: Any, config: ModelConfig) -> np.dtype:
    """The wanted dtype, or for None the checkpoint's own; ``CheckpointError`` for any other kind."""
    try:
        wanted = np.dtype(config.dtype if dtype is None else dtype)
    except TypeError:
        wanted = None
    if wanted is None or wanted.name not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    return wanted
