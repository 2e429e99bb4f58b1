"""The next token of every row from its logits, under the row's own settings and its own key.

Whether a row is sampled alone or among others, its draw has the same bits: keys are per row, and a
setting that is off leaves the logits untouched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp


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


# How tokens are drawn. "window" does for every request and passes over on the device what none asks for,
# which a GPU would wait for. "digits" does for every request too, without a sort and without a branch.
# "plain" is that without top-k and top-p, "greedy" the largest logit alone. Those that do for a request
# give it the same token, but for the last bits of a probability at the edge of top-p.
Draw = Literal["window", "digits", "plain", "greedy"]

# How many of a row's largest logits are looked at before the whole vocabulary is.
_WINDOW = 256


def keep_likely(
    logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, how: Draw = "window"
) -> jax.Array:
    """Sets to ``-inf`` what is not among the ``top_k`` largest, then what is not in the smallest set
    whose probability (after the first cut) reaches ``top_p``. Ties at a threshold stay.

    Sorting a vocabulary of 49,152 takes a CPU longer than the model's step. So a row's threshold is
    found among its largest few, and by bisection over all only where they do not tell; which of the
    two a row takes depends on the row alone. By "digits" it is always found over all.
    """
    if how == "digits":
        least_B = _threshold_by_bisection(logits_BV, top_k_B, top_p_B, digits=4)
        return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)
    told_B, threshold_B = _threshold_among_largest(logits_BV, top_k_B, top_p_B)
    threshold_B = jax.lax.cond(
        jnp.all(told_B),
        lambda: threshold_B,
        lambda: jnp.where(
            told_B, threshold_B, _threshold_by_bisection(logits_BV, top_k_B, top_p_B)
        ),
    )
    return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def _threshold_among_largest(
    logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether the largest logits tell the least one to keep, and that one (``-inf``: keep all)."""
    window = min(_WINDOW, logits_BV.shape[-1])
    # Behind a barrier: merged with the slices below, XLA turns it into a sort of everything. The values
    # alone: a barrier around both results ends XLA's compiler where it divides a program among devices.
    largest_BW = jax.lax.optimization_barrier(jax.lax.top_k(logits_BV, window)[0])
    highest_B1 = largest_BW[:, :1]
    cut_B = top_k_B > 0
    inside_BW = ~cut_B[:, None] | (jnp.arange(window)[None] < top_k_B[:, None])
    mass_BW = jnp.where(inside_BW, jnp.exp(largest_BW - highest_B1), 0.0)
    whole_B = jnp.where(
        cut_B, jnp.sum(mass_BW, axis=-1), jnp.sum(jnp.exp(logits_BV - highest_B1), axis=-1)
    )
    share_BW = mass_BW / whole_B[:, None]
    reached_BW = jnp.cumsum(share_BW, axis=-1)
    open_B = top_p_B >= 1.0
    kept_BW = inside_BW & (open_B[:, None] | (reached_BW - share_BW < top_p_B[:, None]))
    last_B1 = jnp.maximum(jnp.sum(kept_BW, axis=-1, keepdims=True), 1) - 1
    least_B = jnp.take_along_axis(largest_BW, last_B1, axis=-1)[:, 0]
    everything_B = open_B & ~cut_B
    small_B = cut_B & (top_k_B <= window)
    closed_B = ~cut_B & (reached_BW[:, -1] >= top_p_B)
    told_B = everything_B | small_B | closed_B
    return told_B, jnp.where(everything_B, -jnp.inf, least_B)


