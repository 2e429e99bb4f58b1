"""FLoRA's folder, which PEFT does not know: ``flora_B [R, I]``, ``flora_A [R, O]``, a reduction.

Mind the names: FLoRA's input side is B, LoRA's is A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from flora_jax.adapters.flora import FLoRA, Reduction
from flora_jax.peft.config import AdapterConfig, AdapterError, Fields
from flora_jax.peft.format import Format, Leaf, Module, Modules, Pattern, wide


def from_tensors(config: AdapterConfig, module: Module, found: Sequence[Any]) -> FLoRA:
    frozen = config.own["frozen"]
    if frozen > module.rank:
        raise AdapterError(
            f"{config.path}: frozen_components is {frozen}, {module.path} has rank {module.rank}"
        )
    down_RI, up_RO = found
    return FLoRA(down_RI, up_RO, config.own["reduction"], frozen)


def to_tensors(params: FLoRA) -> tuple[np.ndarray, ...]:
    return wide(params.down_RI), wide(params.up_RO)


def read(fields: Fields) -> dict[str, Any]:
    reduction = fields.raw.get("reduction")
    if reduction not in get_args(Reduction):
        fields.problems.append(f"reduction is {reduction!r}, expected 'mean' or 'sum'")
    frozen = fields.number("frozen_components", int, minimum=0, default=0)
    return {"reduction": reduction, "frozen": frozen}


def write(modules: Modules, settings: Mapping[str, Any], pattern: Pattern) -> dict[str, Any]:
    ways = {(params.reduction, params.frozen) for params in modules.values()}
    if len(ways) > 1:
        raise ValueError(
            f"modules differ in (reduction, frozen components): {sorted(ways)}, "
            "expected one for the whole adapter"
        )
    reduction, frozen = ways.pop()
    return {"reduction": reduction} | ({"frozen_components": frozen} if frozen else {})


FORMAT = Format(
    "flora",
    "FLORA",
    (Leaf("flora_B", "RI"), Leaf("flora_A", "RO")),
    from_tensors,
    to_tensors,
    fields="reduction frozen_components",
    read=read,
    write=write,
    settings="init",
)
