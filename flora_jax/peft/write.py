"""Writing an adapter folder that PEFT loads, where it has the kind, and that reads back bit for bit.

Of the base model it knows the names of its projections. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from flora_jax.adapters.model_adapter import ModelAdapter, rank_of
from flora_jax.files import require_new, whole_directory
from flora_jax.peft.config import CONFIG_FILE, AdapterError
from flora_jax.peft.format import FORMATS, Modules
from flora_jax.peft.tensors import TENSORS_FILE, tensor_names

Value = TypeVar("Value", int, float)


def write_adapter(
    adapter: ModelAdapter,
    directory: str | Path,
    base_model_name_or_path: str | None = None,
    *,
    card: str | None = None,
) -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` (float32); returns the folder.

    The folder is written beside its place and renamed. ``base_model_name_or_path`` replaces the
    adapter's own setting; ``card`` is the folder's README.md. PEFT 0.21 ignores a HiRA's
    ``rank_pattern``: it refuses a HiRA written here with ranks that differ between modules, and loads
    every other folder of its kinds. A LoRA scale that is not exactly ``alpha/r`` for any alpha is
    written as its nearest neighbour.

    Raises:
        InputError: the folder exists and is not empty.
        AdapterError: it cannot be written, the adapter adapts nothing, a factor has
            a batch axis or is not finite, FLoRAs of different reductions, or an unknown setting.
    """
    directory = require_new(directory)
    modules = adapter.modules()
    if not modules:
        raise AdapterError(f"{directory}: the adapter adapts no projection, nothing to write")
    config = _config(adapter, modules, directory)
    if base_model_name_or_path is not None:
        config["base_model_name_or_path"] = base_model_name_or_path
    tensors = _tensors(adapter, modules, directory)

    try:
        with whole_directory(directory) as part:
            save_file(tensors, part / TENSORS_FILE, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True)
            (part / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            if card is not None:
                (part / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{directory}: cannot be written: {error}") from error
    return directory


def _tensors(adapter: ModelAdapter, modules: Modules, where: Path) -> dict[str, np.ndarray]:
    own_format, tensors = FORMATS[adapter.kind], {}
    for (layer, target), params in modules.items():
        names = tensor_names(own_format, adapter.projections.names.path(layer, target))
        arrays = own_format.to_tensors(params)
        for name, array, leaf in zip(names, arrays, own_format.leaves, strict=True):
            if array.ndim != len(leaf.axes):
                raise AdapterError(
                    f"{where}: {name}: found shape {array.shape}, "
                    f"expected the {len(leaf.axes)} axes of one adapter"
                )
            if not np.isfinite(array).all():
                raise AdapterError(f"{where}: {name}: holds numbers that are not finite")
            tensors[name] = np.ascontiguousarray(array)
    return tensors


def _config(adapter: ModelAdapter, modules: Modules, where: Path) -> dict[str, Any]:
    own_format = FORMATS[adapter.kind]
    unknown = sorted(set(adapter.settings) - set(own_format.kept))
    if unknown:
        raise AdapterError(
            f"{where}: settings {', '.join(unknown)} have no place in the config of a {adapter.kind} "
            f"adapter, which has {', '.join(own_format.kept)}"
        )
    config: dict[str, Any] = {
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        **adapter.settings,
        "peft_type": own_format.peft_type,
        **own_format.marks,
        **_places(adapter, modules),
    }
    pattern = partial(_pattern, path=adapter.projections.names.path)
    if own_format.has_rank:
        ranks = {module: rank_of(params) for module, params in modules.items()}
        config["r"], config["rank_pattern"] = pattern(ranks)
    try:
        return config | own_format.write(modules, adapter.settings, pattern)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from None


def _places(adapter: ModelAdapter, modules: Modules) -> dict[str, Any]:
    """Targets by suffix where that says it all; whole paths where layers differ among themselves."""
    targets = list(dict.fromkeys(target for _, target in modules))
    path, suffix = adapter.projections.names.path, adapter.projections.suffix
    layers = {target: [n for n, t in modules if t == target] for target in targets}
    own_format = FORMATS[adapter.kind]
    inputs = {module for module, params in modules.items() if own_format.on_inputs(params)}
    numbers = layers[targets[0]]
    everywhere = numbers == list(range(len(adapter.layers)))
    alike = all(found == numbers for found in layers.values()) and all(
        len({(n, target) in inputs for n in numbers}) == 1 for target in targets
    )
    # A config without ranks has no layers_to_transform either.
    if alike and (everywhere or own_format.has_rank):
        places: dict[str, Any] = {"target_modules": [suffix(target) for target in targets]}
        feedforward = [suffix(target) for target in targets if (numbers[0], target) in inputs]
        if not everywhere:
            places["layers_to_transform"] = numbers
    else:
        places = {"target_modules": [path(*module) for module in modules]}
        feedforward = [path(*module) for module in modules if module in inputs]
    if own_format.placed_by is not None:
        places[own_format.placed_by] = feedforward
    return places


def _pattern(
    values: Mapping[tuple[int, str], Value], path: Callable[[int, str], str]
) -> tuple[Value, dict[str, Value]]:
    """The commonest value and what differs from it: by target, or by path where layers differ."""
    common = Counter(values.values()).most_common(1)[0][0]
    pattern: dict[str, Value] = {}
    for target in dict.fromkeys(target for _, target in values):
        own = {module: value for module, value in values.items() if module[1] == target}
        if len(set(own.values())) > 1:
            pattern |= {path(*m): value for m, value in own.items() if value != common}
        elif (value := next(iter(own.values()))) != common:
            pattern[target] = value
    return common, pattern
