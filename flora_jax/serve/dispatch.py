"""From sequences to the arrays of the jitted steps, and the state and bank that they take and return.

Knows nothing of queues, text or who waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.adapters.pairs import Form, form, list_pairs, row_components
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.pool import AdapterPool, Version
from flora_jax.serve.programs import DecodeShape, Lattice, PrefillShape
from flora_jax.serve.request import Request
from flora_jax.serve.scheduler import Sequence as Scheduled
from flora_jax.serve.steps import (
    MAX_STOPS,
    Entries,
    Settings,
    begin,
    decode,
    init_state,
    insert,
    prefill,
    put_pages,
    take_pages,
)
from flora_jax.serve.stream import Stream
from flora_jax.starcoder.cache import Paging
from flora_jax.starcoder.cached_attention import key_blocks
from flora_jax.starcoder.model import Model


class Job(NamedTuple):
    """What a scheduled sequence carries: its request, its adapter's version, its tokens so far."""

    request: Request
    version: Version | None
    stream: Stream


class Piece(NamedTuple):
    """``length`` tokens of a sequence's prompt from position ``start``."""

    sequence: Scheduled
    start: int
    length: int

    @property
    def last(self) -> bool:
        return self.start + self.length == self.sequence.prompt


class Device:
    """The engine's arrays and the verbs on them.

    Args:
        model: the base.
        pool: whose bank the steps read.
        lattice: the shapes they are padded to.
        options: the engine's.
        pages: pages of the cache.
    """

    def __init__(
        self, model: Model, pool: AdapterPool, lattice: Lattice, options: EngineOptions, pages: int
    ):
        self.model, self.pool, self.lattice, self.options = model, pool, lattice, options
        self.pages = pages
        self.rows = options.max_num_seqs
        # The embedding is never quantised.
        self.dtype = jax.tree.leaves(model.params["wte"])[0].dtype
        self.state = self._beside_parameters(
            init_state(model.config, self.rows, pages, options.page, self.dtype)
        )

    def prefill(self, pieces: Sequence[Piece]) -> jax.Array | None:
        """Runs pieces, all of one form and length; the sequences that are through begin to decode.

        Returns:
            First tokens by piece, on the device, which mean something for the last one of a prompt.
        """
        rows, length = 1, self.lattice.long
        if max(piece.length for piece in pieces) <= self.lattice.short:
            rows, length = self.lattice.piece_rows(len(pieces)), self.lattice.short
        span = self.lattice.span(max(piece.start + length for piece in pieces))
        own = self.form_of(pieces[0].sequence)
        hidden_BD = self._prefill(PrefillShape(rows, length, own, span), pieces)
        if not any(piece.last for piece in pieces):
            return None
        return self._begin([piece.sequence if piece.last else None for piece in pieces], hidden_BD)

    def form_of(self, sequence: Scheduled) -> Form:
        """In which compiled form a sequence's prompt is prefilled."""
        version = sequence.content.version
        return self.lattice.form(None if version is None else form(self.pool, version))

    def _prefill(self, shape: PrefillShape, pieces: Sequence[Piece]) -> jax.Array:
        rows = shape.rows
        tokens_BT = np.zeros((rows, shape.length), np.int32)
        start_B, count_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        names: list[Version | None] = [None] * rows
        for row, (sequence, start, count) in enumerate(pieces):
            job = sequence.content
            tokens_BT[row, :count] = job.request.token_ids[start : start + count]
            start_B[row], count_B[row], names[row] = start, count, job.version
        sequences = [piece.sequence for piece in pieces]
        longest = max((piece.start + piece.length for piece in pieces), default=1)
        self.state, hidden_BD = prefill(
            self.model.graph,
            self.model.params,
            self.pool.layers,
            row_components(self.pool, names, shape.form),
            self.state,
            self._paging(sequences, rows, shape.span, longest),
            tokens_BT,
            start_B,
            count_B,
        )
        return hidden_BD

    def _begin(self, entering: Sequence[Scheduled | None], hidden_BD: jax.Array) -> jax.Array:
        entries = self._entries(entering, hidden_BD.shape[0])
        self.state, tokens_B = begin(
            self.model.graph, self.model.params, self.state, hidden_BD, entries
        )
        return tokens_B

    def _entries(self, entering: Sequence[Scheduled | None], count: int) -> Entries:
        """What sequences start from; ``None`` is no sequence."""
        row_B = np.full(count, self.rows, np.int32)
        position_B, drawn_B, left_B = (np.zeros(count, np.int32) for _ in range(3))
        stops_BE = np.full((count, MAX_STOPS), -1, np.int32)
        for entry, sequence in enumerate(entering):
            if sequence is not None:
                # A row that has not drawn yet has done so with this token.
                drawn = max(1, sequence.drawn)
                assert sequence.row is not None
                row_B[entry], drawn_B[entry] = sequence.row, drawn
                position_B[entry] = sequence.prompt + drawn - 1
                left_B[entry] = sequence.room - drawn
                stops = sequence.content.stream.stops
                stops_BE[entry, : len(stops)] = sorted(stops)
        settings = self._settings(entering, count)
        return Entries(row_B, position_B, drawn_B, left_B, stops_BE, settings)

    def decode(self, sequences: Sequence[Scheduled], steps: int, eager: bool) -> np.ndarray:
        """Up to ``steps`` tokens ``[B, N]`` for each sequence, ``RESTING`` where one has ended."""
        names = [sequence.content.version for sequence in sequences]
        shape = self.lattice.decode(names, max(s.cached for s in sequences) + steps)
        tokens_BN = self._decode(shape, sequences, steps, eager)
        return np.asarray(tokens_BN)[: len(sequences)]

    def _decode(
        self, shape: DecodeShape, sequences: Sequence[Scheduled], steps: int, eager: bool
    ) -> jax.Array:
        rows_B = np.full(shape.rows, self.rows, np.int32)
        for entry, sequence in enumerate(sequences):
            assert sequence.row is not None
            rows_B[entry] = sequence.row
        names = [sequence.content.version for sequence in sequences]
        names += [None] * (shape.rows - len(names))
        longest = max((sequence.cached for sequence in sequences), default=0) + max(steps, 1)
        self.state, tokens_BN = decode(
            self.model.graph,
            self.model.params,
            self.pool.layers,
            list_pairs(self.pool, names, self.lattice.pair_sizes(shape)),
            self.state,
            rows_B,
            self._paging(sequences, shape.rows, shape.span, longest),
            np.int32(steps),
            np.bool_(eager),
            most=self.options.decode_steps,
        )
        return tokens_BN

    def copy_out(self, pages: Sequence[int]) -> Any:
        """The contents of some pages, on the host."""
        copies = jax.device_get(take_pages(self.state.cache, self._page_numbers(pages)))
        # Copied again: what lies behind the last page is not kept.
        return jax.tree.map(lambda pool: pool[: len(pages)].copy(), copies)

    def restore(self, sequence: Scheduled, copies: Any) -> None:
        """Puts such contents into a sequence's pages and gives it its row."""
        self._put_back(sequence.pages[: jax.tree.leaves(copies)[0].shape[0]], copies)
        last = sequence.content.stream.token_ids[-1]
        self._insert([sequence], [last])

    def _insert(self, entering: Sequence[Scheduled | None], tokens: list[int]) -> None:
        token_B = np.asarray(tokens, np.int32)
        self.state = insert(self.state, token_B, self._entries(entering, len(tokens)))

    def _put_back(self, pages: Sequence[int], copies: Any) -> None:
        def pad(copy: np.ndarray) -> np.ndarray:
            return np.pad(copy, ((0, self.lattice.width - len(copy)), *((0, 0),) * 3))

        numbers_M = self._page_numbers(pages)
        self.state = put_pages(self.state, numbers_M, jax.tree.map(pad, copies))

    def rehearsals(self) -> list[Callable[[], Any]]:
        """Calls that between them compile every program there can be, and change nothing."""

        def copies() -> None:
            self._put_back([], self.copy_out([]))

        tasks: list[Callable[[], Any]] = [self.pool.write_nothing, copies]
        tasks.append(partial(self._insert, [], [0]))
        width = self.model.config.n_embd
        for count in sorted({1, *self.lattice.pieces}):
            hidden_BD = self._beside_parameters(jnp.zeros((count, width), self.dtype))
            tasks.append(partial(self._begin, [], hidden_BD))
        tasks += [partial(self._prefill, shape, []) for shape in self.lattice.prefill_shapes()]
        tasks += [
            partial(self._decode, shape, [], 0, False) for shape in self.lattice.decode_shapes()
        ]
        return tasks

    def _beside_parameters(self, tree: Any) -> Any:
        """The arrays, committed to the parameters' devices where those are (as a checkpoint's can be).

        What a step returns is committed then, and a program compiled for other arrays would not do.
        """
        leaf = jax.tree.leaves(self.model.params["wte"])[0]
        if not leaf.committed:
            return tree
        place = leaf.sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec())
        return jax.device_put(tree, place)

    def _page_numbers(self, pages: Sequence[int]) -> np.ndarray:
        numbers_M = np.full(self.lattice.width, self.pages, np.int32)
        numbers_M[: len(pages)] = pages
        return numbers_M

    def _paging(self, sequences: Sequence[Scheduled], rows: int, span: int, longest: int) -> Paging:
        width = -(-span // self.options.page)
        table_BM = np.full((rows, width), self.pages, np.int32)
        for row, sequence in enumerate(sequences):
            own = sequence.pages[:width]
            table_BM[row, : len(own)] = own
        blocks = np.int32(key_blocks(longest, self.options.page)) if self.lattice.dynamic else None
        return Paging(table_BM, blocks)

    def _settings(self, sequences: Sequence[Scheduled | None], rows: int) -> Settings:
        temperature_B, top_p_B = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        top_k_B, seeded_B = np.zeros(rows, np.int32), np.zeros(rows, bool)
        seed_BX = np.zeros((rows, 2), np.uint32)
        for row, sequence in enumerate(sequences):
            if sequence is None:
                continue
            request = sequence.content.request
            temperature_B[row] = request.temperature
            top_k_B[row], top_p_B[row] = request.top_k, request.top_p
            seeded_B[row] = request.seed is not None
            seed_BX[row] = (
                (request.seed, 0)
                if request.seed is not None
                else (self.options.seed, request.index)
            )
        return Settings(temperature_B, top_k_B, top_p_B, seed_BX, seeded_B)
