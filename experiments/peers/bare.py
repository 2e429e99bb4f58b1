"""The weight products of a decode step alone: what no engine of ours can be faster than.

Every projection and the head as products of B rows over the same weights, each waiting for the one
before as in the model, all steps in one loop on the device; no norms, biases, attention, activations or
sampling. The prefill has B times the prompt's rows, and B in the head. See protocol.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import protocol


def main(say: Callable[[dict[str, Any]], None]) -> None:
    options = protocol.read_options()
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flora_jax.starcoder.checkpoint import load_model

    loaded = load_model(options.model, "float32")
    width = loaded.config.n_embd

    @jax.jit
    def products(params: Any, x_XD: jax.Array, last_B: jax.Array, steps: int) -> Any:
        model = nnx.merge(loaded.graph, params)

        def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # Kept at one length, or it would overflow in a few steps.
            x_XD = carry[0] / jnp.linalg.norm(carry[0])
            for block in model.h:
                mixed = x_XD @ block.attn.c_attn.kernel[...]
                x_XD = x_XD + mixed[:, :width] @ block.attn.c_proj.kernel[...]
                x_XD = x_XD + x_XD @ block.mlp.c_fc.kernel[...] @ block.mlp.c_proj.kernel[...]
            return x_XD, model.logits(x_XD[last_B])

        # Carried, so that each step's are computed, into one buffer.
        logits_BV = jnp.zeros((last_B.shape[0], loaded.config.vocab_size))
        return jax.lax.fori_loop(0, steps, step, (x_XD, logits_BV))

    def seconds(rows: int, tokens: int, steps: int) -> float:
        x_XD = jax.random.normal(jax.random.key(0), (rows * tokens, width))
        last_B = (jnp.arange(rows) + 1) * tokens - 1
        jax.block_until_ready((x_XD, last_B))
        started = time.perf_counter()
        jax.block_until_ready(products(loaded.params, x_XD, last_B, steps))
        return time.perf_counter() - started

    def measure(number: int, rows: int) -> dict[str, Any]:
        prefill = seconds(rows, options.prompt_len, 1)
        decode = seconds(rows, 1, options.new_tokens - 1)
        return {"prefill_seconds": prefill, "total_seconds": prefill + decode}

    for rows in options.batches:
        measure(0, rows)
    protocol.serve_rounds(say, options, {"versions": protocol.versions("jax")}, measure)


if __name__ == "__main__":
    protocol.run(main)
