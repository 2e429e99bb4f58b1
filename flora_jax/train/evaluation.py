"""Validation of several adapters side by side: loss, perplexity, bits per byte, accuracy."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flora_jax.errors import RunError
from flora_jax.train.data.packing import Batch, PackedTokens
from flora_jax.train.loss import bits_per_byte
from flora_jax.train.step import GroupedBatch, Scores, group


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Called with the adapters' layers, it gives the measures of each that has validation data.

    ``names`` are all adapters in the order of the layers' leading axis; ``most`` bounds the windows
    looked at of each; ``piece_bytes [V]`` are the bytes of text that a token stands for. ``check`` is
    called before each batch, and may raise to end the run.
    """

    scorer: Callable[[Any, Any, GroupedBatch], Scores]
    base: Any
    data: Mapping[str, PackedTokens]
    names: tuple[str, ...]
    length: int
    rows: int
    most: int | None
    piece_bytes: np.ndarray
    place: Callable[[GroupedBatch], GroupedBatch]
    check: Callable[[], None] = lambda: None

    def __call__(self, layers: Any) -> dict[str, dict[str, float]]:
        """Per name ``loss`` (nats a token), ``perplexity``, ``bits_per_byte`` and ``accuracy``.

        Each target of the windows counts once, whatever the padding.

        Raises:
            RunError: a loss is not finite.
        """
        result = self.measure(layers)
        for name, found in result.items():
            if not math.isfinite(found["loss"]):
                raise RunError(f"the validation loss of {name} is {found['loss']}")
        return result

    def measure(self, layers: Any) -> dict[str, dict[str, float]]:
        """The same, where a loss may be infinite or NaN."""
        none = np.zeros((self.rows, self.length), np.int32)
        empty = Batch(np.pad(none, ((0, 0), (0, 1))), none, none, none.astype(np.float32))
        streams = [
            self.data[name].evaluation(self.length, self.rows, self.most)
            if name in self.data
            else iter(())
            for name in self.names
        ]
        sums = np.zeros((3, len(self.names)))
        text_bytes = np.zeros(len(self.names))
        before: Scores | None = None
        for own in itertools.zip_longest(*streams, fillvalue=empty):
            self.check()
            batch = group(own)
            scores = self.scorer(layers, self.base, self.place(batch))
            # Read once the device has the next batch to do.
            if before is not None:
                sums += np.asarray(before, np.float64)
            before = scores
            counted = self.piece_bytes[batch.tokens[..., 1:]] * batch.mask
            text_bytes += counted.sum(axis=(0, 2))
        if before is not None:
            sums += np.asarray(before, np.float64)
        result = {}
        for number, name in enumerate(self.names):
            if name in self.data:
                nll, hits, count = map(float, sums[:, number])
                count = max(count, 1.0)
                result[name] = {
                    "loss": nll / count,
                    "perplexity": math.exp(min(nll / count, 700.0)),
                    "bits_per_byte": bits_per_byte(nll, max(float(text_bytes[number]), 1.0)),
                    "accuracy": hits / count,
                    "tokens": int(count),
                }
        return result
