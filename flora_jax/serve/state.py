"""What changes from token to token, and what requests and dispatches bring, as pytrees.

The small host arrays of a dispatch are packed into one, which costs one copy to the device instead of
many. Knows nothing of models, text or scheduling.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.mixing.ragged import Pairs, RowComponents
from flora_jax.models.cache import Cache, Paging, init_cache
from flora_jax.models.family import ModelConfig
from flora_jax.serve.request import MAX_STOPS
from flora_jax.serve.sampling import Sampling

# In place of a token: nothing was drawn, or nothing could be.
RESTING, BROKEN = -1, -2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The engine's rows ``B``.

    ``token [B]``: the last one drawn, not yet in the cache; ``position [B]``: where it belongs;
    ``drawn [B]``: how many were drawn; ``left [B]``: how many may still be (0: the row is at rest);
    ``stops [B, MAX_STOPS]``: ids that end the row, padded with -1.
    """

    token_B: jax.Array
    position_B: jax.Array
    drawn_B: jax.Array
    left_B: jax.Array
    stops_BE: jax.Array
    sampling: Sampling

    def take(self, rows_B: jax.Array) -> Rows:
        """Those of the given numbers; a number past the last one gives a row at rest."""
        present_B = rows_B < self.left_B.shape[0]
        mine = jax.tree.map(lambda x: x.at[rows_B].get(mode="clip"), self)
        return dataclasses.replace(mine, left_B=jnp.where(present_B, mine.left_B, 0))

    def put(self, rows_B: jax.Array, new: Rows) -> Rows:
        """With the given ones in the place of those; a number past the last one is dropped."""
        return jax.tree.map(lambda old, mine: old.at[rows_B].set(mine, mode="drop"), self, new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The cache, and the rows whose tokens are in it."""

    cache: Cache
    rows: Rows


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Chunks of prompts: their adapters' components, all in one form, the blocks of each one's sequence,
    the tokens padded, each one's first position, and how many of its tokens are real (0: no chunk).
    """

    own: Mapping[str, RowComponents]
    paging: Paging
    tokens_BT: Any
    start_B: Any
    count_B: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Which rows decode (past the last one: none), with their adapters' components and their blocks."""

    pairs: Mapping[str, Pairs]
    paging: Paging
    rows_B: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """How long a dispatch that loops on the device goes on: so many steps, or until a row ends; and
    whether its tokens are scored.
    """

    number: Any
    eager: Any
    scored: Any


def init_state(config: ModelConfig, rows: int, blocks: int, block: int, dtype: Any) -> State:
    """``rows`` rows at rest over a cache of ``blocks`` blocks of ``block`` positions."""
    return State(
        cache=init_cache(config, blocks, block, dtype),
        rows=Rows(
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
        ),
    )


_WORDS = (np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32))


class Layout:
    """Where each array of a tree lies among the words; one object for all trees of equal shapes."""

    def __init__(self, structure: Any, shapes: tuple[tuple[tuple[int, ...], np.dtype], ...]):
        self.structure, self.shapes = structure, shapes


@functools.cache
def _layout(structure: Any, shapes: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> Layout:
    # Compared by identity from here on: hashing shapes at every call is what this saves.
    return Layout(structure, shapes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree of small arrays as int32 words ``[N]``, and where they lie among them."""

    words_N: Any
    layout: Layout = dataclasses.field(metadata=dict(static=True))

    def unpack(self) -> Any:
        """The tree; inside a jitted step."""
        arrays, start = [], 0
        for shape, dtype in self.layout.shapes:
            end = start + math.prod(shape)
            words = self.words_N[start:end].reshape(shape)
            if dtype == np.bool_:
                arrays.append(words != 0)
            elif dtype == np.int32:
                arrays.append(words)
            else:
                arrays.append(jax.lax.bitcast_convert_type(words, jnp.dtype(dtype)))
            start = end
        return jax.tree.unflatten(self.layout.structure, arrays)


def pack(tree: Any) -> Packed:
    """A tree of NumPy arrays and scalars, int32, uint32, float32 or bool, as one array.

    Raises:
        TypeError: an array of another dtype.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes, words = [], []
    for leaf in leaves:
        array = np.asarray(leaf)
        shapes.append((array.shape, array.dtype))
        if array.dtype == np.bool_:
            array = array.astype(np.int32)
        elif array.dtype not in _WORDS:
            raise TypeError(f"found {array.dtype}, expected int32, uint32, float32 or bool")
        words.append(array.reshape(-1).view(np.int32))
    whole = np.concatenate(words) if words else np.zeros(0, np.int32)
    return Packed(whole, _layout(structure, tuple(shapes)))
