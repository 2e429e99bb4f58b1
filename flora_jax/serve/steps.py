"""The engine's jitted verbs over one donated state: prefill, begin, insert, decode, and pages out and in.

A row that is not listed does not run, so freeing one is the host's affair alone. Prompts are prefilled in
pieces cut from their start at fixed lengths, each under its own adapter, so that what a piece computes
follows from its own request. Decoding runs a number of steps per dispatch in a loop
on the device. Knows nothing of text, adapters' names or scheduling.
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
    ragged_hooks,
    row_wise_hooks,
)
from flora_jax.serve.sampling import Sampling, sample
from flora_jax.starcoder.cache import NOWHERE, Cache, LayerCache, Paging, init_cache
from flora_jax.starcoder.config import StarCoderConfig

MAX_STOPS = 16
# In place of a token: nothing was drawn, or nothing could be.
RESTING, BROKEN = -1, -2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes from token to token; rows are ``B``.

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
class Settings:
    """What requests ask for, an entry for each: ``temperature``, ``top_k``, ``top_p`` as in sampling;
    ``seed [B, 2]`` uint32 and whether it is the request's own (``seeded``), else it is folded.
    """

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    seed_BX: Any
    seeded_B: Any

    def sampling(self) -> Sampling:
        """The settings with keys: of a row's own seed, or of the engine's folded with its index."""

        def key(seed_X: jax.Array, seeded: jax.Array) -> jax.Array:
            own = jax.random.key_data(jax.random.key(seed_X[0]))
            folded = jax.random.key_data(jax.random.fold_in(jax.random.key(seed_X[0]), seed_X[1]))
            return jax.random.wrap_key_data(jnp.where(seeded, own, folded))

        keys_B = jax.vmap(key)(self.seed_BX, self.seeded_B)
        return Sampling(self.temperature_B, self.top_k_B, self.top_p_B, keys_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """Sequences that begin to decode: their rows (past the last one: no entry) and first values."""

    row_B: Any
    position_B: Any
    drawn_B: Any
    left_B: Any
    stops_BE: Any
    settings: Settings


def init_state(config: StarCoderConfig, rows: int, pages: int, page: int, dtype: Any) -> State:
    """A state of ``rows`` resting rows over a pool of ``pages`` pages of ``page`` positions."""
    return State(
        cache=init_cache(config, pages, page, dtype),
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


def _draw(logits_BV: jax.Array, sampling: Sampling, drawn_B: jax.Array) -> jax.Array:
    """The next tokens; ``BROKEN`` where a logit is NaN or infinite, which no draw may hide."""
    finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
    return jnp.where(finite_B, sample(logits_BV, sampling, drawn_B), BROKEN)


def _after(token_B: jax.Array, left_B: jax.Array, stops_BE: jax.Array) -> jax.Array:
    """How many tokens may follow the drawn ones: none after a stop token."""
    stopped_B = jnp.any(token_B[:, None] == stops_BE, axis=1) | (token_B == BROKEN)
    return jnp.where(stopped_B, 0, jnp.maximum(left_B - 1, 0))


@partial(jax.jit, static_argnames="graph", donate_argnames="state")
def prefill(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: BankLayers,
    own: Mapping[str, RowComponents],
    state: State,
    paging: Paging,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
) -> tuple[State, jax.Array]:
    """Puts pieces of prompts into the cache.

    Pieces of one sequence may stand beside each other: keys are stored before any are read.

    Args:
        graph: the model's static part.
        params: its parameters.
        layers: the adapters' bank.
        own: the pieces' components, all in one form.
        state: donated; only its cache changes.
        paging: the pages of each piece's sequence.
        tokens_BT: the pieces, padded.
        start_B: a piece's first position.
        count_B: how many of its tokens are real; 0 is no piece.

    Returns:
        The state, and the activations ``[B, D]`` of each piece's last token.
    """
    model = nnx.merge(graph, params)
    offset_1T = jnp.arange(tokens_BT.shape[1])[None]
    positions_BT = jnp.where(offset_1T < count_B[:, None], start_B[:, None] + offset_1T, NOWHERE)
    hidden_BTD, cache = model.hidden(
        tokens_BT,
        positions_BT,
        cache=state.cache,
        paging=paging,
        adapters=row_wise_hooks(layers, own),
    )
    assert cache is not None
    last_B = jnp.maximum(count_B - 1, 0)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    return dataclasses.replace(state, cache=cache), hidden_BD


@partial(jax.jit, static_argnames="graph", donate_argnames="state")
def begin(
    graph: nnx.GraphDef, params: nnx.State, state: State, hidden_BD: jax.Array, entries: Entries
) -> tuple[State, jax.Array]:
    """Draws the first tokens of sequences from what ``prefill`` left, and gives them rows.

    Returns:
        The state, and the tokens ``[B]``, which mean something for the entries that are one.
    """
    logits_BV = nnx.merge(graph, params).logits(hidden_BD)
    sampling = entries.settings.sampling()
    token_B = _draw(logits_BV, sampling, jnp.zeros(hidden_BD.shape[0], jnp.int32))
    return _put(state, token_B, entries, sampling), token_B


@partial(jax.jit, donate_argnames="state")
def insert(state: State, token_B: jax.Array, entries: Entries) -> State:
    """Gives rows to sequences that go on after ``token [B]``; all before is in the cache."""
    return _put(state, token_B, entries, entries.settings.sampling())


def _put(state: State, token_B: jax.Array, entries: Entries, sampling: Sampling) -> State:
    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[entries.row_B].set(new, mode="drop")

    new = State(
        cache=[],
        token_B=token_B,
        position_B=entries.position_B,
        drawn_B=entries.drawn_B,
        left_B=_after(token_B, entries.left_B + 1, entries.stops_BE),
        stops_BE=entries.stops_BE,
        sampling=sampling,
    )
    rest = jax.tree.map(put, dataclasses.replace(state, cache=[]), new)
    return dataclasses.replace(rest, cache=state.cache)


@partial(jax.jit, static_argnames=("graph", "most"), donate_argnames="state")
def decode(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: BankLayers,
    pairs: Mapping[str, Pairs],
    state: State,
    rows_B: jax.Array,
    paging: Paging,
    steps: jax.Array,
    eager: jax.Array,
    *,
    most: int,
) -> tuple[State, jax.Array]:
    """Draws up to ``steps`` tokens for those of the given rows that may have more.

    Args:
        graph: the model's static part.
        params: its parameters.
        layers: the adapters' bank.
        pairs: the components of the given rows.
        state: donated.
        rows_B: which rows of the state run; past the last one: none.
        paging: of the given rows.
        steps: int32 scalar, at most ``most``.
        eager: stop as soon as a row ends, since somebody waits for it.
        most: the number of columns of the result.

    Returns:
        The state, and the tokens ``[B, most]`` in order, ``RESTING`` where a row was at rest.
    """
    model = nnx.merge(graph, params)
    hooks = ragged_hooks(layers, pairs)
    whole = dataclasses.replace(state, cache=[])
    present_B = rows_B < state.left_B.shape[0]
    mine = jax.tree.map(lambda x: x.at[rows_B].get(mode="clip"), whole)
    left_B = jnp.where(present_B, mine.left_B, 0)
    sampling = dataclasses.replace(
        mine.sampling, temperature_B=jnp.where(left_B > 0, mine.sampling.temperature_B, 0.0)
    )
    mine = dataclasses.replace(mine, cache=state.cache, left_B=left_B)

    def one_step(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        number, now, tokens_BN = carry
        running_B = now.left_B > 0
        positions_B1 = jnp.where(running_B, now.position_B, NOWHERE)[:, None]
        hidden_B1D, cache = model.hidden(
            now.token_B[:, None], positions_B1, cache=now.cache, paging=paging, adapters=hooks
        )
        assert cache is not None
        drawn_token_B = _draw(model.logits(hidden_B1D[:, 0]), sampling, now.drawn_B)
        tokens_BN = tokens_BN.at[:, number].set(jnp.where(running_B, drawn_token_B, RESTING))
        step = running_B.astype(jnp.int32)
        now = State(
            cache=cache,
            token_B=jnp.where(running_B, drawn_token_B, now.token_B),
            position_B=now.position_B + step,
            drawn_B=now.drawn_B + step,
            left_B=jnp.where(running_B, _after(drawn_token_B, now.left_B, now.stops_BE), 0),
            stops_BE=now.stops_BE,
            sampling=now.sampling,
        )
        return number + 1, now, tokens_BN

    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        number, now, _ = carry
        ended = jnp.any((left_B > 0) & (now.left_B == 0))
        return (number < steps) & jnp.any(now.left_B > 0) & ~(eager & ended)

    tokens_BN = jnp.full((rows_B.shape[0], most), RESTING, jnp.int32)
    _, now, tokens_BN = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), mine, tokens_BN))
    done = jax.tree.map(
        lambda old, new: old.at[rows_B].set(new, mode="drop"),
        whole,
        dataclasses.replace(now, cache=[]),
    )
    return dataclasses.replace(done, cache=now.cache), tokens_BN


@jax.jit
def take_pages(cache: Cache, pages_M: jax.Array) -> list[LayerCache]:
    """Copies of a row's pages, ``[M, S, G, K]`` for each layer; zeros for a number that is no page."""
    return jax.tree.map(lambda pool: pool.at[pages_M].get(mode="fill", fill_value=0), cache)


@partial(jax.jit, donate_argnames="state")
def put_pages(state: State, pages_M: jax.Array, copies: list[LayerCache]) -> State:
    """Puts such copies into pages of a pool, the same or others."""
    cache = jax.tree.map(
        lambda pool, copy: pool.at[pages_M].set(copy, mode="drop"), state.cache, copies
    )
    return dataclasses.replace(state, cache=cache)
