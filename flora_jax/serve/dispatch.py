"""From sequences to the arrays of the jitted steps, and the state and bank that they take and return.

Knows nothing of queues, text or who waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.mixing.pairs import Form, form, list_pairs, row_components
from flora_jax.models.attention import cudnn_refuses
from flora_jax.models.attention_trial import fails_on_cache
from flora_jax.models.cache import Paging
from flora_jax.models.cached_attention import OTHERWISE, key_blocks
from flora_jax.models.model import Model, definition_of, leaves_of
from flora_jax.platforms import Platform
from flora_jax.serve import steps
from flora_jax.serve.entries import list_entries
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.packing import Packed, pack
from flora_jax.serve.pool import AdapterPool, Version
from flora_jax.serve.programs import DecodeShape, Lattice, PrefillShape
from flora_jax.serve.request import Request
from flora_jax.serve.sampling import Draw
from flora_jax.serve.scheduler import Sequence as Scheduled
from flora_jax.serve.state import RESTING, Decoding, Entries, Prompts, Steps, init_state
from flora_jax.serve.stream import Stream


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


class Call(NamedTuple):
    """A program and its arguments, for running it or for compiling it ahead of time."""

    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]

    def run(self) -> Any:
        return self.function(*self.arguments, **self.static)

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.static)


class Device:
    """The engine's arrays and the verbs on them.

    Args:
        model: the base.
        pool: whose bank the steps read.
        lattice: the shapes they are padded to.
        options: the engine's.
        pages: pages of the cache.
        platform: whose choices the programs follow.
        allocate: without it the state has shapes in place of arrays, and nothing can be run.
    """

    def __init__(
        self,
        model: Model,
        pool: AdapterPool,
        lattice: Lattice,
        options: EngineOptions,
        pages: int,
        platform: Platform,
        *,
        allocate: bool = True,
    ):
        self.pool, self.lattice, self.options = pool, lattice, options
        self.config, self.pages, self.platform = model.config, pages, platform
        self.rows = options.max_num_seqs
        # The embedding is never quantised.
        leaf = model.embedding
        self.dtype, self._place = leaf.dtype, _replicated(leaf) if allocate else None
        self.definition, self.leaves = definition_of(model), leaves_of(model)
        make = partial(init_state, model.config, self.rows, pages, options.page, self.dtype)
        state = self.beside_parameters(make()) if allocate else jax.eval_shape(make)
        self.cache, self.state_rows = state.cache, state.rows
        self._compiler_options = platform.invariant_options if options.batch_invariant else ()
        self.prompt_attention, self.attention_note = self._choose_attention(allocate)
        self._resting = {
            rows: self.beside_parameters(jnp.full((rows, options.decode_steps), RESTING, jnp.int32))
            for rows in lattice.rows
        }

    def _choose_attention(self, allocate: bool) -> tuple[str, str | None]:
        """The attention over prompts that can be used, and why it is not what the platform wants.

        Tried on a few tokens where there is a device: a library may refuse, or be wrong, only there.
        """
        wanted, lattice, config = self.platform.prompt_attention, self.lattice, self.config
        length, span = min(lattice.short, 128), min(lattice.prompt_spans[0], 512)
        reasons: list[str] = []
        for name in (wanted, *OTHERWISE.get(wanted, ())):
            why = None
            if name in OTHERWISE:
                why = cudnn_refuses(config, self.dtype, lattice.short)
                if why is None and allocate:
                    page = self.options.page
                    why = fails_on_cache(name, config, self.dtype, length, span, page)
            if why is None:
                return name, "; ".join(reasons) or None
            reasons.append(f"{name}: {why}")
        raise AssertionError("the last one is on every device")

    @property
    def may_preempt(self) -> bool:
        """Whether the cache can be too small for sequences that have rows."""
        return self.pages < self.rows * self.lattice.width

    def resting(self, rows: int) -> jax.Array:
        """Tokens ``[B, N]`` of rows before the first step of a dispatch."""
        return self._resting[rows]

    def prefill(self, pieces: Sequence[Piece]) -> jax.Array | None:
        """Runs pieces, all of one form and length; the sequences that are through begin to decode.

        Returns:
            First tokens by piece, on the device, which mean something for the last one of a prompt.
        """
        rows, length = 1, self.lattice.long
        if max(piece.length for piece in pieces) <= self.lattice.short:
            rows, length = self.lattice.piece_rows(len(pieces)), self.lattice.short
        span = self.lattice.prompt_span(max(piece.start + length for piece in pieces))
        own = self.form_of(pieces[0].sequence)
        shape = PrefillShape(rows, length, own, span)
        self.cache, hidden_BD = self.prefill_call(shape, pieces).run()
        if not any(piece.last for piece in pieces):
            return None
        entering = [piece.sequence if piece.last else None for piece in pieces]
        self.state_rows, tokens_B = self.begin_call(entering, hidden_BD).run()
        return tokens_B

    def form_of(self, sequence: Scheduled) -> Form:
        """In which compiled form a sequence's prompt is prefilled."""
        version = sequence.content.version
        return self.lattice.form(None if version is None else form(self.pool, version))

    def _entries(self, entering: Sequence[Scheduled | None], count: int) -> Entries:
        return list_entries(entering, count, self.rows, self.options.seed)

    def _verb(self, verb: Any) -> Any:
        return steps.under(verb, self._compiler_options)

    def _call(self, verb: Any, arguments: tuple[Any, ...], static: Mapping[str, Any]) -> Call:
        return Call(self._verb(verb), arguments, static)

    def _base(self) -> tuple[Any, ...]:
        return self.definition, self.platform, self.leaves

    def prefill_call(self, shape: PrefillShape, pieces: Sequence[Piece]) -> Call:
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
        paging = self._paging(sequences, rows, shape.span, longest, self.prompt_attention)
        own = row_components(self.pool, names, shape.form)
        work = Prompts(own, paging, tokens_BT, start_B, count_B)
        results = self.lattice.pieces[-1] if self.lattice.few else rows
        arguments = (*self._base(), self.pool.layers, self.cache, pack(work))
        return self._call(steps.prefill, arguments, dict(results=results))

    def begin_call(self, entering: Sequence[Scheduled | None], hidden_BD: jax.Array) -> Call:
        entries = pack(self._entries(entering, hidden_BD.shape[0]))
        return self._call(steps.begin, (*self._base(), self.state_rows, hidden_BD, entries), {})

    def decode(self, sequences: Sequence[Scheduled], number: int, eager: bool) -> jax.Array:
        """Begins to draw up to ``number`` tokens for each sequence.

        Returns:
            The tokens ``[B, N]`` on the device, in order, ``RESTING`` where a sequence has ended.
        """
        names = [sequence.content.version for sequence in sequences]
        shape = self.lattice.decode(names, max(s.reach for s in sequences) + number)
        work = self.decoding(shape, sequences, number)
        if self.platform.steps_on_device:
            call = self.decode_call(work, number, eager)
            self.cache, self.state_rows, tokens_BN = call.run()
            return tokens_BN
        how = _least_draw([sequence.content.request for sequence in sequences])
        packed, rows_B = jax.device_put((pack(work), work.rows_B))
        tokens_BN = self.resting(shape.rows)
        for _ in range(min(number, most_left(sequences))):
            self.cache, logits_BV = self.forward_call(packed).run()
            draw = self.draw_call(logits_BV, rows_B, tokens_BN, how)
            self.state_rows, tokens_BN = draw.run()
        return tokens_BN

    def decoding(self, shape: DecodeShape, sequences: Sequence[Scheduled], number: int) -> Decoding:
        rows_B = np.full(shape.rows, self.rows, np.int32)
        for entry, sequence in enumerate(sequences):
            assert sequence.row is not None
            rows_B[entry] = sequence.row
        names = [sequence.content.version for sequence in sequences]
        names += [None] * (shape.rows - len(names))
        pairs = list_pairs(self.pool, names, self.lattice.pair_sizes(shape))
        longest = max((sequence.reach for sequence in sequences), default=0) + max(number, 1)
        attention = self.platform.decode_attention
        paging = self._paging(sequences, shape.rows, shape.span, longest, attention)
        return Decoding(pairs, paging, rows_B)

    def decode_call(self, work: Decoding, number: int, eager: bool) -> Call:
        packed = pack((work, Steps(np.int32(number), np.bool_(eager))))
        arguments = (*self._base(), self.pool.layers, self.cache, self.state_rows, packed)
        return self._call(steps.decode, arguments, dict(most=self.options.decode_steps))

    def forward_call(self, packed: Packed) -> Call:
        arguments = (*self._base(), self.pool.layers, self.cache, self.state_rows, packed)
        return self._call(steps.forward, arguments, {})

    def draw_call(self, logits_BV: Any, rows_B: Any, tokens_BN: Any, how: Draw) -> Call:
        return self._call(
            steps.draw, (self.state_rows, logits_BV, rows_B, tokens_BN), dict(how=how)
        )

    def copy_out(self, pages: Sequence[int]) -> Any:
        """The contents of some pages, on the host."""
        copies = jax.device_get(self._verb(steps.take_pages)(self.cache, self._page_numbers(pages)))
        # Copied again: what lies behind the last page is not kept.
        return jax.tree.map(lambda pool: pool[: len(pages)].copy(), copies)

    def restore(self, sequence: Scheduled, copies: Any) -> None:
        """Puts such contents into a sequence's pages and gives it its row."""
        self.put_back(sequence.pages[: jax.tree.leaves(copies)[0].shape[0]], copies)
        last = sequence.content.stream.token_ids[-1]
        self.insert([sequence], [last])

    def insert(self, entering: Sequence[Scheduled | None], tokens: list[int]) -> None:
        packed = pack((np.asarray(tokens, np.int32), self._entries(entering, len(tokens))))
        self.state_rows = self._verb(steps.insert)(self.state_rows, packed)

    def put_back(self, pages: Sequence[int], copies: Any) -> None:
        def pad(copy: np.ndarray) -> np.ndarray:
            return np.pad(copy, ((0, self.lattice.width - len(copy)), *((0, 0),) * 3))

        numbers_M = self._page_numbers(pages)
        self.cache = self._verb(steps.put_pages)(self.cache, numbers_M, jax.tree.map(pad, copies))

    def beside_parameters(self, tree: Any) -> Any:
        """The arrays, committed to the parameters' devices where those are (as a checkpoint's can be).

        What a step returns is committed then, and a program compiled for other arrays would not do.
        """
        return tree if self._place is None else jax.device_put(tree, self._place)

    def _page_numbers(self, pages: Sequence[int]) -> np.ndarray:
        numbers_M = np.full(self.lattice.width, self.pages, np.int32)
        numbers_M[: len(pages)] = pages
        return numbers_M

    def _paging(
        self, sequences: Sequence[Scheduled], rows: int, span: int, longest: int, attention: str
    ) -> Paging:
        width = -(-span // self.options.page)
        table_BM = np.full((rows, width), self.pages, np.int32)
        for row, sequence in enumerate(sequences):
            own = sequence.pages[:width]
            table_BM[row, : len(own)] = own
        blocks = np.int32(key_blocks(longest, self.options.page)) if self.lattice.dynamic else None
        return Paging(table_BM, blocks, attention)


def _replicated(leaf: jax.Array) -> Any:
    """Where a parameter is committed to, whole on each of its devices; ``None`` where it is not."""
    if not leaf.committed:
        return None
    if isinstance(leaf.sharding, NamedSharding):
        return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return leaf.sharding


def most_left(sequences: Sequence[Scheduled]) -> int:
    """How many tokens any of them may still draw; the host dispatches no step beyond."""
    return max(max(1, sequence.left) for sequence in sequences)


def _least_draw(requests: Sequence[Request]) -> Draw:
    """The cheapest way to draw that gives every request its own token."""
    warm = [request for request in requests if request.temperature > 0]
    if any(request.top_k > 0 or request.top_p < 1 for request in warm):
        return "digits"
    return "plain" if warm else "greedy"