def _threshold_by_bisection(
    logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, digits: int = 1
) -> jax.Array:
    """The least logit to keep, found bit by bit, or so many bits at once: no sort.

    A pass over the vocabulary takes ``digits`` bits of the 32, twice; with several bits it compares with
    all their values at once, and the passes are written out: few launches, no loop.
    """
    vocabulary = logits_BV.shape[-1]
    ordered_BV = _ordered_bits(logits_BV)

    def largest(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The largest value that still holds, for a property ``[B, N]`` of values ``[B, N]`` that falls
        once as they grow.
        """
        values_1N = jnp.arange(1, 1 << digits, dtype=jnp.uint32)[None]

        def try_digit(number: int | jax.Array, found_B: jax.Array) -> jax.Array:
            shift = (32 - digits - digits * jnp.asarray(number, jnp.int32)).astype(jnp.uint32)
            tried_BN = found_B[:, None] | (values_1N << shift)
            digit_B = jnp.sum(holds(tried_BN), axis=-1, dtype=jnp.uint32)
            return found_B | (digit_B << shift)

        found_B = jnp.zeros(logits_BV.shape[0], jnp.uint32)
        if digits == 1:
            return jax.lax.fori_loop(0, 32, try_digit, found_B)
        for number in range(32 // digits):
            found_B = try_digit(number, found_B)
        return found_B

    count_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, vocabulary), vocabulary)

    def enough(t_BN: jax.Array) -> jax.Array:
        above_BNV = ordered_BV[:, None] >= t_BN[:, :, None]
        return jnp.sum(above_BNV, axis=-1, dtype=jnp.int32) >= count_B[:, None]

    kth_B = largest(enough)
    inside_BV = ordered_BV >= kth_B[:, None]
    share_BV = jax.nn.softmax(jnp.where(inside_BV, logits_BV, -jnp.inf), axis=-1)

    def reaches(t_BN: jax.Array) -> jax.Array:
        above_BNV = ordered_BV[:, None] >= t_BN[:, :, None]
        mass_BN = jnp.sum(jnp.where(above_BNV, share_BV[:, None], 0.0), axis=-1)
        return mass_BN >= top_p_B[:, None]

    # The rounding of a sum near one must not cut anything where top_p is off.
    least_B = jnp.where(top_p_B >= 1.0, kth_B, jnp.maximum(kth_B, largest(reaches)))
    kept_BV = ordered_BV >= least_B[:, None]
    return jnp.min(jnp.where(kept_BV, logits_BV, jnp.inf), axis=-1)


def _ordered_bits(values: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats they come from."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def first_largest(logits_BV: jax.Array) -> jax.Array:
    """``argmax`` over the last axis, int32: as two reductions, which a CPU vectorises and its own is not.

    A row with a NaN gives some token.
    """
    vocabulary = logits_BV.shape[-1]
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    place_1V = jnp.arange(vocabulary, dtype=jnp.int32)[None]
    found_B = jnp.min(jnp.where(logits_BV == largest_B1, place_1V, vocabulary), axis=-1)
    return jnp.minimum(found_B, vocabulary - 1)


def sample(
    logits_BV: jax.Array, settings: Sampling, drawn_B: jax.Array, how: Draw = "window"
) -> jax.Array:
    """Token ids ``[B]``, int32.

    ``logits [B, V]`` are float32; ``drawn [B]`` counts the tokens a row has drawn before, and picks
    the randomness of this one. A row's result does not depend on what the other rows ask for.
    """
    greedy_B = first_largest(logits_BV)
    if how == "greedy":
        return greedy_B
    warm_B = settings.temperature_B > 0
    filtered_B = warm_B & ((settings.top_k_B > 0) | (settings.top_p_B < 1.0))

    def draw(key: jax.Array, drawn: jax.Array, scaled_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, drawn), scaled_V)

    def likely(scaled_BV: jax.Array) -> jax.Array:
        if how == "plain":
            return scaled_BV
        if how == "digits":
            return keep_likely(scaled_BV, settings.top_k_B, settings.top_p_B, how)
        return jax.lax.cond(
            jnp.any(filtered_B),
            lambda: keep_likely(scaled_BV, settings.top_k_B, settings.top_p_B),
            lambda: scaled_BV,
        )

    def warm() -> jax.Array:
        scaled_BV = likely(logits_BV / jnp.maximum(settings.temperature_B, 1e-6)[:, None])
        drawn = jax.vmap(draw)(settings.key_B, drawn_B, scaled_BV).astype(jnp.int32)
        return jnp.where(warm_B, drawn, greedy_B)

    if how == "window":
        return jax.lax.cond(jnp.any(warm_B), warm, lambda: greedy_B)
    return warm()
