"""The weight products of a pass alone: what no engine over the same weights can be faster than.

Every projection and the head as products of so many rows, each waiting for the one before as in the
model, all steps in one loop on the device; no norms, biases, attention, activations or sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.family import family_of
from flora_jax.models.model import Model
from flora_jax.models.sharding import named_leaves
from flora_jax.weights.product import product


def products_alone(model: Model, rows: int, tokens: int, steps: int) -> Callable[[], Any]:
    """A program of ``steps`` passes over ``rows`` of ``tokens``, with logits for the last of each row."""
    family = family_of(model.config)
    kernels = [path for path in family.tensors(model.config) if family.is_kernel(path)]
    width = model.config.hidden_size

    @jax.jit
    def products(params: Any, x_XD: jax.Array, last_B: jax.Array, steps: int) -> Any:
        whole = nnx.merge(model.graph, params)
        held, _ = named_leaves(params)

        def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # Kept at one length, or it would overflow in a few steps.
            x_XD = carry[0] / jnp.linalg.norm(carry[0])
            y_XO = x_XD
            for path in kernels:
                y_XO = product(_cut(y_XO, held[path].shape[0]), held[path])
            x_XD = x_XD + _cut(y_XO, width)
            return x_XD, whole.logits(x_XD[last_B])

        # Carried, so that each step's are computed, into one buffer.
        logits_BV = jnp.zeros((last_B.shape[0], model.config.vocab_size))
        return jax.lax.fori_loop(0, steps, step, (x_XD, logits_BV))

    x_XD = jax.random.normal(jax.random.key(0), (rows * tokens, width))
    last_B = (jnp.arange(rows) + 1) * tokens - 1
    jax.block_until_ready((x_XD, last_B))
    return lambda: products(model.params, x_XD, last_B, steps)


def _cut(x_XI: jax.Array, width: int) -> jax.Array:
    """So many of the features, zeros where there are fewer."""
    missing = max(0, width - x_XI.shape[1])
    return jnp.pad(x_XI[:, :width], ((0, 0), (0, missing))) if missing else x_XI[:, :width]
