"""Random adapters of every kind for folder tests, and what it means that two are the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import KINDS
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.peft.read import read_adapter


def read_for(model, folder) -> ModelAdapter:
    return read_adapter(folder, model.config.projections(), model.config.n_layer)


def assert_same(found: ModelAdapter, expected: ModelAdapter) -> None:
    """To the bit, static fields (scale, side, reduction) and settings included."""
    assert found.kind == expected.kind
    assert dict(found.settings) == dict(expected.settings)
    assert jax.tree.structure(found.layers) == jax.tree.structure(expected.layers)
    for a, b in zip(jax.tree.leaves(found.layers), jax.tree.leaves(expected.layers), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_logits_equal(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def random_factors(kind: str, inputs: int, outputs: int, rank: int, rng, **fields) -> Any:
    """Drawn in numpy: jax.random compiles once per shape, which is most of a tiny test's time."""

    def draw(*shape: int) -> jax.Array:
        centre = 1.0 if kind in ("flora", "ia3") else 0.0
        return jnp.asarray(rng.normal(centre, 0.2, shape), jnp.float32)

    if kind == "ia3":
        width = inputs if fields.get("side") == "input" else outputs
        return KINDS[kind].type(draw(width), **fields)
    more = {"magnitude_O": 1 + draw(outputs)} if kind == "dora" else {}
    return KINDS[kind].type(draw(rank, inputs), draw(rank, outputs), **more, **fields)


def some_adapter(kind: str, model, seed: int, **fields) -> ModelAdapter:
    """Ranks, scales and sides that differ over targets and layers, targets that differ too."""
    rng = np.random.default_rng(seed)
    layers = []
    for ranks in ((1, 2, 3, 16), (1, 16, 1)):
        layer = {}
        for target, rank in zip(model.config.projections(), ranks):
            more = dict(fields)
            if kind in ("lora", "dora"):
                more["scale"] = 0.25 + 1 / rank
            if kind == "ia3":
                more["side"] = "input" if target == "mlp.c_proj" else "output"
            # PEFT builds every HiRA module with one rank.
            rank = 4 if kind == "hira" else rank
            widths = model.config.projections()[target]
            layer[target] = random_factors(kind, *widths, rank, rng, **more)
        layers.append(layer)
    return ModelAdapter(kind, tuple(layers), projections=model.config.projections())
