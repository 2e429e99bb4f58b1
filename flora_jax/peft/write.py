"""Writing an adapter folder that PEFT loads (LoRA, IA3, HiRA) and that reads back bit for bit.

Of the base model it knows the names of its projections. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from flora_jax.adapters import IA3
from flora_jax.adapters.model_adapter import ModelAdapter, rank_of
from flora_jax.files import require_new, whole_directory
from flora_jax.peft.config import CONFIG_FILE, PEFT_TYPES, SETTINGS, AdapterError
from flora_jax.peft.tensors import TENSORS_FILE, tensor_names

Modules = Mapping[tuple[int, str], Any]
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
    modules = {
        (layer, target): params
        for layer, targets in enumerate(adapter.layers)
        for target, params in targets.items()
    }
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
    tensors = {}
    for (layer, target), params in modules.items():
        names = tensor_names(adapter.kind, adapter.projections.names.path(layer, target))
        for name, array in zip(names, _arrays(adapter.kind, params), strict=True):
            if array.ndim != 2:
                raise AdapterError(
                    f"{where}: {name}: found shape {array.shape}, expected the 2 axes of one adapter"
                )
            if not np.isfinite(array).all():
                raise AdapterError(f"{where}: {name}: holds numbers that are not finite")
            tensors[name] = np.ascontiguousarray(array)
    return tensors


def _arrays(kind: str, params: Any) -> Iterable[np.ndarray]:
    def wide(factor: Any) -> np.ndarray:
        return np.asarray(factor).astype(np.float32)

    if kind == "ia3":
        return (wide(params.l)[None] if params.side == "input" else wide(params.l)[..., None],)
    if kind == "flora":
        return wide(params.B_RI), wide(params.A_RO)
    return wide(params.down_RI), wide(params.up_RO).swapaxes(-1, -2)


def _config(adapter: ModelAdapter, modules: Modules, where: Path) -> dict[str, Any]:
    kind = adapter.kind
    unknown = sorted(set(adapter.settings) - set(SETTINGS[kind]))
    if unknown:
        raise AdapterError(
            f"{where}: settings {', '.join(unknown)} have no place in the config of a {kind} "
            f"adapter, which has {', '.join(SETTINGS[kind])}"
        )
    config: dict[str, Any] = {
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        **adapter.settings,
        "peft_type": {name: peft for peft, name in PEFT_TYPES.items()}[kind],
        **_places(adapter, modules),
    }
    if kind == "ia3":
        return config
    path = adapter.projections.names.path
    ranks = {module: rank_of(params) for module, params in modules.items()}
    config["r"], config["rank_pattern"] = _pattern(ranks, path)
    if kind == "lora":
        for module, params in modules.items():
            if not math.isfinite(params.scale):
                raise AdapterError(f"{where}: {path(*module)}: scale is {params.scale}")
        root = math.sqrt if adapter.settings.get("use_rslora") else float
        alphas = {m: _alpha(params.scale, root(ranks[m])) for m, params in modules.items()}
        config["lora_alpha"], config["alpha_pattern"] = _pattern(alphas, path)
        config["bias"] = "none"
    if kind == "flora":
        ways = {(params.reduction, params.frozen) for params in modules.values()}
        if len(ways) > 1:
            raise AdapterError(
                f"{where}: modules differ in (reduction, frozen components): {sorted(ways)}, "
                "expected one for the whole adapter"
            )
        config["reduction"], frozen = ways.pop()
        if frozen:
            config["frozen_components"] = frozen
    return config


def _places(adapter: ModelAdapter, modules: Modules) -> dict[str, Any]:
    """Targets by suffix where that says it all; whole paths where layers differ among themselves."""
    targets = list(dict.fromkeys(target for _, target in modules))
    path, suffix = adapter.projections.names.path, adapter.projections.suffix
    layers = {target: [n for n, t in modules if t == target] for target in targets}
    inputs = {
        m for m, params in modules.items() if isinstance(params, IA3) and params.side == "input"
    }
    numbers = layers[targets[0]]
    everywhere = numbers == list(range(len(adapter.layers)))
    alike = all(found == numbers for found in layers.values()) and all(
        len({(n, target) in inputs for n in numbers}) == 1 for target in targets
    )
    # IA3Config has no layers_to_transform.
    if alike and (everywhere or adapter.kind != "ia3"):
        places: dict[str, Any] = {"target_modules": [suffix(target) for target in targets]}
        feedforward = [suffix(target) for target in targets if (numbers[0], target) in inputs]
        if not everywhere:
            places["layers_to_transform"] = numbers
    else:
        places = {"target_modules": [path(*module) for module in modules]}
        feedforward = [path(*module) for module in modules if module in inputs]
    if adapter.kind == "ia3":
        places["feedforward_modules"] = feedforward
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


def _alpha(scale: float, divisor: float) -> float:
    """The alpha with ``alpha / divisor == scale``; whole where it can be."""
    near = scale * divisor
    for alpha in (
        float(round(near)),
        near,
        math.nextafter(near, math.inf),
        math.nextafter(near, 0),
    ):
        if alpha / divisor == scale:
            return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha
    return near
