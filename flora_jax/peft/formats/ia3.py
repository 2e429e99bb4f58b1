"""IA3's folder, PEFT's ``IA3``: ``ia3_l`` is ``[O, 1]``, or ``[1, I]`` on feed-forward modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flora_jax.adapters.ia3 import IA3
from flora_jax.peft.config import AdapterConfig
from flora_jax.peft.format import Format, Leaf, Module, wide


def from_tensors(config: AdapterConfig, module: Module, found: Sequence[Any]) -> IA3:
    return IA3(found[0].reshape(-1), "input" if module.on_inputs else "output")


def on_inputs(params: IA3) -> bool:
    return params.side == "input"


def to_tensors(params: IA3) -> tuple[np.ndarray, ...]:
    vector = wide(params.l)
    return (vector[None] if on_inputs(params) else vector[..., None],)


FORMAT = Format(
    "ia3",
    "IA3",
    (Leaf("ia3_l", "O1", on_inputs="1I"),),
    from_tensors,
    to_tensors,
    settings="init_ia3_weights",
    has_rank=False,
    placed_by="feedforward_modules",
    on_inputs=on_inputs,
)
