"""Small valid adapter folders, and edits that break them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flora_jax.adapters.model_adapter import ModelAdapter, abstract_adapter, randomise
from flora_jax.adapters.registry import TRAITS
from flora_jax.peft.read import AdapterError, read_adapter
from tests.helpers.random_adapters import projections_of

PROJECTIONS = projections_of(
    {
        "attn.c_attn": (8, 12),
        "attn.c_proj": (8, 8),
        "mlp.c_fc": (8, 20),
        "mlp.c_proj": (20, 8),
    }
)
STEM = "base_model.model.transformer.h."
C_ATTN = STEM + "0.attn.c_attn."


def make(kind: str, rank: int = 2, targets=("attn.c_attn", "mlp.c_proj")) -> ModelAdapter:
    shapes = abstract_adapter(kind, PROJECTIONS, 2, rank=TRAITS[kind].rank(rank), targets=targets)
    return randomise(shapes, 0)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    change(tensors)
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, path)


def error_of(folder: Path, n_layer: int = 2, projections=PROJECTIONS) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, projections, n_layer)
    assert str(folder) in str(caught.value)
    return str(caught.value)
