"""The engine's jitted verbs: prefill, begin, insert, decode or forward and draw, and blocks out and in.

The cache and the rows are donated. A row that is not listed does not run, so freeing one is the host's
affair alone. Prompts are prefilled in chunks cut from their start at fixed lengths, each under its own
adapter, so that what a chunk computes follows from its own request. Decoding is either one program that
loops over its steps on the device, or a program for the forward pass and one that draws, which the host
dispatches step by step; both are made of the same two functions. A model is its static ``definition``
and the tuple of its parameters; small arguments of the host come packed. Knows nothing of text, adapters'
names or scheduling.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.mixing.ragged import BankLayers, ragged_hooks, row_wise_hooks
from flora_jax.models.cache import NOWHERE, Cache, LayerCache, Paging
from flora_jax.models.model import Definition, LanguageModel
from flora_jax.platforms import Platform
from flora_jax.serve.placement import Placement, Result
from flora_jax.serve.sampling import Draw, Sampling, sample
from flora_jax.serve.scores import Scores, score, score_prompts
from flora_jax.serve.state import (
    BROKEN,
    RESTING,
    Decoding,
    Entries,
    Packed,
    Prompts,
    Rows,
    Steps,
)
from flora_jax.weights.product import rounding_others

Leaves = Sequence[jax.Array]
Hooks = Sequence[dict[str, Any]]
# Steps done, the cache, the rows, their tokens and scores.
_Carry = tuple[jax.Array, Cache, Rows, jax.Array, Scores | None]


# How each verb is jitted, and what it returns, by its name.
_JITTED: dict[str, dict[str, Any]] = {}
_RESULTS: dict[str, tuple[Result, ...]] = {}


def _verb(
    *results: Result, static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """``jax.jit``, remembered for :func:`under`, with what each of the results is."""

    def wrap(function: Callable[..., Any]) -> Any:
        own = _JITTED[function.__name__] = dict(static_argnames=static, donate_argnames=donate)
        _RESULTS[function.__name__] = results
        return jax.jit(function, **own)

    return wrap


@functools.cache
def under(verb: Any, options: tuple[tuple[str, Any], ...], placement: Placement) -> Any:
    """A verb compiled under XLA's options, its results placed; the verb itself without either."""
    if not options and placement.splits is None:
        return verb
    function = verb.__wrapped__
    placed = placement.results(_RESULTS[function.__name__])
    own = dict(_JITTED[function.__name__], compiler_options=dict(options) or None)
    # Given where it is said alone: ``None`` would be a sharding as well.
    return jax.jit(function, **own, **({} if placed is None else dict(out_shardings=placed)))


def _with_others(
    hooks: Hooks, definition: Definition, model: LanguageModel, platform: Platform
) -> Hooks:
    """The hooks, and those of the projections that the bank has no room for; cut where these are."""
    if platform.rounded_results:
        hooks = rounding_others(hooks, model.config.projections())
    return hooks if definition.splits is None else definition.splits.hooks(hooks)


def _paging(definition: Definition, paging: Paging) -> Paging:
    return paging if definition.splits is None else definition.splits.paging(paging)


def _logits(definition: Definition, model: LanguageModel, hidden_BD: jax.Array) -> jax.Array:
    """The scores ``[B, V]``, all of them where they are drawn from: drawing looks at them many times."""
    logits_BV = model.logits(hidden_BD)
    return logits_BV if definition.splits is None else definition.splits.logits(logits_BV)


def _draw(
    logits_BV: jax.Array, rows: Rows, how: Draw, definition: Definition | None = None
) -> jax.Array:
    """The next tokens; ``BROKEN`` where a logit is NaN or infinite, which no draw may hide."""

    def drawn(logits_BV: jax.Array, sampling: Sampling, drawn_B: jax.Array) -> jax.Array:
        finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
        return jnp.where(finite_B, sample(logits_BV, sampling, drawn_B, how), BROKEN)

    if definition is not None and definition.splits is not None:
        drawn = definition.splits.each(drawn)
    return drawn(logits_BV, rows.sampling, rows.drawn_B)


