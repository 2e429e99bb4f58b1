"""Adapter folders as PEFT has them: read against a base model, described without one, written.

The tensors decide the data, the configuration decides which tensors there must be. Knows a base
model by the widths of its projections and its number of layers only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.adapters.projections import Projections, ends_in
from flora_jax.errors import listing
from flora_jax.peft.config import CONFIG_FILE, AdapterConfig, AdapterError, read_config
from flora_jax.peft.format import FORMATS, Module
from flora_jax.peft.targets import (
    EMBEDDINGS_REFUSED,
    adapted_modules,
    is_embedding,
    is_feedforward,
    may_adapt,
    pattern_value,
)
from flora_jax.peft.tensors import (
    PREFIX,
    read_headers,
    read_tensors,
    tensor_names,
)
from flora_jax.peft.write import write_adapter

# Tensors at fault that a message names: they mostly have one cause.
_SHOWN = 4
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_adapter(directory: str | Path, projections: Projections, n_layer: int) -> ModelAdapter:
    """Reads a folder of any kind for a base of these widths; factors are float32 NumPy arrays.

    ``projections`` are the base model's (``config.projections()``), ``n_layer`` the number of its blocks.

    Raises:
        AdapterError: a missing or damaged file, a configuration that is refused (``read_config``),
            targets that the base does not have, and tensors that are missing, unexpected, of
            another shape or not finite; those are listed together with found and expected shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    own_format = FORMATS[config.kind]
    modules = adapted_modules(config, projections, n_layer)
    path, tensors = read_tensors(directory)
    layers: list[dict[str, Any]] = [{} for _ in range(n_layer)]
    problems = []
    taken: set[str] = set()
    for layer, target in modules:
        path_of = projections.names.path(layer, target)
        names = tensor_names(own_format, path_of)
        taken.update(names)
        found = [tensors.get(name) for name in names]
        patterns = pattern_value(config.rank_pattern, path_of, config.rank)
        first = None if found[0] is None else found[0].shape
        rank = own_format.rank(patterns, config.rank, first)
        on_inputs = own_format.placed_by is not None and is_feedforward(
            config, path_of, projections.names
        )
        sizes = *projections[target], rank, on_inputs
        wrong = [
            line
            for name, array, leaf in zip(names, found, own_format.leaves, strict=True)
            if (line := _problem(name, array, leaf.shape(*sizes)))
        ]
        problems += wrong
        if not wrong:
            arrays = [array for array in found if array is not None]
            module = Module(path_of, rank, on_inputs)
            layers[layer][target] = own_format.from_tensors(config, module, arrays)
    problems += [
        f"{name}: {EMBEDDINGS_REFUSED}"
        if is_embedding(name, projections.names)
        else f"{name}: found shape {tensors[name].shape}, expected no such tensor"
        for name in tensors
        if name not in taken
    ]
    if problems:
        raise AdapterError(
            listing(
                f"{path}: {len(problems)} tensors do not fit the config and the base",
                problems,
                _SHOWN,
            )
        )
    return ModelAdapter(config.kind, tuple(layers), config.settings, projections=projections)


def _problem(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    if array is None:
        return f"{name}: missing, expected shape {shape}"
    if array.shape != shape:
        return f"{name}: found shape {array.shape}, expected {shape}"
    if not np.isfinite(array).all():
        return f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} numbers are not finite"
    return None


@dataclasses.dataclass(frozen=True)
class AdapterSummary:
    """What a folder says of itself; ranks and widths come from the tensors.

    ``ranks`` has the distinct ranks of each target over its layers. ``widths`` has the base's
    (inputs, outputs), ``None`` for the side that no tensor tells. ``unused`` are the names in
    ``target_modules`` that the file holds no tensor for. ``bytes`` and ``dtypes`` are those of the file.
    """

    kind: str
    r: int
    reduction: str | None
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    ranks: dict[str, tuple[int, ...]]
    widths: dict[str, tuple[int | None, int | None]]
    unused: tuple[str, ...]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    base_model_name_or_path: str | None


