"""The jitted steps of generation over one donated state: prefill a row, decode all rows, stop rows.

A prompt is prefilled by itself, in chunks of one fixed length cut from its start, so its arithmetic
does not depend on the batch. Decoding runs a number of steps per dispatch in a loop on the device.
Knows nothing of text, adapters' names or scheduling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.adapters.ragged import (
    BankLayers,
    Pairs,
    RowComponents,
    one_row_hooks,
    ragged_hooks,
)
from flora_jax.serve.sampling import Mode, Sampling, sample
from flora_jax.starcoder.cache import Cache, init_cache
from flora_jax.starcoder.config import StarCoderConfig

MAX_STOPS = 16
# In place of a token: nothing was drawn, or nothing could be.
RESTING, BROKEN = -1, -2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes from token to token.

    ``token [B]``: the last one drawn, not yet in the cache; ``position [B]``: where it belongs;
    ``drawn [B]``: how many were drawn; ``left [B]``: how many may still be (0: the row is at rest);
    ``stops [B, MAX_STOPS]``: ids that end the row, padded with -1.
    """

    cache: Cache
    token_B: jax.Array
    position_B: jax.Array
    drawn_B: jax.Array
    left_B: jax.Array
    stops_BE: jax.Array
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What a request asks for, as scalars; ``stops [MAX_STOPS]``."""

    left: jax.Array
    stops_E: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key: jax.Array


def init_state(config: StarCoderConfig, rows: int, length: int, dtype: Any) -> DecodeState:
    """A state of ``rows`` resting rows with caches of ``length`` positions."""
    return DecodeState(
        cache=init_cache(config, rows, length, dtype),
        token_B=jnp.zeros(rows, jnp.int32),
        position_B=jnp.zeros(rows, jnp.int32),
        drawn_B=jnp.zeros(rows, jnp.int32),
        left_B=jnp.zeros(rows, jnp.int32),
        stops_BE=jnp.full((rows, MAX_STOPS), -1, jnp.int32),
        sampling=Sampling(
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(rows, jnp.int32),
            jnp.ones(rows, jnp.float32),
            jax.random.split(jax.random.key(0), rows),
        ),
    )


def _draw(logits_BV: jax.Array, sampling: Sampling, drawn_B: jax.Array, mode: Mode) -> jax.Array:
    """The next tokens; ``BROKEN`` where a logit is NaN or infinite, which no draw may hide."""
    finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
    return jnp.where(finite_B, sample(logits_BV, sampling, drawn_B, mode), BROKEN)


def _after(token_B: jax.Array, left_B: jax.Array, stops_BE: jax.Array) -> jax.Array:
    """How many tokens may follow the drawn ones: none after a stop token."""
    stopped_B = jnp.any(token_B[:, None] == stops_BE, axis=1) | (token_B == BROKEN)
    return jnp.where(stopped_B, 0, jnp.maximum(left_B - 1, 0))


@partial(jax.jit, static_argnames=("graph", "mode"), donate_argnames="state")
def prefill(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: BankLayers,
    own: Mapping[str, RowComponents],
    state: DecodeState,
    row: jax.Array,
    tokens_T: jax.Array,
    start: jax.Array,
    count: jax.Array,
    settings: RowSettings,
    *,
    mode: Mode,
) -> DecodeState:
    """Puts a chunk of one prompt into the row's cache and draws the token after it.

    Args:
        graph: the model's static part.
        params: its parameters.
        layers: the adapters' bank.
        own: the row's components.
        state: donated.
        row: int32 scalar.
        tokens_T: the chunk, of the one chunk length, padded.
        start: the chunk's first position.
        count: how many of its tokens are real.
        settings: only the last chunk's draw and limits stay.
        mode: as in :func:`flora_jax.serve.sampling.sample`.
    """
    model = nnx.merge(graph, params)
    length = state.cache[0].k_BSGK.shape[1]
    offsets_1T = jnp.arange(tokens_T.shape[0])[None]
    # Padding goes to a position past the cache: its keys are dropped.
    positions_1T = jnp.where(offsets_1T < count, start + offsets_1T, length)
    own_cache = jax.tree.map(
        lambda buffer: jax.lax.dynamic_slice_in_dim(buffer, row, 1), state.cache
    )
    hidden_1TD, own_cache = model.hidden(
        tokens_T[None], positions_1T, cache=own_cache, adapters=one_row_hooks(layers, own)
    )
    cache = jax.tree.map(
        lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, row, 0),
        state.cache,
        own_cache,
    )
    logits_1V = model.logits(jax.lax.dynamic_index_in_dim(hidden_1TD[0], count - 1))
    sampling = Sampling(
        settings.temperature[None],
        settings.top_k[None],
        settings.top_p[None],
        settings.key[None],
    )
    token_1 = _draw(logits_1V, sampling, jnp.zeros(1, jnp.int32), mode)
    left_1 = _after(token_1, settings.left[None], settings.stops_E[None])
    new = DecodeState(
        cache=cache,
        token_B=token_1,
        position_B=(start + count)[None],
        drawn_B=jnp.ones(1, jnp.int32),
        left_B=left_1,
        stops_BE=settings.stops_E[None],
        sampling=sampling,
    )

    def put(old: jax.Array, value: jax.Array) -> jax.Array:
        return old.at[row].set(value[0])

    rest = jax.tree.map(
        put, dataclasses.replace(state, cache=[]), dataclasses.replace(new, cache=[])
    )
    return dataclasses.replace(rest, cache=cache)


@partial(jax.jit, static_argnames=("graph", "mode", "steps"), donate_argnames="state")
def decode(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: BankLayers,
    pairs: Mapping[str, Pairs],
    state: DecodeState,
    *,
    mode: Mode,
    steps: int,
) -> tuple[DecodeState, jax.Array]:
    """Draws up to ``steps`` tokens for every row that may have more.

    Returns:
        The state, and the tokens ``[B, steps]`` in order, ``RESTING`` where a row was at rest.
    """
    model = nnx.merge(graph, params)
    rows, length = state.cache[0].k_BSGK.shape[:2]
    hooks = ragged_hooks(layers, pairs)

    def one_step(
        carry: tuple[jax.Array, DecodeState, jax.Array],
    ) -> tuple[jax.Array, DecodeState, jax.Array]:
        number, state, tokens_BN = carry
        running_B = state.left_B > 0
        positions_B1 = jnp.where(running_B, state.position_B, length)[:, None]
        hidden_B1D, cache = model.hidden(
            state.token_B[:, None], positions_B1, cache=state.cache, adapters=hooks
        )
        assert cache is not None
        logits_BV = model.logits(hidden_B1D[:, 0])
        drawn_token_B = _draw(logits_BV, state.sampling, state.drawn_B, mode)
        tokens_BN = tokens_BN.at[:, number].set(jnp.where(running_B, drawn_token_B, RESTING))
        step = running_B.astype(jnp.int32)
        state = DecodeState(
            cache=cache,
            token_B=jnp.where(running_B, drawn_token_B, state.token_B),
            position_B=state.position_B + step,
            drawn_B=state.drawn_B + step,
            left_B=jnp.where(running_B, _after(drawn_token_B, state.left_B, state.stops_BE), 0),
            stops_BE=state.stops_BE,
            sampling=state.sampling,
        )
        return number + 1, state, tokens_BN

    def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
        number, state, _ = carry
        return (number < steps) & jnp.any(state.left_B > 0)

    start = jnp.int32(0), state, jnp.full((rows, steps), RESTING, jnp.int32)
    _, state, tokens_BN = jax.lax.while_loop(unfinished, one_step, start)
    return state, tokens_BN


@partial(jax.jit, donate_argnames="state")
def stop_rows(state: DecodeState, keep_B: jax.Array) -> DecodeState:
    """Puts the rows that are not kept to rest."""
    return dataclasses.replace(state, left_B=jnp.where(keep_B, state.left_B, 0))