def _after(token_B: jax.Array, left_B: jax.Array, stops_BE: jax.Array) -> jax.Array:
    """How many tokens may follow the drawn ones: none after a stop token."""
    stopped_B = jnp.any(token_B[:, None] == stops_BE, axis=1) | (token_B == BROKEN)
    return jnp.where(stopped_B, 0, jnp.maximum(left_B - 1, 0))


@_verb(
    "cache", "whole", "whole",
    static=("definition", "platform", "results", "whole"), donate=("cache",),
)  # fmt: skip
def prefill(
    definition: Definition,
    platform: Platform,
    leaves: Leaves,
    layers: BankLayers,
    cache: Cache,
    packed: Packed,
    *,
    results: int,
    whole: bool = False,
) -> tuple[Cache, jax.Array, jax.Array | None]:
    """Puts chunks of prompts into the cache.

    Chunks of one sequence may stand beside each other: keys are stored before any are read.

    Args:
        definition: the model's static part.
        platform: whose choices these programs follow.
        leaves: the model's parameters.
        layers: the adapters' bank.
        cache: donated.
        packed: the :class:`Prompts`.
        results: rows of the result.
        whole: whether all activations are wanted as well.

    Returns:
        The cache, the activations ``[results, D]`` of each chunk's last token, padded with zeros, and
        those of all tokens ``[B, T, D]``.
    """
    model, prompts = definition.merge(leaves), packed.unpack()
    assert isinstance(prompts, Prompts)
    count_B = prompts.count_B
    offset_1T = jnp.arange(prompts.tokens_BT.shape[1])[None]
    positions_BT = jnp.where(
        offset_1T < count_B[:, None], prompts.start_B[:, None] + offset_1T, NOWHERE
    )
    hidden_BTD, new = model.hidden(
        prompts.tokens_BT,
        positions_BT,
        cache=cache,
        paging=_paging(definition, prompts.paging),
        adapters=_with_others(row_wise_hooks(layers, prompts.own), definition, model, platform),
    )
    assert new is not None
    last_B = jnp.maximum(count_B - 1, 0)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    padded_BD = jnp.pad(hidden_BD, ((0, results - hidden_BD.shape[0]), (0, 0)))
    return new, padded_BD, hidden_BTD if whole else None


@_verb("whole", static=("definition", "top"))
def score_chunks(
    definition: Definition,
    leaves: Leaves,
    hidden_BTD: jax.Array,
    packed: Packed,
    *,
    top: int,
) -> Scores:
    """Scores of the tokens behind each position of chunks; ``packed`` are those tokens ``[B, T]``."""
    logits = functools.partial(_logits, definition, definition.merge(leaves))
    return score_prompts(hidden_BTD, packed.unpack(), top, logits)


@_verb("whole", "whole", "whole", static=("definition", "platform", "top"), donate=("rows",))
def begin(
    definition: Definition,
    platform: Platform,
    leaves: Leaves,
    rows: Rows,
    hidden_BD: jax.Array,
    packed: Packed,
    *,
    top: int = 0,
) -> tuple[Rows, jax.Array, Scores | None]:
    """Draws the first tokens of sequences from what ``prefill`` left, and gives them rows.

    ``packed`` are the rows of ``hidden_BD`` to draw from, ``[B]``, and the :class:`Entries`.

    Returns:
        The rows, the tokens ``[B]``, which mean something for the entries that are one, and their scores
        ``[B, 1]`` with ``top`` likeliest, where that is not 0.
    """
    source_B, entries = packed.unpack()
    logits_BV = _logits(definition, definition.merge(leaves), hidden_BD[source_B])
    none_B = jnp.zeros(hidden_BD.shape[0], jnp.int32)
    first = dataclasses.replace(_new_rows(none_B, entries), drawn_B=none_B)
    token_B = _draw(logits_BV, first, _any_draw(platform), definition)
    scores = score(logits_BV, token_B, top) if top else None
    return rows.put(entries.row_B, _new_rows(token_B, entries)), token_B, scores


