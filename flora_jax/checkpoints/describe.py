"""What a checkpoint is: its configuration, format and size, from config.json and the headers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.checkpoints.match import match_tensors
from flora_jax.checkpoints.sources import resolve
from flora_jax.checkpoints.tensor_files import CheckpointError, open_directory, stored_tensors
from flora_jax.errors import InputError
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.models.starcoder.names import hf_tensors

MARKER = "flora_jax.json"
VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
Source = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint is. ``format`` is "safetensors", "pytorch", "orbax" or "hub".

    ``parameters`` and ``bytes`` count the parameters once each, in the checkpoint's own dtype;
    ``disk_bytes`` is the size of the files of weights (0 for a hub id, whose weights stay there).
    """

    source: str
    format: str
    config: StarCoderConfig
    parameters: int
    bytes: int
    disk_bytes: int


def describe(source: Source) -> Description:
    """Reads config.json and checks the files' headers against it; of an orbax directory and of a
    ``pytorch_model.bin`` only the sizes are looked at.

    Of a hub id only the configuration and the tokenizer are fetched.

    Raises:
        CheckpointError: no checkpoint, one of another architecture or version, or one whose
            safetensors do not fit its config.json.
    """
    directory = resolve(source, weights=False)
    config = read_config(directory)
    if not Path(source).exists():
        kind, files = "hub", []
    elif is_ours(directory):
        kind = "orbax"
        files = [file for file in (directory / "params").rglob("*") if file.is_file()]
    else:
        kind, files, _ = open_directory(directory)
        if kind == "safetensors":
            match_tensors(directory, stored_tensors(directory), config)
    count = sum(math.prod(tensor.shape) for tensor in hf_tensors(config).values())
    return Description(
        source=os.fspath(source),
        format=kind,
        config=config,
        parameters=count,
        bytes=count * parameter_dtype(None, config).itemsize,
        disk_bytes=sum(file.stat().st_size for file in files),
    )


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
        raise CheckpointError(f"{marker}: version is {version!r}, expected {VERSION}")
    return True


def read_config(directory: Path) -> StarCoderConfig:
    """config.json; its errors, of another architecture for one, are ``CheckpointError``.

    Where it does not name a dtype, the embedding's in a safetensors file counts.
    """
    path = directory / "config.json"
    try:
        config = StarCoderConfig.from_file(path)
    except InputError as error:
        raise CheckpointError(str(error)) from None
    raw = json.loads(path.read_text())
    if raw.get("dtype") or raw.get("torch_dtype") or not any(directory.glob("*.safetensors")):
        return config
    for name, tensor in stored_tensors(directory).items():
        if name.endswith("wte.weight") and tensor.dtype is not None and tensor.dtype.name in DTYPES:
            return dataclasses.replace(config, dtype=tensor.dtype.name)
    return config


def parameter_dtype(dtype: Any, config: StarCoderConfig) -> np.dtype:
    """The wanted dtype, or for None the checkpoint's own; ``CheckpointError`` for any other kind."""
    try:
        wanted = np.dtype(config.dtype if dtype is None else dtype)
    except TypeError:
        wanted = None
    if wanted is None or wanted.name not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    return wanted
