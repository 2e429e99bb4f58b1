"""Log probabilities of tokens, and the likeliest ones beside each, from logits.

They are of the model's own distribution, before any setting of a request. Knows nothing of requests,
rows or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.serve.request import TokenLogprob

# Positions whose logits are there at a time, so that those of a whole chunk never are.
_POSITIONS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Natural logarithms, float32: ``own [B, T]`` of the tokens themselves, ``top [B, T, K]`` of the
    likeliest, which are ``ids [B, T, K]``, int32, in descending order.
    """

    own_BT: jax.Array
    top_BTK: jax.Array
    ids_BTK: jax.Array

    @classmethod
    def zeros(cls, rows: int, length: int, top: int) -> Scores:
        """Of no tokens yet."""
        return cls(
            jnp.zeros((rows, length), jnp.float32),
            jnp.zeros((rows, length, top), jnp.float32),
            jnp.zeros((rows, length, top), jnp.int32),
        )

    def put(self, column: jax.Array, one: Scores) -> Scores:
        """With those of one position, ``[B, 1]``, in a column."""
        return jax.tree.map(lambda all_, new: all_.at[:, column].set(new[:, 0]), self, one)


def score(logits_BV: jax.Array, token_B: jax.Array, top: int) -> Scores:
    """Of one token for each row, ``[B, 1]``. A token outside the vocabulary gives some number."""
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    total_B1 = jnp.log(jnp.sum(jnp.exp(logits_BV - largest_B1), axis=-1, keepdims=True))
    norm_B1 = largest_B1 + total_B1
    index_B1 = jnp.clip(token_B, 0, logits_BV.shape[-1] - 1)[:, None]
    own_B1 = jnp.take_along_axis(logits_BV, index_B1, axis=-1) - norm_B1
    # Behind a barrier each: merged with what reads it, XLA turns it into a sort of everything, and one
    # barrier around both ends its compiler where it divides a program among devices.
    top_BK, ids_BK = map(jax.lax.optimization_barrier, jax.lax.top_k(logits_BV, top))
    return Scores(own_B1, (top_BK - norm_B1)[:, None], ids_BK[:, None])


def score_prompts(
    hidden_BTD: jax.Array,
    next_BT: jax.Array,
    top: int,
    logits: Callable[[jax.Array], jax.Array],
) -> Scores:
    """Of the tokens that follow each position, from the activations there; ``[B, T]``."""
    rows, length, width = hidden_BTD.shape
    size = next(n for n in range(min(_POSITIONS, length), 0, -1) if length % n == 0)
    parts = length // size

    def one(taken: tuple[jax.Array, jax.Array]) -> Scores:
        hidden_BSD, next_BS = taken
        found = score(logits(hidden_BSD.reshape(-1, width)), next_BS.reshape(-1), top)
        return jax.tree.map(lambda leaf: leaf.reshape(rows, size, *leaf.shape[2:]), found)

    cut = (
        jnp.moveaxis(hidden_BTD.reshape(rows, parts, size, width), 1, 0),
        jnp.moveaxis(next_BT.reshape(rows, parts, size), 1, 0),
    )
    found = jax.lax.map(one, cut)
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(rows, length, *leaf.shape[3:]), found
    )


class HostScores:
    """Scores that were read, to be asked for by row; parts stand one behind another."""

    def __init__(self, parts: list[Scores]):
        read = jax.device_get(parts)
        self._own_BT = np.concatenate([part.own_BT for part in read], axis=1)
        self._top_BTK = np.concatenate([part.top_BTK for part in read], axis=1)
        self._ids_BTK = np.concatenate([part.ids_BTK for part in read], axis=1)

    def of(self, row: int, columns: list[int], tokens: list[int], top: int) -> list[TokenLogprob]:
        """Those of a row's tokens in some columns, counted from the last one where negative, with ``top``
        likeliest each.
        """
        found = []
        for column, token in zip(columns, tokens):
            ids = self._ids_BTK[row, column, :top].tolist()
            logprobs = self._top_BTK[row, column, :top].tolist()
            own = float(self._own_BT[row, column])
            found.append(TokenLogprob(token, own, tuple(zip(ids, logprobs))))
        return found
