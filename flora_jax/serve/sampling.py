"""The next token of every row from its logits, under the row's own settings and its own key.

Whether a row is sampled alone or among others, its draw has the same bits: keys are per row, and a
setting that is off leaves the logits untouched.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

# What the rows of a batch need at most; each is its own program, and a row's result is the same in
# all that can do it. Sorting the vocabulary, for top-k and top-p, is most of the cost.
Mode = Literal["greedy", "sampled", "filtered"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings per row: ``temperature [B]`` (0 is greedy), ``top_k [B]`` int32 (0 is off),
    ``top_p [B]`` (1 is off), and typed keys ``[B]``.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    key_B: jax.Array


def keep_likely(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Sets to ``-inf`` what is not among the ``top_k`` largest, then what is not in the smallest set
    whose probability (after the first cut) reaches ``top_p``. Ties at a threshold stay.
    """
    vocabulary = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    last_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, vocabulary), vocabulary) - 1
    within_BV = jnp.arange(vocabulary)[None] <= last_B[:, None]
    probabilities_BV = jax.nn.softmax(jnp.where(within_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # The rounding of a sum near one must not cut anything where top_p is off.
    nucleus_BV = (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1.0)
    kept_B = jnp.sum(within_BV & nucleus_BV, axis=-1)
    threshold_B1 = jnp.take_along_axis(sorted_BV, jnp.maximum(kept_B, 1)[:, None] - 1, axis=-1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def sample(logits_BV: jax.Array, settings: Sampling, drawn_B: jax.Array, mode: Mode) -> jax.Array:
    """Token ids ``[B]``, int32.

    ``logits [B, V]`` are float32; ``drawn [B]`` counts the tokens a row has drawn before, and picks
    the randomness of this one.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if mode == "greedy":
        return greedy_B
    warm_B = jnp.maximum(settings.temperature_B, 1e-6)
    scaled_BV = logits_BV / warm_B[:, None]
    if mode == "filtered":
        scaled_BV = keep_likely(scaled_BV, settings.top_k_B, settings.top_p_B)

    def draw(key: jax.Array, drawn: jax.Array, scaled_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, drawn), scaled_V)

    drawn = jax.vmap(draw)(settings.key_B, drawn_B, scaled_BV).astype(jnp.int32)
    return jnp.where(settings.temperature_B > 0, drawn, greedy_B)
