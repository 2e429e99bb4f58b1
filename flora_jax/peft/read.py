"""Adapter folders as PEFT has them: read against a base model, described without one, written.

The tensors decide the data, the configuration decides which tensors there must be. Knows a base
model by the widths of its projections and its number of layers only.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import IA3, FLoRA, HiRA, LoRA
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.adapters.projections import Projections
from flora_jax.errors import listing
from flora_jax.peft.config import AdapterConfig, AdapterError, read_config
from flora_jax.peft.targets import (
    EMBEDDINGS_REFUSED,
    adapted_modules,
    is_embedding,
    is_feedforward,
    pattern_value,
)
from flora_jax.peft.tensors import (
    LEAVES,
    PREFIX,
    read_headers,
    read_tensors,
    tensor_names,
    tensor_shapes,
)
from flora_jax.peft.write import write_adapter

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_adapter(directory: str | Path, projections: Projections, n_layer: int) -> ModelAdapter:
    """Reads a LoRA, IA3, HiRA or FLoRA folder for a base of these widths; factors in float32.

    ``projections`` are the base model's (``config.projections()``), ``n_layer`` the number of its blocks.

    Raises:
        AdapterError: a missing or damaged file, a configuration that is refused (``read_config``),
            targets that the base does not have, and tensors that are missing, unexpected, of
            another shape or not finite; those are listed together with found and expected shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    modules = adapted_modules(config, projections, n_layer)
    path, tensors = read_tensors(directory)
    layers: list[dict[str, Any]] = [{} for _ in range(n_layer)]
    problems = []
    taken: set[str] = set()
    for layer, target in modules:
        module = projections.names.path(layer, target)
        names = tensor_names(config.kind, module)
        taken.update(names)
        found = [tensors.get(name) for name in names]
        rank = _rank(config, module, found[0])
        feedforward = config.kind == "ia3" and is_feedforward(config, module, projections.names)
        shapes = tensor_shapes(config.kind, *projections[target], rank, feedforward)
        wrong = [
            line
            for name, array, shape in zip(names, found, shapes, strict=True)
            if (line := _problem(name, array, shape))
        ]
        problems += wrong
        if not wrong:
            layers[layer][target] = _factors(config, module, found, rank, feedforward)
    problems += [
        f"{name}: {EMBEDDINGS_REFUSED}"
        if is_embedding(name, projections.names)
        else f"{name}: found shape {tensors[name].shape}, expected no such tensor"
        for name in tensors
        if name not in taken
    ]
    if problems:
        raise AdapterError(
            listing(f"{path}: {len(problems)} tensors do not fit the config and the base", problems)
        )
    return ModelAdapter(config.kind, tuple(layers), config.settings, projections=projections)


def _rank(config: AdapterConfig, module: str, first: np.ndarray | None) -> int:
    rank = pattern_value(config.rank_pattern, module, config.rank)
    # PEFT 0.21 saves HiRA's rank_pattern but builds every module with r; a HiRA has no scale, so
    # that both are read alike.
    if config.kind == "hira" and first is not None and first.shape[:1] == (config.rank,):
        return config.rank
    return rank


def _problem(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    if array is None:
        return f"{name}: missing, expected shape {shape}"
    if array.shape != shape:
        return f"{name}: found shape {array.shape}, expected {shape}"
    if not np.isfinite(array).all():
        return f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} numbers are not finite"
    return None


def _factors(
    config: AdapterConfig, module: str, found: list[Any], rank: int, feedforward: bool
) -> Any:
    if config.kind == "ia3":
        return IA3(jnp.array(found[0].reshape(-1)), "input" if feedforward else "output")
    inward, outward = found
    if config.kind == "flora":
        if config.frozen > rank:
            raise AdapterError(
                f"{config.path}: frozen_components is {config.frozen}, {module} has rank {rank}"
            )
        return FLoRA(jnp.array(inward), jnp.array(outward), config.reduction, config.frozen)
    if config.kind == "hira":
        return HiRA(jnp.array(inward), jnp.array(outward.T))
    alpha = pattern_value(config.alpha_pattern, module, config.alpha)
    return LoRA(jnp.array(inward), jnp.array(outward.T), config.scale(alpha, rank))


