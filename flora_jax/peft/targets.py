"""Which modules of a base model an adapter_config.json means, by PEFT's rules.

Knows module paths (:mod:`flora_jax.adapters.projections`), not arrays or files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

from flora_jax.adapters.projections import ModuleNames, Projections, ends_in
from flora_jax.errors import listing
from flora_jax.peft.config import AdapterConfig, AdapterError

EMBEDDINGS_REFUSED = "embedding/lm_head adapters are not supported"

Value = TypeVar("Value")


def adapted_modules(
    config: AdapterConfig, projections: Projections, n_layer: int
) -> list[tuple[int, str]]:
    """The ``(layer, target)`` pairs that the configuration adapts, in the order of the model.

    A name in ``target_modules`` that is in no layer adapts nothing, as in PEFT, where another one does.

    Raises:
        AdapterError: no target that the base model has, a layer that it does not have, a target that
            is no linear projection of a block, or nothing left to adapt.
    """
    names = projections.names
    if config.targets is None:
        config = dataclasses.replace(config, targets=names.default_targets(config.kind))
    paths = {
        names.path(layer, target): (layer, target)
        for layer in range(n_layer)
        for target in projections
    }
    others = names.other_paths(n_layer)
    if _is_all_linear(config):
        chosen = [path for path in paths if not _excluded(config, path)]
        problems = []
    else:
        chosen = [path for path in paths if _targeted(config, path)]
        problems = [_no_projection(path, names) for path in others if _targeted(config, path)]
    if not chosen and not isinstance(config.targets, str):
        problems += [
            f"target_modules names {name!r}, which is in no layer of the base model"
            for name in config.targets or ()
            if not any(ends_in(path, name) for path in (*paths, *others))
        ]
    problems += [
        f"layers_to_transform names layer {layer}, the base model has {n_layer} layers"
        for layer in config.layers
        if not 0 <= layer < n_layer
    ]
    if not chosen and not problems:
        problems.append(f"target_modules {config.targets!r} leave no module to adapt")
    if problems:
        raise AdapterError(listing(f"{config.path}: target_modules do not fit", problems))
    return [paths[path] for path in chosen]


def may_adapt(config: AdapterConfig, path: str) -> bool:
    """Whether the configuration adapts the module of a path in some base, as far as it can be told
    without one: targets that are left to the base's family may be any.
    """
    if config.targets is None or _is_all_linear(config):
        return not _excluded(config, path)
    return _targeted(config, path)


def pattern_value(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key that matches the end of a module's path, as PEFT looks it up."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def is_feedforward(config: AdapterConfig, module: str, names: ModuleNames) -> bool:
    """Whether IA3 scales this module's input; suffixes need no dot before them here, as in PEFT."""
    feedforward = names.feedforward if config.feedforward is None else config.feedforward
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, module) is not None
    return module.endswith(feedforward)


def is_embedding(tensor: str, names: ModuleNames) -> bool:
    """Whether a tensor's name belongs to the embeddings or the output head."""
    ends = {path.rpartition(".")[2] for path in names.embeddings}
    return not ends.isdisjoint(tensor.split("."))


def _is_all_linear(config: AdapterConfig) -> bool:
    """Whether the targets are PEFT's shorthand for every linear layer but the output layer."""
    return isinstance(config.targets, str) and config.targets.lower() == "all-linear"


def _excluded(config: AdapterConfig, path: str) -> bool:
    if isinstance(config.excluded, str):
        return bool(config.excluded) and re.fullmatch(config.excluded, path) is not None
    return any(ends_in(path, name) for name in config.excluded)


def _targeted(config: AdapterConfig, path: str) -> bool:
    if _excluded(config, path):
        return False
    assert config.targets is not None
    if isinstance(config.targets, str):
        return re.fullmatch(config.targets, path) is not None
    # PEFT does not look at the layer of a module that is named by its whole path.
    if path in config.targets:
        return True
    if not any(ends_in(path, name) for name in config.targets):
        return False
    return not config.layers or _layer_of(config, path) in config.layers


def _layer_of(config: AdapterConfig, path: str) -> int | None:
    expressions = [rf"(?:^|.*?\.){p}\.(?P<layer>\d+)\." for p in config.layers_pattern]
    for expression in expressions or [r".*?\.[^.]*\.(?P<layer>\d+)\."]:
        match = re.match(expression, path)
        if match is not None:
            return int(match["layer"])
    return None


def _no_projection(path: str, names: ModuleNames) -> str:
    if path in names.embeddings:
        return f"target_modules match {path!r}: {EMBEDDINGS_REFUSED}"
    return f"target_modules match {path!r}, which is not a linear projection of a block"
