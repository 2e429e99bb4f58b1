"""HiRA's folder, PEFT's ``HIRA``: ``hira_A [R, I]``, ``hira_B [O, R]``, no scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flora_jax.adapters.hira import HiRA
from flora_jax.peft.config import AdapterConfig
from flora_jax.peft.format import Format, Leaf, Module, wide


def from_tensors(config: AdapterConfig, module: Module, found: Sequence[Any]) -> HiRA:
    down_RI, up_OR = found
    return HiRA(down_RI, up_OR.T)


def to_tensors(params: HiRA) -> tuple[np.ndarray, ...]:
    return wide(params.down_RI), wide(params.up_RO).swapaxes(-1, -2)


def rank(patterns: int, r: int, first: tuple[int, ...] | None) -> int:
    """PEFT 0.21 saves HiRA's rank_pattern but builds every module with r; a HiRA has no scale, so that
    both are read alike.
    """
    return r if first is not None and first[:1] == (r,) else patterns


FORMAT = Format(
    "hira",
    "HIRA",
    (Leaf("hira_A", "RI"), Leaf("hira_B", "OR")),
    from_tensors,
    to_tensors,
    settings="hira_dropout init_weights",
    rank=rank,
)