@dataclasses.dataclass(frozen=True)
class AdapterSummary:
    """What a folder says of itself; ranks and widths come from the tensors.

    ``ranks`` has the distinct ranks of each target over its layers. ``widths`` has the base's
    (inputs, outputs), ``None`` for the side that an IA3 vector does not tell. ``bytes`` and
    ``dtypes`` are those of the file.
    """

    kind: str
    r: int
    reduction: str | None
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    ranks: dict[str, tuple[int, ...]]
    widths: dict[str, tuple[int | None, int | None]]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    base_model_name_or_path: str | None


def describe_adapter(directory: str | Path) -> AdapterSummary:
    """Reads the configuration and the tensors' headers, not the data, and needs no base model.

    Whether the adapter fits a base is told by :func:`read_adapter` only.

    Raises:
        AdapterError: a missing or damaged file, a refused configuration, a tensor of another name
            or rank than this kind of adapter has.
    """
    directory = Path(directory)
    config = read_config(directory)
    path, headers = read_headers(directory)
    # The blocks of any family of models: the first number in the path is the block's.
    leaves = "|".join(map(re.escape, LEAVES[config.kind]))
    name_of = re.compile(rf"{re.escape(PREFIX)}(\D+)\.(\d+)\.(.+)\.({leaves})")
    layers: set[int] = set()
    ranks: dict[str, set[int]] = {}
    widths: dict[str, tuple[int | None, int | None]] = {}
    problems = []
    for name, header in headers.items():
        match = name_of.fullmatch(name)
        if match is None or len(header.shape) != 2:
            problems.append(
                f"{name}: shape {header.shape}: not of a {config.kind} adapter's blocks"
            )
            continue
        blocks, layer, target, leaf = match.groups()
        layers.add(int(layer))
        rank, width, inward = _sides(config.kind, leaf, header.shape)
        ranks.setdefault(target, set()).add(rank)
        inputs, outputs = widths.get(target, (None, None))
        widths[target] = (width, outputs) if inward else (inputs, width)
        others = tensor_names(config.kind, f"{blocks}.{layer}.{target}")
        problems += [f"{other}: missing beside {name}" for other in others if other not in headers]
    if problems:
        raise AdapterError(
            listing(f"{path}: {len(problems)} tensors are unknown or missing", problems)
        )
    sizes = {name: int(np.prod(header.shape)) for name, header in headers.items()}
    return AdapterSummary(
        kind=config.kind,
        r=config.rank,
        reduction=config.reduction if config.kind == "flora" else None,
        targets=tuple(sorted(ranks)),
        layers=tuple(sorted(layers)),
        ranks={target: tuple(sorted(ranks[target])) for target in sorted(ranks)},
        widths={target: widths[target] for target in sorted(widths)},
        parameters=sum(sizes.values()),
        bytes=sum(size * _ITEM_BYTES[headers[name].dtype] for name, size in sizes.items()),
        dtypes=tuple(sorted({header.dtype for header in headers.values()})),
        base_model_name_or_path=config.settings.get("base_model_name_or_path"),
    )


def _sides(kind: str, leaf: str, shape: tuple[int, ...]) -> tuple[int, int, bool]:
    """``(rank, width, whether the width is the input's)`` of one tensor."""
    if kind == "ia3":
        return 1, max(shape), shape[0] == 1
    inward = leaf == LEAVES[kind][0]
    rank, width = shape if inward or kind == "flora" else shape[::-1]
    return rank, width, inward


__all__ = [
    "AdapterError",
    "AdapterSummary",
    "describe_adapter",
    "read_adapter",
    "write_adapter",
]  # fmt: skip
