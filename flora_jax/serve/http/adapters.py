"""/v1/load_lora_adapter and /v1/unload_lora_adapter: adapters come and go while the server runs.

A folder is looked at before it is trusted: it and its files lie below the root once links are resolved,
they are small enough, they are safetensors, and no pattern in the configuration can take long.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from flora_jax.errors import InputError
from flora_jax.models.family import ModelConfig
from flora_jax.peft.config import CONFIG_FILE
from flora_jax.peft.read import describe_adapter, read_adapter
from flora_jax.peft.tensors import TENSORS_FILE
from flora_jax.serve.engine import Engine
from flora_jax.serve.http.errors import ApiError, invalid, responses
from flora_jax.serve.http.locks import NameLocks
from flora_jax.serve.http.runner import Runner
from flora_jax.serve.http.schemas import LoadRequest, LoadResponse, UnloadRequest, UnloadResponse
from flora_jax.serve.http.served import Served

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_CONFIG_BYTES = 1 << 20
_HEADER_BYTES = 8 << 20
_LARGEST_ITEM = 8
# Patterns that a configuration may have: without groups that repeat, so that the time to match one is a
# small power of a path's length.
_PATTERN_FIELDS = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_PATTERN_CHARACTERS = 256
_REPEATS = 3
_REPEATING_PATTERNS = 8
_COSTLY = re.compile(r"\)[*+?{]|\(\?|\\[0-9]")
_REPEAT = re.compile(r"[*+?{]")
# How long a load waits until running requests leave room on the device.
_PLACE_S = 60.0


def check_folder(folder: str, root: Path, config: ModelConfig, max_rank: int) -> Path:
    """The folder of an adapter below a root, once nothing about it can do harm.

    Args:
        folder: absolute, or relative to the root.
        root: what it has to lie below.
        config: of the base that it has to fit.
        max_rank: of its components at most.

    Raises:
        InputError: it lies elsewhere, is no whole adapter of this base, has numbers that are not finite,
            or is larger than such an adapter can be.
    """
    root = root.resolve()
    found = _below(root, root / folder, folder)
    if not found.is_dir():
        raise _elsewhere(folder)
    others = sorted(
        entry.name
        for entry in os.scandir(found)
        if entry.name.startswith("adapter_") and entry.name not in (CONFIG_FILE, TENSORS_FILE)
    )
    if others:
        raise InputError(f"{folder}: found {others[0]}, expected {CONFIG_FILE} and {TENSORS_FILE}")
    _check_size(root, found / CONFIG_FILE, folder, _CONFIG_BYTES)
    size = _check_size(root, found / TENSORS_FILE, folder, _most_bytes(config, max_rank))
    _check_header(found / TENSORS_FILE, folder, size)
    _check_patterns(found / CONFIG_FILE, folder)
    ranks = describe_adapter(found).ranks
    for target, own in ranks.items():
        if max(own) > max_rank:
            raise InputError(
                f"{folder}: {target} has rank {max(own)}, at most {max_rank} is served"
            )
    read_adapter(found, config.projections(), config.n_layer)
    return found


def _below(root: Path, path: Path, folder: str) -> Path:
    try:
        found = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle.
        raise _elsewhere(folder) from None
    if not found.is_relative_to(root):
        raise _elsewhere(folder)
    return found


def _elsewhere(folder: str) -> InputError:
    # The same whatever lies there, so that nobody can ask what does.
    return InputError(f"{folder[:200]!r} is no adapter folder below the adapters' root")


def _check_size(root: Path, path: Path, folder: str, most: int) -> int:
    try:
        found = _below(root, path, folder).stat()
    except (OSError, InputError):
        raise InputError(f"{folder}: {path.name} is missing, or lies outside the root") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{folder}: {path.name} is no file")
    if found.st_size > most:
        raise InputError(
            f"{folder}: {path.name} has {found.st_size} bytes, expected at most {most}"
        )
    return found.st_size


def _most_bytes(config: ModelConfig, max_rank: int) -> int:
    """Of a file of an adapter of this rank on every target, whatever its kind and dtype."""
    widths = sum(inputs + outputs for inputs, outputs in config.projections().values())
    numbers = config.n_layer * widths * (max_rank + 1)
    return numbers * _LARGEST_ITEM + _HEADER_BYTES


def _check_header(path: Path, folder: str, size: int) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    most = min(_HEADER_BYTES, size - 8)
    if length > most:
        raise InputError(
            f"{folder}: the header of {path.name} has {length} bytes, expected at most {most}"
        )


def _check_patterns(path: Path, folder: str) -> None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder}: {path.name} is no JSON: {type(error).__name__}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{folder}: {path.name} is no JSON object")
    repeating = 0
    for field in _PATTERN_FIELDS:
        for pattern in _strings(raw.get(field)):
            repeats = len(_REPEAT.findall(pattern))
            repeating += repeats > 0
            if (
                len(pattern) > _PATTERN_CHARACTERS
                or repeats > _REPEATS
                or repeating > _REPEATING_PATTERNS
                or _COSTLY.search(pattern)
            ):
                raise InputError(
                    f"{folder}: {field} has a pattern that may take long to match, "
                    f"{pattern[:80]!r}: name the modules in a list"
                )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (key for key in value if isinstance(key, str))
    elif isinstance(value, list):
        yield from (one for one in value if isinstance(one, str))


def adapter_paths(runner: Runner, served: Served, root: Path, max_rank: int) -> APIRouter:
    """The two paths."""
    router = APIRouter()
    errors = responses(400, 401, 403, 408, 413, 500, 503)
    locks = NameLocks()

    @router.post("/v1/load_lora_adapter", responses=errors)
    async def load(body: LoadRequest) -> LoadResponse:
        """Makes an adapter known, and resident as soon as there is room; answers then."""
        name, begun_s = body.lora_name, time.monotonic()
        _check_name(name, served)
        async with locks.of(name):
            runner.check_open()
            engine = runner.engine
            if engine.registry.knows(name) and not body.load_inplace:
                message = (
                    f"adapter {name!r} is loaded already, expected another name or load_inplace"
                )
                raise ApiError(400, message, code="already_loaded", param="lora_name")
            try:
                folder = await asyncio.to_thread(
                    check_folder, body.lora_path, root, engine.config, max_rank
                )
            except InputError as error:
                raise invalid(str(error), "lora_path") from None
            await _register(runner, engine, name, folder)
            state = engine.adapters.get(name, "disk")
        seconds = round(time.monotonic() - begun_s, 6)
        return LoadResponse(lora_name=name, state=state, seconds=seconds)

    @router.post("/v1/unload_lora_adapter", responses=errors | responses(404))
    async def unload(body: UnloadRequest) -> UnloadResponse:
        """Forgets an adapter; requests that run under it go on."""
        async with locks.of(body.lora_name):
            runner.check_open()
            try:
                runner.engine.unregister(body.lora_name)
            except InputError as error:
                message = str(error)
                raise ApiError(404, message, code="model_not_found", param="lora_name") from None
        return UnloadResponse(lora_name=body.lora_name)

    return router


async def _register(runner: Runner, engine: Engine, name: str, folder: Path) -> None:
    """Registers an adapter and waits until it is resident; what the name stood for comes back where it
    cannot be. By whoever holds the name's lock.
    """
    known = {version.name: version.source for version in engine.registry.versions()}
    await asyncio.to_thread(engine.register, name, folder)
    try:
        async with asyncio.timeout(_PLACE_S):
            await runner.place(name)
    except TimeoutError:
        pass  # Running requests have the room; its own first request will wait for it.
    except InputError as error:
        if name in known:
            await asyncio.to_thread(engine.register, name, known[name])
        else:
            engine.unregister(name)
        raise invalid(str(error), "lora_path") from None


def _check_name(name: str, served: Served) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise invalid(
            f"lora_name is {name[:140]!r}, expected 1 to 128 letters, digits, '.', '_', '-' or '/'",
            "lora_name",
        )
    if name in served.names:
        raise invalid(f"lora_name is {name!r}, which is the base's", "lora_name")