@_verb("whole", donate=("rows",))
def insert(rows: Rows, packed: Packed) -> Rows:
    """Gives rows to sequences that go on; all before their last token is in the cache.

    ``packed`` are those tokens ``[B]`` and the :class:`Entries`.
    """
    token_B, entries = packed.unpack()
    return rows.put(entries.row_B, _new_rows(token_B, entries))


def _new_rows(token_B: jax.Array, entries: Entries) -> Rows:
    return Rows(
        token_B=token_B,
        position_B=entries.position_B,
        drawn_B=entries.drawn_B,
        left_B=_after(token_B, entries.left_B + 1, entries.stops_BE),
        stops_BE=entries.stops_BE,
        sampling=entries.settings.sampling(),
    )


def _any_draw(platform: Platform) -> Draw:
    """The way to draw that does for every request."""
    return "window" if platform.sampling == "window" else "digits"


def _forward(
    definition: Definition, model: LanguageModel, hooks: Hooks, cache: Cache, rows: Rows, paging: Paging
) -> tuple[Cache, jax.Array]:  # fmt: skip
    """The last tokens of rows that may have more into the cache, and the logits ``[B, V]`` after them."""
    paging = _paging(definition, paging)
    positions_B1 = jnp.where(rows.left_B > 0, rows.position_B, NOWHERE)[:, None]
    hidden_B1D, new = model.hidden(
        rows.token_B[:, None], positions_B1, cache=cache, paging=paging, adapters=hooks
    )
    assert new is not None
    return new, _logits(definition, model, hidden_B1D[:, 0])


def _advance(
    rows: Rows, logits_BV: jax.Array, how: Draw, definition: Definition | None = None
) -> tuple[Rows, jax.Array]:
    """The rows after another token, and the tokens ``[B]``, ``RESTING`` where a row is at rest."""
    running_B = rows.left_B > 0
    # What a resting row once asked for holds nobody up.
    temperature_B = jnp.where(running_B, rows.sampling.temperature_B, 0.0)
    asked = dataclasses.replace(rows.sampling, temperature_B=temperature_B)
    token_B = _draw(logits_BV, dataclasses.replace(rows, sampling=asked), how, definition)
    step = running_B.astype(jnp.int32)
    new = dataclasses.replace(
        rows,
        token_B=jnp.where(running_B, token_B, rows.token_B),
        position_B=rows.position_B + step,
        drawn_B=rows.drawn_B + step,
        left_B=jnp.where(running_B, _after(token_B, rows.left_B, rows.stops_BE), 0),
    )
    return new, jnp.where(running_B, token_B, RESTING)


class Columns(NamedTuple):
    """What a decode dispatch gives for a row: tokens at most, and the likeliest ones beside each, if any
    are scored (0: none).
    """

    tokens: int
    top: int = 0


@_verb(
    "cache", "whole", "whole", "whole",
    static=("definition", "platform", "columns"), donate=("cache", "rows"),
)  # fmt: skip
def decode(
    definition: Definition,
    platform: Platform,
    leaves: Leaves,
    layers: BankLayers,
    cache: Cache,
    rows: Rows,
    packed: Packed,
    *,
    columns: Columns,
) -> tuple[Cache, Rows, jax.Array, Scores | None]:
    """Draws up to ``columns.tokens`` tokens for those given rows that may have more, in one program.

    Args:
        definition: the model's static part.
        platform: whose choices these programs follow.
        leaves: the model's parameters.
        layers: the adapters' bank.
        cache: donated.
        rows: donated.
        packed: the :class:`Decoding` and the :class:`Steps`.
        columns: of the results.

    Returns:
        The cache, the rows, the tokens ``[B, N]`` in order, ``RESTING`` where a row was at rest, and
        their scores, zeros where the dispatch's ``scored`` is false.
    """
    model, (work, steps) = definition.merge(leaves), packed.unpack()
    assert isinstance(work, Decoding)
    assert isinstance(steps, Steps)
    hooks = _with_others(ragged_hooks(layers, work.pairs), definition, model, platform)
    mine = rows.take(work.rows_B)
    how = _any_draw(platform)

    def one_step(carry: _Carry) -> _Carry:
        number, cache, now, tokens_BN, scores = carry
        cache, logits_BV = _forward(definition, model, hooks, cache, now, work.paging)
        now, token_B = _advance(now, logits_BV, how, definition)
        if scores is not None:
            scores = jax.lax.cond(
                steps.scored,
                lambda: scores.put(number, score(logits_BV, token_B, columns.top)),
                lambda: scores,
            )
        return number + 1, cache, now, tokens_BN.at[:, number].set(token_B), scores

    def unfinished(carry: _Carry) -> jax.Array:
        number, _, now, _, _ = carry
        ended = jnp.any((mine.left_B > 0) & (now.left_B == 0))
        return (number < steps.number) & jnp.any(now.left_B > 0) & ~(steps.eager & ended)

    count, most = work.rows_B.shape[0], columns.tokens
    tokens_BN = jnp.full((count, most), RESTING, jnp.int32)
    scores = Scores.zeros(count, most, columns.top) if columns.top else None
    _, cache, now, tokens_BN, scores = jax.lax.while_loop(
        unfinished, one_step, (jnp.int32(0), cache, mine, tokens_BN, scores)
    )
    return cache, rows.put(work.rows_B, now), tokens_BN, scores


