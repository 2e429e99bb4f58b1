"""One adapter over the layers of a model: which projections it has, with which factors.

Knows nothing of files; of a model it knows its projections (:mod:`flora_jax.adapters.projections`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.kind import KINDS, kind_of
from flora_jax.adapters.projections import Projections, ends_in, match_targets
from flora_jax.errors import InputError
from flora_jax.weights.product import Weight

# Gives the base weight of a layer and target, as it is held.
WeightsOf = Callable[[int, str], Weight]


@dataclasses.dataclass(frozen=True)
class ModelAdapter:
    """``layers[n][target]`` holds the factors on one projection (the dataclass of ``kind``, without a
    batch axis); a projection that the adapter leaves alone is absent.

    ``settings`` are the fields of adapter_config.json that do not change the forward pass but belong
    to the adapter (dropout, the base model's name, how it started). ``projections`` are those of the
    base model, whose names and order are the adapter's.

    Raises:
        ValueError: factors of another kind, or on a projection that the base does not have.
    """

    kind: str
    layers: tuple[dict[str, Any], ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    projections: Projections = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        expected = KINDS[self.kind].type
        for number, layer in enumerate(self.layers):
            for target, params in layer.items():
                if target not in self.projections or type(params) is not expected:
                    raise ValueError(
                        f"layer {number}: {type(params).__name__} on {target!r}, expected "
                        f"{expected.__name__} on one of {', '.join(self.projections)}"
                    )

    def targets(self) -> tuple[str, ...]:
        """The projections adapted in at least one layer, in the order of the block."""
        return tuple(t for t in self.projections if any(t in layer for layer in self.layers))

    def modules(self) -> dict[tuple[int, str], Any]:
        """The factors of every projection that is adapted, by layer and target."""
        return {
            (layer, target): params
            for layer, targets in enumerate(self.layers)
            for target, params in targets.items()
        }

    def rank(self, target: str) -> int:
        """The largest rank on a target over the layers (1 for IA3, 0 where there is none)."""
        return max((rank_of(layer[target]) for layer in self.layers if target in layer), default=0)

    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.layers))

    def bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))


def rank_of(params: Any) -> int:
    """The number of learned components of one projection's factors."""
    return kind_of(params).rank(params)


def init_adapter(
    key: jax.Array,
    kind: str,
    projections: Projections,
    layers: int,
    *,
    rank: int = 1,
    targets: Sequence[str] | None = None,
    feedforward: Sequence[str] | None = None,
    weights: WeightsOf | None = None,
    **options: Any,
) -> ModelAdapter:
    """A fresh adapter, the identity, on ``targets`` of every layer.

    Args:
        key: of all random numbers.
        kind: a name of :data:`~flora_jax.adapters.kind.KINDS`.
        projections: of the base.
        layers: of the base.
        rank: the number of learned components.
        targets: full names of the projections; PEFT's for LoRA by default.
        feedforward: those whose input is scaled, not the output, by a kind that scales one of them;
            PEFT's by default.
        weights: gives the base's weights, for a kind whose start depends on them.
        options: of the kind's ``init``.

    Raises:
        ValueError: the kind cannot have this rank or these options, or needs ``weights``.
    """
    names = projections.names
    if targets is None:
        targets = match_targets(names.default_targets("lora"), projections)
    if feedforward is None:
        ends = names.feedforward
        feedforward = [t for t in projections if any(ends_in(t, end) for end in ends)]
    made, own_kind = [], KINDS[kind]
    for number, layer_key in enumerate(jax.random.split(key, layers)):
        layer = {}
        for target_key, target in zip(
            jax.random.split(layer_key, len(targets)), targets, strict=True
        ):
            layer[target] = own_kind.init(
                target_key, *projections[target], rank,
                weight=None if weights is None else partial(weights, number, target),
                **own_kind.placed(target in feedforward), **options,
            )  # fmt: skip
        made.append(layer)
    return ModelAdapter(kind, tuple(made), projections=projections)


def abstract_adapter(
    kind: str, projections: Projections, layers: int, **options: Any
) -> ModelAdapter:
    """:func:`init_adapter` with shapes in place of arrays: nothing is computed, no weight is needed."""

    def made() -> tuple[dict[str, Any], ...]:
        def weights(layer: int, target: str) -> Weight:
            return jnp.zeros(projections[target])

        key = jax.random.key(0)
        return init_adapter(key, kind, projections, layers, weights=weights, **options).layers

    return ModelAdapter(kind, jax.eval_shape(made), projections=projections)


def randomise(adapter: ModelAdapter, seed: int, spread: float = 0.3) -> ModelAdapter:
    """The same shapes with random factors far from the identity, for trials and tests.

    Only the shapes and dtypes of ``adapter`` count: it may come from :func:`abstract_adapter`.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.Array, centre: float, scale: float) -> jax.Array:
        return jnp.asarray(rng.normal(centre, scale, leaf.shape), leaf.dtype)

    layers = tuple(
        {t: kind_of(p).redraw(p, draw, spread) for t, p in layer.items()}
        for layer in adapter.layers
    )
    return dataclasses.replace(adapter, layers=layers)


def check_fits(
    adapter: ModelAdapter, projections: Mapping[str, tuple[int, int]], layers: int, where: str
) -> None:
    """Raises ``InputError`` unless every factor has the width of the base model's projection."""
    if len(adapter.layers) != layers:
        raise InputError(f"{where}: adapter of {len(adapter.layers)} layers, base has {layers}")
    for number, layer in enumerate(adapter.layers):
        for target, params in layer.items():
            inputs, outputs = projections[target]
            for side, found in kind_of(params).widths(params):
                expected = inputs if side == "input" else outputs
                if found != expected:
                    raise InputError(
                        f"{where}: layer {number} {target}: {side} width {found}, "
                        f"the base model has {expected}"
                    )
