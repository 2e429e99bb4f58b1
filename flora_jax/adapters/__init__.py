"""Adapters as pure functions over frozen dataclass pytrees. Knows nothing of models or Flax."""

from typing import Any

import jax

from flora_jax.adapters import flora, hira, ia3, lora
from flora_jax.adapters.flora import FLoRA
from flora_jax.adapters.hira import HiRA
from flora_jax.adapters.ia3 import IA3
from flora_jax.adapters.kind import Components, Kind, apply_vmap, stack
from flora_jax.adapters.lora import LoRA
from flora_jax.weights.product import Weight, apply

KINDS: dict[str, Kind] = {kind.name: kind for kind in (lora.KIND, flora.KIND, ia3.KIND, hira.KIND)}
_KIND_OF = {kind.type: kind for kind in KINDS.values()}


def kind_of(params: Any) -> Kind:
    """The kind that a parameter dataclass belongs to."""
    return _KIND_OF[type(params)]


def _apply_uniform(
    params: Any, x_BTI: jax.Array, W_IO: Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """Factors without a batch axis are one adapter's, shared by every row."""
    kind = kind_of(params)
    one_adapter = 1 if kind.name == "ia3" else 2
    if jax.tree.leaves(params)[0].ndim > one_adapter:
        return kind.apply(params, x_BTI, W_IO, bias_O)
    flat_XI = x_BTI.reshape(-1, x_BTI.shape[-1])
    y_XO = kind.apply_one(params, flat_XI, W_IO, bias_O)
    return y_XO.reshape(*x_BTI.shape[:-1], W_IO.shape[1])


for _kind in KINDS.values():
    apply.register(_kind.type, _apply_uniform)

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
