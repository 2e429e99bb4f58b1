"""One packed stream of tokens → batches that are a function of the step.

Because batch ``n`` depends on the seed and ``n`` alone, a run that resumes at step ``n`` neither
repeats nor skips a window. Knows nothing of models, nor where the tokens came from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flora_jax.errors import InputError

# One of so many documents, or of equal parts, is held out where there is no text for that.
TENTH = 10


class Batch(NamedTuple):
    """Windows of the stream, a row each, for one call.

    ``tokens``: int32 ``[rows, length + 1]``, inputs and the target after the last of them.
    ``positions``: int32 ``[rows, length]``, from 0 at each document's and each window's start.
    ``segments``: int32 ``[rows, length]``, the documents of the window from 1; 0 is padding.
    ``mask``: float32 ``[rows, length]``, 1 where ``tokens[:, 1:]`` goes on in its input's document.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    mask: np.ndarray


@functools.lru_cache(maxsize=64)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order, int64 ``[count]``, in which an epoch visits the windows; not to be written to."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


def windows_at(step: int, rows: int, count: int, seed: int) -> np.ndarray:
    """Which of ``count`` windows batch ``step`` holds, int64 ``[rows]``.

    Batches follow each other through epoch after epoch, each in its own order, without a gap.
    """
    numbers = np.arange(step * rows, (step + 1) * rows)
    epochs = numbers // count
    orders = [
        epoch_order(count, seed, epoch)[numbers[epochs == epoch] % count]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(orders)


@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Documents end to end, each with what the tokenizer puts in front and closed by the end token.

    ``tokens [n]`` is unsigned; ``starts [documents]``, int64 and rising, is where each document's
    tokens begin (the end token may occur inside a document as well); ``names`` says where each came
    from; ``text_bytes`` counts the UTF-8 bytes of all.

    Windows have ``length + 1`` tokens, each overlapping the next by one; the last is padded. What a
    window cuts off a document goes on in the next one as if it began there.
    """

    tokens: np.ndarray
    starts: np.ndarray
    names: Sequence[str]
    text_bytes: int

    def windows(self, length: int) -> int:
        """How many windows hold every token.

        Raises:
            InputError: no token of any document has another of the same document after it.
        """
        if not self._has_target:
            raise InputError(
                f"{len(self.tokens)} tokens of {len(self.starts)} documents hold nothing to predict;"
                " give more documents"
            )
        return -(-(len(self.tokens) - 1) // length)

    @functools.cached_property
    def _has_target(self) -> bool:
        return bool(np.any(np.diff(self.starts, append=len(self.tokens)) > 1))

    def window(self, index: int, length: int) -> np.ndarray:
        """The tokens of one window, unpadded: at most ``length + 1``."""
        return self.tokens[index * length : index * length + length + 1]

    def batch(self, step: int, rows: int, length: int, seed: int) -> Batch:
        """Batch number ``step``. Epoch ``e`` visits every window once, ordered by ``(seed, e)``.

        Raises:
            InputError: see :meth:`windows`.
        """
        return self._cut(windows_at(step, rows, self.windows(length), seed), length)

    def documents_of(self, step: int, rows: int, length: int, seed: int) -> list[str]:
        """The names of the documents with an input token in that batch, in order, each once."""
        found: dict[str, None] = {}
        for index in windows_at(step, rows, self.windows(length), seed):
            inputs = [index * length, min((index + 1) * length, len(self.tokens)) - 1]
            first, last = np.searchsorted(self.starts, inputs, side="right") - 1
            found |= dict.fromkeys(str(self.names[n]) for n in range(first, last + 1))
        return list(found)

    def evaluation(self, length: int, rows: int, most: int | None = None) -> Iterator[Batch]:
        """All windows, or ``most`` of them evenly spread, in their order; rows of padding last.

        Raises:
            InputError: see :meth:`windows`.
        """
        count = self.windows(length)
        indices = np.arange(count)
        if most is not None and most < count:
            indices = np.arange(most) * count // most
        for first in range(0, len(indices), rows):
            batch = self._cut(indices[first : first + rows], length)
            missing = rows - len(batch.tokens)
            yield Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in batch))

    def _cut(self, indices: np.ndarray, length: int) -> Batch:
        first_R1 = indices[:, None] * length
        place_RW = first_R1 + np.arange(length + 1)
        inside_RW = place_RW < len(self.tokens)
        place_RW = np.minimum(place_RW, len(self.tokens) - 1)
        document_RW = np.searchsorted(self.starts, place_RW, side="right") - 1
        goes_on_RT = document_RW[:, 1:] == document_RW[:, :-1]
        segment_RW = document_RW - document_RW[:, :1] + 1
        position_RW = place_RW - np.maximum(self.starts[document_RW], first_R1)
        return Batch(
            tokens=(self.tokens[place_RW] * inside_RW).astype(np.int32),
            positions=(position_RW * inside_RW)[:, :-1].astype(np.int32),
            segments=(segment_RW * inside_RW)[:, :-1].astype(np.int32),
            mask=(goes_on_RT & inside_RW[:, 1:]).astype(np.float32),
        )


def hold_out(packed: PackedTokens, piece_bytes: np.ndarray) -> tuple[PackedTokens, PackedTokens]:
    """All but about a tenth, and that tenth: every tenth document, or of fewer the last tokens.

    Args:
        packed: the whole.
        piece_bytes: bytes of text that each token stands for, ``[V]``.
    """
    many, size = len(packed.starts), len(packed.tokens)
    document_X = np.repeat(np.arange(many), np.diff(packed.starts, append=size))
    if many < TENTH:
        held_X = np.arange(size) >= size - size // TENTH
    else:
        held_X = document_X % TENTH == TENTH - 1

    def part(own_X: np.ndarray) -> PackedTokens:
        tokens, documents = packed.tokens[own_X], document_X[own_X]
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        names = tuple(packed.names[number] for number in documents[starts])
        return PackedTokens(tokens, starts, names, int(piece_bytes[tokens].sum()))

    return part(~held_X), part(held_X)