def describe_adapter(directory: str | Path) -> AdapterSummary:
    """Reads the configuration and the tensors' headers, not the data, and needs no base model.

    Whether the adapter fits a base is told by :func:`read_adapter` only.

    Raises:
        AdapterError: a missing or damaged file, a refused configuration, a tensor of another name
            than this kind of adapter has, or of another rank or module than the configuration has.
    """
    directory = Path(directory)
    config = read_config(directory)
    own_format = FORMATS[config.kind]
    leaves = {leaf.name: leaf for leaf in own_format.leaves}
    path, headers = read_headers(directory)
    # The blocks of any family of models: the first number in the path is the block's.
    ends = "|".join(map(re.escape, leaves))
    name_of = re.compile(rf"{re.escape(PREFIX)}(\D+)\.(\d+)\.(.+)\.({ends})")
    layers: set[int] = set()
    ranks: dict[str, set[int]] = {}
    widths: dict[str, tuple[int | None, int | None]] = {}
    problems = []
    for name, header in headers.items():
        match = name_of.fullmatch(name)
        sizes = match and leaves[match[4]].sizes(header.shape)
        if match is None or sizes is None:
            problems.append(
                f"{name}: shape {header.shape}: not of a {config.kind} adapter's blocks"
            )
            continue
        blocks, layer, target, _ = match.groups()
        module = f"{blocks}.{layer}.{target}"
        names = tensor_names(own_format, module)
        layers.add(int(layer))
        if "R" in sizes or not own_format.has_rank:
            ranks.setdefault(target, set()).add(sizes.get("R", 1))
        inputs, outputs = widths.get(target, (None, None))
        widths[target] = sizes.get("I", inputs), sizes.get("O", outputs)
        problems += [f"{other}: missing beside {name}" for other in names if other not in headers]
        first = headers[names[0]].shape if names[0] in headers else None
        patterns = pattern_value(config.rank_pattern, module, config.rank)
        rank = own_format.rank(patterns, config.rank, first)
        if own_format.has_rank and sizes.get("R", rank) != rank:
            problems.append(f"{name}: found rank {sizes['R']}, {CONFIG_FILE} says {rank}")
        elif not may_adapt(config, module):
            problems.append(f"{name}: {CONFIG_FILE} names no such target")
    if problems:
        raise AdapterError(
            listing(
                f"{path}: {len(problems)} tensors are unknown, missing or not of the config",
                problems,
                _SHOWN,
            )
        )
    sizes = {name: int(np.prod(header.shape)) for name, header in headers.items()}
    return AdapterSummary(
        kind=config.kind,
        r=config.rank,
        reduction=config.own.get("reduction"),
        targets=tuple(sorted(ranks)),
        layers=tuple(sorted(layers)),
        ranks={target: tuple(sorted(ranks[target])) for target in sorted(ranks)},
        widths={target: widths[target] for target in sorted(widths)},
        unused=_unused(config, headers),
        parameters=sum(sizes.values()),
        bytes=sum(size * _ITEM_BYTES[headers[name].dtype] for name, size in sizes.items()),
        dtypes=tuple(sorted({header.dtype for header in headers.values()})),
        base_model_name_or_path=config.settings.get("base_model_name_or_path"),
    )


def _unused(config: AdapterConfig, headers: Mapping[str, Any]) -> tuple[str, ...]:
    if config.targets is None or isinstance(config.targets, str):
        return ()
    leaves = [f".{leaf.name}" for leaf in FORMATS[config.kind].leaves]
    paths = [name.removeprefix(PREFIX).removesuffix(leaf) for name in headers for leaf in leaves]
    return tuple(n for n in config.targets if not any(ends_in(path, n) for path in paths))


__all__ = [
    "AdapterError",
    "AdapterSummary",
    "describe_adapter",
    "read_adapter",
    "write_adapter",
]  # fmt: skip
