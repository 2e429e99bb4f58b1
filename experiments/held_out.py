"""What a model under an adapter predicts of held-out windows, beside the base, with intervals.

Knows nothing of training or of which model it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.checkpoints.checkpoint import Opened
from flora_jax.errors import InputError
from flora_jax.mixing.grouped import grouped_hooks
from flora_jax.models.model import Model
from flora_jax.train.data.packing import PackedTokens
from flora_jax.train.data.tokens import piece_bytes, tokenize
from flora_jax.train.loss import token_scores

TOKENS = 4096  # That are scored at a time.


class Windows(NamedTuple):
    """Sums for each held-out window: nats, right guesses, targets, bytes; float64 ``[windows]``."""

    nll: np.ndarray
    hits: np.ndarray
    targets: np.ndarray
    text: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(graph: Any, params: Any, layers: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graph, params)
    hooks = None if layers is None else grouped_hooks(layers)
    hidden_BTD, _ = model.hidden(
        batch.tokens[:, :-1], batch.positions, segments_BT=batch.segments, adapters=hooks
    )
    nll_BT, hit_BT = token_scores(hidden_BTD, model.head(), batch.tokens[:, 1:])
    return (nll_BT * batch.mask).sum(axis=1), (hit_BT * batch.mask).sum(axis=1)


def score_windows(
    model: Model, adapter: ModelAdapter | None, batches: Iterable[Any], lengths: np.ndarray
) -> Windows:
    """What a model under an adapter (``None``: the base) predicts of held-out windows.

    Args:
        model: the base.
        adapter: of one example.
        batches: of :meth:`flora_jax.train.data.packing.PackedTokens.evaluation`.
        lengths: bytes of each piece of the vocabulary ``[V]``.
    """

    layers = None
    if adapter is not None:
        layers = jax.tree.map(lambda leaf: leaf[None], adapter.layers)
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for batch in batches:
        own = batch.mask.any(axis=1)
        nll_B, hit_B = _score_rows(model.graph, model.params, layers, batch)
        text_B = (lengths[batch.tokens[:, 1:]] * batch.mask).sum(axis=1)
        for column, values in zip(columns, (nll_B, hit_B, batch.mask.sum(axis=1), text_B)):
            column.append(np.asarray(values, np.float64)[own])
    return Windows(*(np.concatenate(column) for column in columns))


def compare(found: Windows, base: Windows, draws: int = 2000) -> dict[str, Any]:
    """Bits per byte and accuracy, and their change to the base with 95 % intervals."""

    def measures(picked: Any) -> np.ndarray:
        bits = [
            (w.nll[picked].sum(-1) / math.log(2)) / w.text[picked].sum(-1) for w in (found, base)
        ]
        right = [w.hits[picked].sum(-1) / w.targets[picked].sum(-1) for w in (found, base)]
        return np.stack([bits[0], bits[0] - bits[1], right[0], right[0] - right[1]])

    windows = len(found.nll)
    drawn = np.random.default_rng(0).integers(0, windows, (draws, windows))
    low, high = np.percentile(measures(drawn), [2.5, 97.5], axis=1)
    whole = measures(np.arange(windows))
    names = ("bits_per_byte", "bits_per_byte_change", "accuracy", "accuracy_change")
    result: dict[str, Any] = {"windows": windows, "tokens": int(found.targets.sum())}
    for number, name in enumerate(names):
        result[name] = round(float(whole[number]), 5)
        result[f"{name}_95"] = [round(float(low[number]), 5), round(float(high[number]), 5)]
    return result


class HeldOut:
    """The held-out files ``CORPORA/LANGUAGE.validation.jsonl.gz``; the base is scored on each once.

    Args:
        opened: the checkpoint, whose tokenizer is used.
        model: the base, loaded.
        corpora: the directory of the files.
        cache: a directory for their tokens.
    """

    def __init__(self, opened: Opened, model: Model, corpora: Path, cache: Path) -> None:
        self.model, self.corpora, self.cache = model, corpora, cache
        self._tokenizer, self._end_id = opened.text_tokens("text")
        self._lengths = piece_bytes(self._tokenizer, opened.config.vocab_size)
        self._packed: dict[str, PackedTokens] = {}
        self._base: dict[tuple[str, int, int], Windows] = {}

    def change(
        self, language: str, adapter: ModelAdapter, *, length: int, most: int
    ) -> dict[str, Any]:
        """What the adapter changes on up to ``most`` windows of ``length`` tokens; see :func:`compare`.

        Raises:
            InputError: the file has not one such window.
        """
        if language not in self._packed:
            path = self.corpora / f"{language}.validation.jsonl.gz"
            packed, _ = tokenize(path, self._tokenizer, self._end_id, cache=self.cache)
            try:
                packed.windows(length)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            self._packed[language] = packed
        key = language, length, most
        if key not in self._base:
            self._base[key] = self._windows(None, *key)
        return compare(self._windows(adapter, *key), self._base[key])

    def _windows(
        self, adapter: ModelAdapter | None, language: str, length: int, most: int
    ) -> Windows:
        rows = max(1, TOKENS // length)
        batches = self._packed[language].evaluation(length, rows, most)
        return score_windows(self.model, adapter, batches, self._lengths)
