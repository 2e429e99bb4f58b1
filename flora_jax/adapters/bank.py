"""The bank: all resident adapters' components stacked per layer and target, and who owns which.

The host side (names, slots, pair lists) is plain Python and NumPy; the device side is a pytree of
``TargetBank``. A target that no resident adapter touches is absent, and keeps its plain product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import kind_of
from flora_jax.adapters.kind import Components, ones, zeros
from flora_jax.adapters.model_adapter import TARGETS, ModelAdapter, check_fits
from flora_jax.adapters.ragged import IDENTITY, TargetBank


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where one adapter's components lie on one target; ``multiplicative`` has at least one."""

    multiplicative: tuple[int, ...] = (IDENTITY,)
    additive: tuple[int, ...] = ()
    bias: int = 0


BASE = Slots()


@dataclasses.dataclass(frozen=True)
class Bank:
    """``layers[n][target]`` on the device; ``slots[name][target]`` on the host (name ``None``: base).

    Slots are the same in every layer: where an adapter has a lower rank in some layer, or none, the
    rest of its slots there hold zeros, and its first the identity.
    """

    layers: tuple[dict[str, TargetBank], ...]
    slots: Mapping[str | None, Mapping[str, Slots]]
    targets: tuple[str, ...]

    def of(self, name: str | None, target: str) -> Slots:
        """Raises ``KeyError`` for an adapter that is not resident."""
        return self.slots[name].get(target, BASE)

    def most(self, target: str) -> tuple[int, int]:
        """The largest number of multiplicative and of additive components of one adapter."""
        owned = [self.of(name, target) for name in self.slots]
        return max(len(s.multiplicative) for s in owned), max(len(s.additive) for s in owned)


def _padded(components: Components, multiplicative: int, additive: int) -> Components:
    """Fills up with components of zeros to the given numbers."""

    def fill(array: np.ndarray, rows: int) -> np.ndarray:
        return np.pad(array, ((0, rows - array.shape[0]), (0, 0)))

    return Components(
        fill(components.pre_RI, multiplicative),
        fill(components.post_RO, multiplicative),
        fill(components.down_RI, additive),
        fill(components.up_RO, additive),
        components.bias_scale_O,
    )


def _identity(inputs: int, outputs: int) -> Components:
    return Components(ones(1, inputs), ones(1, outputs), zeros(0, inputs), zeros(0, outputs))


def build_bank(
    adapters: Mapping[str, ModelAdapter], projections: Mapping[str, tuple[int, int]], layers: int
) -> Bank:
    """Stacks the adapters' components, float32.

    Args:
        adapters: by the name that requests use.
        projections: ``{target: (I, O)}`` of the base model.
        layers: the base model's number of layers.

    Raises:
        ValueError: an adapter's width or number of layers is not the base model's.
    """
    for name, adapter in adapters.items():
        check_fits(adapter, projections, layers, f"adapter {name!r}")
    targets = tuple(t for t in TARGETS if any(t in a.targets() for a in adapters.values()))
    slots: dict[str | None, dict[str, Slots]] = {None: {}, **{name: {} for name in adapters}}
    stacks: list[dict[str, TargetBank]] = [{} for _ in range(layers)]
    for target in targets:
        inputs, outputs = projections[target]
        zero_I, zero_O = zeros(1, inputs), zeros(1, outputs)
        identity = _identity(inputs, outputs)
        parts: list[list[Components]] = [[] for _ in range(layers)]
        taken_mul, taken_add, taken_bias = 2, 1, 1
        for name, adapter in adapters.items():
            if target not in adapter.targets():
                continue
            own = [
                kind_of(layer[target]).components(layer[target], inputs, outputs)
                if target in layer
                else identity
                for layer in adapter.layers
            ]
            mul = max(c.pre_RI.shape[0] for c in own)
            add = max(c.down_RI.shape[0] for c in own)
            touches_bias = any(c.bias_scale_O is not None for c in own)
            slots[name][target] = Slots(
                tuple(range(taken_mul, taken_mul + mul)),
                tuple(range(taken_add, taken_add + add)),
                taken_bias if touches_bias else 0,
            )
            taken_mul, taken_add = taken_mul + mul, taken_add + add
            taken_bias += touches_bias
            for number, components in enumerate(own):
                padded = _padded(components, mul, add)
                if touches_bias and padded.bias_scale_O is None:
                    padded = dataclasses.replace(padded, bias_scale_O=zero_O[0])
                parts[number].append(padded)
        for number, found in enumerate(parts):
            scales = [c.bias_scale_O[None] for c in found if c.bias_scale_O is not None]
            stacks[number][target] = TargetBank(
                jnp.asarray(np.concatenate([zero_I, identity.pre_RI, *(c.pre_RI for c in found)])),
                jnp.asarray(
                    np.concatenate([zero_O, identity.post_RO, *(c.post_RO for c in found)])
                ),
                jnp.asarray(np.concatenate([zero_I, *(c.down_RI for c in found)])),
                jnp.asarray(np.concatenate([zero_O, *(c.up_RO for c in found)])),
                jnp.asarray(np.concatenate([zero_O, *scales])) if scales else None,
            )
    return Bank(tuple(stacks), slots, targets)
