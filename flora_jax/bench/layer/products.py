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

from flora_jax.models.starcoder.model import Model
from flora_jax.weights.product import product


def products_alone(model: Model, rows: int, tokens: int, steps: int) -> Callable[[], Any]:
    """A program of ``steps`` passes over ``rows`` of ``tokens``, with logits for the last of each row."""
    width = model.config.n_embd

    @jax.jit
    def products(params: Any, x_XD: jax.Array, last_B: jax.Array, steps: int) -> Any:
        whole = nnx.merge(model.graph, params)

        def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # Kept at one length, or it would overflow in a few steps.
            x_XD = carry[0] / jnp.linalg.norm(carry[0])
            for block in whole.h:
                mixed = product(x_XD, block.attn.c_attn.kernel[...])
                x_XD = x_XD + product(mixed[:, :width], block.attn.c_proj.kernel[...])
                wide = product(x_XD, block.mlp.c_fc.kernel[...])
                x_XD = x_XD + product(wide, block.mlp.c_proj.kernel[...])
            return x_XD, whole.logits(x_XD[last_B])

        # Carried, so that each step's are computed, into one buffer.
        logits_BV = jnp.zeros((last_B.shape[0], model.config.vocab_size))
        return jax.lax.fori_loop(0, steps, step, (x_XD, logits_BV))

    x_XD = jax.random.normal(jax.random.key(0), (rows * tokens, width))
    last_B = (jnp.arange(rows) + 1) * tokens - 1
    jax.block_until_ready((x_XD, last_B))
    return lambda: products(model.params, x_XD, last_B, steps)
