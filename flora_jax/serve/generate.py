"""Batches of requests to completions: every row with its own adapter, settings and seed.

Requests run in their order in batches of a fixed number of rows, each batch to its end. Shapes come
from short lists, so the number of programs is bounded and known (:meth:`Generator.most_programs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.bank import build_bank
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.adapters.pairs import bucket, form, list_pairs, one_row, pair_lattice
from flora_jax.errors import InputError
from flora_jax.serve.request import MAX_STOP_TOKENS, Completion, Request
from flora_jax.serve.sampling import Mode
from flora_jax.serve.steps import (
    BROKEN,
    MAX_STOPS,
    RESTING,
    RowSettings,
    decode,
    init_state,
    prefill,
    stop_rows,
)
from flora_jax.serve.stream import Stream
from flora_jax.starcoder.model import Model

ROWS = (1, 4, 16, 32, 64)
_MODES: tuple[Mode, ...] = ("greedy", "sampled", "filtered")


class Shape(NamedTuple):
    """The padded shape of a batch: rows, cache positions, and the level of its pair lists."""

    rows: int
    length: int
    level: int


class Generator:
    """A model with its resident adapters, ready to generate.

    Args:
        model: the base.
        adapters: by the names that requests use.
        tokenizer: a ``tokenizers.Tokenizer``; without one completions have no text.
        rows: requests of a batch at most; its shape is padded to the next of ``ROWS``.
        chunk: prompt tokens of one prefill step.
        block: decode steps of one dispatch; stop strings are looked for between dispatches.
        seed: of the rows that have none of their own.

    Raises:
        InputError: an adapter that does not fit the model, or more end tokens than are looked for.
    """

    def __init__(
        self,
        model: Model,
        adapters: Mapping[str, ModelAdapter],
        *,
        tokenizer: Any | None = None,
        rows: int = 16,
        chunk: int = 64,
        block: int = 32,
        seed: int = 0,
    ):
        config = model.config
        most = MAX_STOPS - MAX_STOP_TOKENS
        if len(config.eos_token_ids) > most:
            raise InputError(
                f"the model has {len(config.eos_token_ids)} end tokens, at most {most}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.most_rows = bucket(rows, ROWS)
        self.chunk = min(chunk, config.n_positions)
        self.block = block
        self.seed = seed
        self.bank = build_bank(adapters, config.projections(), config.n_layer)
        self.dtype = jax.tree.leaves(model.params)[0].dtype

    def most_programs(self) -> int:
        """How many programs can ever be compiled: shapes of prefill and of decode.

        A run needs few of them: most have one number of rows, one cache length and one mode.
        """
        forms = len({tuple(form(self.bank, name).values()) for name in self.bank.slots})
        padded = [size for size in ROWS if size <= self.most_rows]
        shapes = sum(forms + self._levels(rows) for rows in padded)
        return shapes * len(_MODES) * len(_cache_lengths(self.model.config.n_positions))

    def shape(self, requests: Sequence[Request]) -> Shape:
        """The smallest padded shape that runs these requests as one batch."""
        longest = max(len(r.token_ids) + self._room(r) for r in requests)
        rows = bucket(len(requests), ROWS)
        level = self._level([request.adapter for request in requests], rows)
        return Shape(rows, bucket(longest, _cache_lengths(self.model.config.n_positions)), level)

    def generate(
        self, requests: Sequence[Request], *, shape: Shape | None = None
    ) -> Iterator[Completion]:
        """Yields completions in the order of the requests, batch by batch.

        Args:
            requests: any number of them.
            shape: run every batch in this shape; without it, each in the smallest that fits.

        Raises:
            InputError: a request that the model or the resident adapters cannot serve, or one whose
                logits are not finite.
            ValueError: a batch does not fit the given shape.
        """
        for request in requests:
            self._check(request)
        rows = self.rows if shape is None else shape.rows
        for start in range(0, len(requests), rows):
            batch = requests[start : start + rows]
            smallest = self.shape(batch)
            if shape is not None and (smallest.rows > shape.rows or smallest.length > shape.length):
                raise ValueError(f"the batch needs {smallest}, found {shape}")
            yield from self._batch(batch, smallest if shape is None else shape)

    def _check(self, request: Request) -> None:
        config = self.model.config
        ids = request.token_ids
        if request.adapter not in self.bank.slots:
            raise InputError(f"request {request.index}: unknown adapter {request.adapter!r}")
        if not 1 <= len(ids) <= config.n_positions:
            raise InputError(
                f"request {request.index}: {len(ids)} tokens, expected 1 to {config.n_positions}"
            )
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise InputError(
                f"request {request.index}: token ids {min(ids)} to {max(ids)}, "
                f"the vocabulary has 0 to {config.vocab_size - 1}"
            )

    def _batch(self, requests: Sequence[Request], shape: Shape) -> list[Completion]:
        graph, params, layers = self.model.graph, self.model.params, self.bank.layers
        mode = _mode(requests)
        rows = shape.rows
        state = init_state(self.model.config, rows, shape.length, self.dtype)
        for row, request in enumerate(requests):
            own = one_row(self.bank, request.adapter)
            settings = self._settings(request)
            for start in range(0, len(request.token_ids), self.chunk):
                piece = request.token_ids[start : start + self.chunk]
                tokens_T = np.zeros(self.chunk, np.int32)
                tokens_T[: len(piece)] = piece
                state = prefill(
                    graph, params, layers, own, state, jnp.int32(row), jnp.asarray(tokens_T),
                    jnp.int32(start), jnp.int32(len(piece)), settings, mode=mode,
                )  # fmt: skip
        names = [request.adapter for request in requests]
        names += [None] * (rows - len(names))
        lattice = {target: self._sizes(target, rows, shape.level) for target in self.bank.targets}
        pairs = list_pairs(self.bank, names, lattice)
        streams = [
            Stream(request, self._stops(request), self._room(request), self.tokenizer)
            for request in requests
        ]
        for stream, token in zip(streams, np.asarray(state.token_B)):
            self._extend(stream, [int(token)])
        while any(stream.running for stream in streams):
            keep = np.zeros(rows, bool)
            keep[: len(streams)] = [stream.running for stream in streams]
            state = stop_rows(state, jnp.asarray(keep))
            state, tokens_BN = decode(
                graph, params, layers, pairs, state, mode=mode, steps=self.block
            )
            for stream, tokens in zip(streams, np.asarray(tokens_BN)):
                self._extend(stream, [int(token) for token in tokens if token != RESTING])
        return [stream.completion() for stream in streams]

    def _extend(self, stream: Stream, tokens: list[int]) -> None:
        if BROKEN in tokens:
            request = stream.request
            adapter = "no adapter" if request.adapter is None else f"adapter {request.adapter!r}"
            raise InputError(
                f"request {request.index} ({adapter}): the logits after {len(stream.token_ids)} "
                f"tokens are not finite in {self.dtype}"
            )
        stream.add(tokens)

    def _stops(self, request: Request) -> list[int]:
        ends = () if request.ignore_eos else self.model.config.eos_token_ids
        return [*request.stop_token_ids, *ends]

    def _room(self, request: Request) -> int:
        return min(request.max_tokens, self.model.config.n_positions - len(request.token_ids))

    def _settings(self, request: Request) -> RowSettings:
        stops = self._stops(request)
        stops_E = np.full(MAX_STOPS, -1, np.int32)
        stops_E[: len(stops)] = stops
        key = (
            jax.random.fold_in(jax.random.key(self.seed), request.index)
            if request.seed is None
            else jax.random.key(request.seed)
        )
        return RowSettings(
            left=jnp.int32(self._room(request)),
            stops_E=jnp.asarray(stops_E),
            temperature=jnp.float32(request.temperature),
            top_k=jnp.int32(request.top_k),
            top_p=jnp.float32(request.top_p),
            key=key,
        )

    def _sizes(self, target: str, rows: int, level: int) -> tuple[int, int]:
        mul, add = self.bank.most(target)
        lattices = pair_lattice(rows, mul - 1), pair_lattice(rows, add)
        return tuple(sizes[min(level, len(sizes) - 1)] for sizes in lattices)  # type: ignore[return-value]

    def _levels(self, rows: int) -> int:
        """One level for all targets and both lists, so that programs do not multiply."""
        most = [self.bank.most(target) for target in self.bank.targets]
        sizes = [len(pair_lattice(rows, n)) for mul, add in most for n in (mul - 1, add)]
        return max(sizes, default=1)

    def _level(self, names: Sequence[str | None], rows: int) -> int:
        needed = 0
        for target in self.bank.targets:
            owned = [self.bank.of(name, target) for name in names]
            counts = (
                sum(len(slots.multiplicative) - 1 for slots in owned),
                sum(len(slots.additive) for slots in owned),
            )
            for level in range(self._levels(rows)):
                sizes = self._sizes(target, rows, level)
                if all(size >= count for size, count in zip(sizes, counts, strict=True)):
                    needed = max(needed, level)
                    break
        return needed


def _mode(requests: Sequence[Request]) -> Mode:
    warm = [request for request in requests if request.temperature > 0]
    if any(request.top_k or request.top_p < 1 for request in warm):
        return "filtered"
    return "sampled" if warm else "greedy"


def _cache_lengths(context: int) -> tuple[int, ...]:
    """Powers of two from 64 below the context, and the context."""
    sizes = []
    size = 64
    while size < context:
        sizes.append(size)
        size *= 2
    return (*sizes, context)
