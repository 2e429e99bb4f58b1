"""Next-token cross-entropy, masked per token. Knows nothing of models or optimizers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax


def next_token_loss(
    logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The sum of the masked negative log-likelihoods in nats, and the number of tokens in it.

    ``logits [B, T, V]`` are taken to float32; ``mask [B, T]`` is 1 where a target counts.
    """
    with jax.numpy_dtype_promotion("standard"):
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(
            logits_BTV.astype(jnp.float32), targets_BT
        )
    if mask_BT is None:
        return jnp.sum(nll_BT), jnp.float32(nll_BT.size)
    mask_BT = mask_BT.astype(jnp.float32)
    return jnp.sum(nll_BT * mask_BT), jnp.sum(mask_BT)


def bits_per_byte(nll_nats: float, text_bytes: float) -> float:
    """A total negative log-likelihood as bits per UTF-8 byte of the text it stands for."""
    return nll_nats / math.log(2) / text_bytes
