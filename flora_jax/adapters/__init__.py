"""Adapters as pure functions over frozen dataclass pytrees. Knows nothing of models or Flax.

``registry`` is the table of kinds and needs no JAX; the names below bring it in when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flora_jax.adapters.flora import FLoRA
    from flora_jax.adapters.hira import HiRA
    from flora_jax.adapters.ia3 import IA3
    from flora_jax.adapters.kind import KINDS, Components, Kind, apply_vmap, kind_of, stack
    from flora_jax.adapters.lora import LoRA
    from flora_jax.weights.product import apply

_HOME = {
    "FLoRA": "flora_jax.adapters.flora",
    "HiRA": "flora_jax.adapters.hira",
    "IA3": "flora_jax.adapters.ia3",
    "LoRA": "flora_jax.adapters.lora",
    "apply": "flora_jax.weights.product",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "flora_jax.adapters.kind")), name)


__all__ = [
    "IA3",
    "KINDS",
    "Components",
    "FLoRA",
    "HiRA",
    "Kind",
    "LoRA",
    "apply",
    "apply_vmap",
    "kind_of",
    "stack",
]  # fmt: skip
