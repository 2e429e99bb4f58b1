"""The engine's own programs and shapes for a plan's setting, with shapes in place of arrays.

The one place of this room that knows how an engine is made. Knows nothing of compilers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.mixing.bank import Count, Slots
from flora_jax.models.model import Model, abstract_model
from flora_jax.models.quantize import quantize_abstract
from flora_jax.models.sharding import partition_specs, place_abstract
from flora_jax.plan.setting import Setting
from flora_jax.platforms import GPU
from flora_jax.serve.ahead import abstract_device, lower_for
from flora_jax.serve.device import Device
from flora_jax.serve.options import EngineOptions
from flora_jax.weights.quantized import Method

_HLO_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "s8", "uint8": "u8"}


class Residents:
    """Adapters that are all alike, each resident; a row is under one of them by any name."""

    def __init__(self, setting: Setting):
        self.targets = tuple(setting.room())
        self._counts = {target: setting.count(target)[:2] for target in self.targets}

    def most(self, target: str) -> tuple[int, int]:
        """See :class:`flora_jax.mixing.bank.Residents`."""
        return self._counts[target]

    def of(self, name: Any, target: str) -> Slots:
        """See :class:`flora_jax.mixing.bank.Residents`."""
        multiplicative, additive = self._counts[target]
        return Slots(tuple(range(2, 2 + multiplicative)), tuple(range(1, 1 + additive)))


def options_of(setting: Setting, **more: Any) -> EngineOptions:
    """The engine's options."""
    return EngineOptions(
        max_num_seqs=setting.max_num_seqs,
        max_model_len=setting.context,
        block_size=setting.block_size,
        **more,
    )


def model_of(setting: Setting) -> Model:
    """The model's shapes and dtypes."""
    model = abstract_model(setting.config, jnp.dtype(setting.dtype))
    if setting.quantize == "none":
        return model
    return quantize_abstract(model, cast(Method, setting.quantize))


def device_of(setting: Setting, mesh: Any = None) -> Device:
    """The engine's device with a GPU's choices, shapes in place of arrays; cut over a mesh, if any."""
    most = {target: Count(*setting.count(target)) for target in setting.room()}
    model = model_of(setting)
    if mesh is not None:
        model = place_abstract(model, mesh)
    return abstract_device(model, options_of(setting), GPU, most, setting.residents)


def decode(setting: Setting, sharding: Any) -> Callable[[], Any]:
    """What lowers a decode step, sampling apart, in which every row has an adapter and looks at the
    whole context.
    """
    mesh = sharding.mesh if setting.devices > 1 else None
    programs = lower_for(device_of(setting, mesh), sharding)
    # Listed from the fewest adapters and the shortest span to the most.
    return [lower for name, lower in programs.items() if name.startswith("forward ")][-1]


def weight_shapes(setting: Setting) -> set[tuple[str, tuple[int, ...]]]:
    """HLO's dtype and the dimensions of every projection's kernel as one device holds it, and of the
    embedding.
    """
    found: set[tuple[str, tuple[int, ...]]] = set()
    model = model_of(setting)
    cuts = jax.tree.leaves(partition_specs(model.params, setting.family.axes))
    for leaf, cut in zip(jax.tree.leaves(model.params), cuts, strict=True):
        if len(leaf.shape) == 2 and min(leaf.shape) > setting.max_num_seqs:
            part = (
                n // setting.devices if axis and n % setting.devices == 0 else n
                for n, axis in zip(leaf.shape, cut)
            )
            found.add((_HLO_DTYPES[np.dtype(leaf.dtype).name], tuple(part)))
    return found