@_verb("cache", "whole", static=("definition", "platform"), donate=("cache",))
def forward(
    definition: Definition,
    platform: Platform,
    leaves: Leaves,
    layers: BankLayers,
    cache: Cache,
    rows: Rows,
    packed: Packed,
) -> tuple[Cache, jax.Array]:
    """One step of the given rows without the drawing; arguments as of :func:`decode`.

    ``packed`` is the :class:`Decoding`.

    Returns:
        The cache, and the logits ``[B, V]``, float32.
    """
    model, work = definition.merge(leaves), packed.unpack()
    assert isinstance(work, Decoding)
    hooks = _with_others(ragged_hooks(layers, work.pairs), definition, model, platform)
    return _forward(definition, model, hooks, cache, rows.take(work.rows_B), work.paging)


@_verb("whole", "whole", static=("how",), donate=("rows",))
def draw(
    rows: Rows, logits_BV: jax.Array, rows_B: Any, tokens_BN: jax.Array, *, how: Draw
) -> tuple[Rows, jax.Array]:
    """Draws the tokens after :func:`forward`'s logits for those of the given rows that may have more.

    Returns:
        The rows, and ``tokens [B, N]`` moved by a column with the new ones in the last.
    """
    new, token_B = _advance(rows.take(rows_B), logits_BV, how)
    return rows.put(rows_B, new), jnp.concatenate([tokens_BN[:, 1:], token_B[:, None]], axis=1)


@_verb("whole", static=("top",))
def score_drawn(logits_BV: jax.Array, tokens_BN: jax.Array, *, top: int) -> Scores:
    """Scores ``[B, 1]`` of the tokens that :func:`draw` has put into the last column."""
    return score(logits_BV, tokens_BN[:, -1], top)


@_verb("cache")
def take_blocks(cache: Cache, blocks_M: jax.Array) -> list[LayerCache]:
    """Copies of a row's blocks, ``[M, S, G, K]`` for each layer; zeros for a number that is no block."""
    return jax.tree.map(lambda pool: pool.at[blocks_M].get(mode="fill", fill_value=0), cache)


@_verb("cache", donate=("cache",))
def put_blocks(cache: Cache, blocks_M: jax.Array, copies: list[LayerCache]) -> Cache:
    """Puts such copies into blocks of the cache, the same or others."""
    return jax.tree.map(lambda pool, copy: pool.at[blocks_M].set(copy, mode="drop"), cache, copies)


@_verb("cache", donate=("cache",))
def copy_blocks(cache: Cache, packed: Packed) -> Cache:
    """Copies blocks within the cache; ``packed`` are their numbers and those of the copies, ``[M]`` each,
    where a number that is no block stands for none.
    """
    from_M, to_M = packed.unpack()

    def copy(pool: jax.Array) -> jax.Array:
        return pool.at[to_M].set(pool.at[from_M].get(mode="clip"), mode="drop")

    return jax.tree.map(copy, cache)
