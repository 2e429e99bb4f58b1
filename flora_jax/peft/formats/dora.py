"""DoRA's folder, PEFT's ``LORA`` with ``use_dora``: LoRA's tensors and ``lora_magnitude_vector [O]``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flora_jax.adapters.dora import DoRA
from flora_jax.peft.config import AdapterConfig
from flora_jax.peft.format import Leaf, Module, wide
from flora_jax.peft.formats import lora


def from_tensors(config: AdapterConfig, module: Module, found: Sequence[Any]) -> DoRA:
    down_RI, up_OR, magnitude_O = found
    own = lora.from_tensors(config, module, (down_RI, up_OR))
    return DoRA(own.down_RI, own.up_RO, magnitude_O, own.scale)


def to_tensors(params: DoRA) -> tuple[np.ndarray, ...]:
    return *lora.to_tensors(params), wide(params.magnitude_O)


FORMAT = dataclasses.replace(
    lora.FORMAT,
    kind="dora",
    leaves=(*lora.FORMAT.leaves, Leaf("lora_magnitude_vector", "O")),
    from_tensors=from_tensors,
    to_tensors=to_tensors,
    marks={"use_dora": True},
)
