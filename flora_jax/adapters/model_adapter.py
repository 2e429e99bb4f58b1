"""One adapter over the layers of a model: which projections it has, with which factors.

Knows nothing of files; of a model it knows its projections (:mod:`flora_jax.adapters.projections`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import IA3, KINDS, kind_of
from flora_jax.adapters.projections import Projections, ends_in, match_targets
from flora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelAdapter:
    """``layers[n][target]`` holds the factors on one projection (``LoRA``, ``FLoRA``, ``IA3`` or
    ``HiRA``, without a batch axis); a projection that the adapter leaves alone is absent.

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

    def rank(self, target: str) -> int:
        """The largest rank on a target over the layers (1 for IA3, 0 where there is none)."""
        return max((rank_of(layer[target]) for layer in self.layers if target in layer), default=0)

    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.layers))

    def bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))


def rank_of(params: Any) -> int:
    """The number of learned components of one projection's factors."""
    if isinstance(params, IA3):
        return 1
    return int(jax.tree.leaves(params)[0].shape[-2])


def init_adapter(
    key: jax.Array,
    kind: str,
    projections: Projections,
    layers: int,
    *,
    rank: int = 1,
    targets: Sequence[str] | None = None,
    feedforward: Sequence[str] | None = None,
    **options: Any,
) -> ModelAdapter:
    """A fresh adapter, the identity, on ``targets`` of every layer; ``options`` go to the kind's
    ``init``. IA3 scales the input of the targets named in ``feedforward``, else the output.

    ``targets`` are PEFT's for LoRA where there are none, ``feedforward`` PEFT's.
    """
    names = projections.names
    if targets is None:
        targets = match_targets(names.default_targets("lora"), projections)
    if feedforward is None:
        ends = names.feedforward
        feedforward = [t for t in projections if any(ends_in(t, end) for end in ends)]
    made = []
    for layer_key in jax.random.split(key, layers):
        layer = {}
        for target_key, target in zip(
            jax.random.split(layer_key, len(targets)), targets, strict=True
        ):
            extra = dict(options)
            if kind == "ia3":
                extra["side"] = "input" if target in feedforward else "output"
            layer[target] = KINDS[kind].init(target_key, *projections[target], rank, **extra)
        made.append(layer)
    return ModelAdapter(kind, tuple(made), projections=projections)


def randomise(adapter: ModelAdapter, seed: int, spread: float = 0.3) -> ModelAdapter:
    """The same shapes with random factors far from the identity, for trials and tests.

    Multiplicative factors are drawn around one, so that the adapted weights keep their size.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.Array, centre: float, scale: float) -> jax.Array:
        return jnp.asarray(rng.normal(centre, scale, leaf.shape), leaf.dtype)

    def redraw(params: Any) -> Any:
        name = kind_of(params).name
        if name in ("flora", "ia3"):
            return jax.tree.map(lambda leaf: draw(leaf, 1.0, spread), params)
        rank, inputs = params.down_RI.shape
        # Additive factors are scaled so that the change is about `spread` of a weight's size.
        size = (spread / (rank * (inputs**0.5 if name == "lora" else 1.0))) ** 0.5
        return jax.tree.map(lambda leaf: draw(leaf, 0.0, size), params)

    layers = tuple({t: redraw(p) for t, p in layer.items()} for layer in adapter.layers)
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
            sides = (
                {params.side: params.l.shape[0]}
                if isinstance(params, IA3)
                else dict(zip(("input", "output"), (x.shape[1] for x in jax.tree.leaves(params))))
            )
            for side, found in sides.items():
                expected = inputs if side == "input" else outputs
                if found != expected:
                    raise InputError(
                        f"{where}: layer {number} {target}: {side} width {found}, "
                        f"the base model has {expected}"
                    )
