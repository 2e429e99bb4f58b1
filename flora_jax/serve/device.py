"""Runs what a plan says: from sequences to the arrays of the jitted steps, and the cache and rows that
they take and return.

Knows nothing of queues, text or who waits.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.mixing.pairs import Form, form, row_components
from flora_jax.mixing.ragged import Pairs
from flora_jax.models.attention import cudnn_refuses
from flora_jax.models.attention_trial import fails_on_cache
from flora_jax.models.cache import Paging
from flora_jax.models.cached_attention import OTHERWISE, key_stretches
from flora_jax.models.model import Model, definition_of, leaves_of
from flora_jax.platforms import Platform
from flora_jax.serve import steps
from flora_jax.serve.lattice import DecodeShape, Lattice, PrefillShape
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.placement import Placement, placement_of
from flora_jax.serve.registry import Version
from flora_jax.serve.request import MAX_STOPS, Request, TokenLogprob
from flora_jax.serve.residency import Residency
from flora_jax.serve.sampling import Draw
from flora_jax.serve.scheduler import Decode, Start
from flora_jax.serve.scores import HostScores, Scores
from flora_jax.serve.sequence import Chunk
from flora_jax.serve.sequence import Sequence as Scheduled
from flora_jax.serve.state import (
    RESTING,
    Decoding,
    Entries,
    Packed,
    Prompts,
    Settings,
    Steps,
    init_state,
    pack,
)


class Call(NamedTuple):
    """A program and its arguments, for running it or for compiling it ahead of time."""

    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]

    def run(self) -> Any:
        return self.function(*self.arguments, **self.static)

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.static)


class Prefilled(NamedTuple):
    """Chunks of prompts that were dispatched; on the device.

    ``tokens_B``: first tokens by chunk, which mean something for the last one of a prompt, and ``first``
    their scores; ``behind``: scores of the tokens behind each position, where a prompt's are asked for.
    """

    chunks: list[Chunk]
    tokens_B: jax.Array | None
    first: Scores | None
    behind: Scores | None


class _End(NamedTuple):
    """The activations ``[B, D]`` that a dispatch left after the last tokens of prompts, and the row of
    one of them.
    """

    hidden_BD: jax.Array
    row: int


class Decoded(NamedTuple):
    """Tokens ``[B, N]`` of a decode dispatch, on the device, and parts of their scores, which stand one
    behind another up to the last column.
    """

    tokens_BN: jax.Array
    scores: list[Scores]


class Drawn(NamedTuple):
    """What a dispatch brought one sequence: new tokens, and scores where it asked for them; those of
    tokens of its prompt behind a position.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    prompt: list[tuple[int, list[TokenLogprob]]]


class Flight(NamedTuple):
    """What was dispatched at a time, and is not read yet: chunks of prompts, and a decode dispatch."""

    prefilled: list[Prefilled]
    decode: Decode | None
    decoded: Decoded | None
    began_s: float

    def read(self) -> dict[int, Drawn]:
        """Waits for the tokens and returns them by their sequences' numbers, in order."""
        drawn: dict[int, Drawn] = collections.defaultdict(lambda: Drawn([], [], []))
        for one in self.prefilled:
            _read_prompts(one, drawn)
        if self.decode is not None and self.decoded is not None:
            tokens_BN, parts = np.asarray(self.decoded.tokens_BN), self.decoded.scores
            scores = HostScores(parts) if parts else None
            for row, (sequence, own_N) in enumerate(zip(self.decode.sequences, tokens_BN)):
                columns = np.flatnonzero(own_N != RESTING) - len(own_N)
                tokens = own_N[columns].tolist()
                own = drawn[sequence.number]
                own.token_ids.extend(tokens)
                top = sequence.request.sampling_params.logprobs
                if scores is not None and top is not None:
                    own.logprobs.extend(scores.of(row, columns.tolist(), tokens, top))
        return drawn


def _read_prompts(one: Prefilled, drawn: Mapping[int, Drawn]) -> None:
    """Adds the first tokens of sequences, and the scores of their prompts."""
    tokens_B = None if one.tokens_B is None else jax.device_get(one.tokens_B)
    first = None if one.first is None else HostScores([one.first])
    behind = None if one.behind is None else HostScores([one.behind])
    for row, (sequence, start, count) in enumerate(one.chunks):
        params, own = sequence.request.sampling_params, drawn[sequence.number]
        if behind is not None and params.prompt_logprobs is not None:
            tokens = [*sequence.request.prompt_token_ids[start + 1 : start + count + 1]]
            scores = behind.of(row, [*range(len(tokens))], tokens, params.prompt_logprobs)
            own.prompt.append((start, scores))
        if one.chunks[row].last and tokens_B is not None:
            token = int(tokens_B[row])
            own.token_ids.append(token)
            if first is not None and params.logprobs is not None:
                own.logprobs.extend(first.of(row, [0], [token], params.logprobs))


class Device:
    """The engine's arrays and the verbs on them.

    Args:
        model: the base.
        residency: whose bank the steps read.
        lattice: the shapes they are padded to.
        options: the engine's.
        platform: whose choices the programs follow.
        placement: where the arrays lie; beside the parameters by default.
    """

    def __init__(
        self,
        model: Model,
        residency: Residency,
        lattice: Lattice,
        options: EngineOptions,
        platform: Platform,
        *,
        placement: Placement | None = None,
    ):
        self.residency, self.lattice, self.options = residency, lattice, options
        self.config, self.platform = model.config, platform
        self.blocks = options.cache_blocks(lattice.context)
        self.rows = options.max_num_seqs
        # The embedding is never quantised.
        self.dtype = model.embedding.dtype
        self.placement = placement = placement or placement_of(model)
        self.definition = definition_of(model, placement.splits)
        self.leaves = leaves_of(model)
        make = partial(
            init_state, model.config, self.rows, self.blocks, options.block_size, self.dtype
        )
        state = placement.make(make)
        self.cache, self.state_rows = state.cache, state.rows
        # By the keys of whole prompts that can be found among the blocks.
        self._ends: dict[bytes, _End] = {}
        self._compiler_options = platform.invariant_options if options.batch_invariant else ()
        self.prompt_attention, self.attention_note = self._choose_attention(placement.allocate)
        self._resting = {
            rows: placement.make(
                partial(jnp.full, (rows, options.decode_steps), RESTING, jnp.int32)
            )
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
                    size = self.options.block_size
                    why = fails_on_cache(name, config, self.dtype, length, span, size)
            if why is None:
                return name, "; ".join(reasons) or None
            reasons.append(f"{name}: {why}")
        raise AssertionError("the last one is on every device")

    @property
    def may_preempt(self) -> bool:
        """Whether the cache can be too small for sequences that have rows."""
        return self.blocks < self.rows * self.lattice.width

    def resting(self, rows: int) -> jax.Array:
        """Tokens ``[B, N]`` of rows before the first step of a dispatch."""
        return self._resting[rows]

    def prefill(self, chunks: list[Chunk]) -> Prefilled | None:
        """Runs chunks, all of one form and length; the sequences that are through begin to decode.

        Returns:
            What there is to be read of it, if anything.
        """
        rows, length = 1, self.lattice.long
        if max(chunk.length for chunk in chunks) <= self.lattice.short:
            rows, length = self.lattice.chunk_rows(len(chunks)), self.lattice.short
        span = self.lattice.prompt_span(max(chunk.start + length for chunk in chunks))
        shape = PrefillShape(rows, length, self.form_of(chunks[0].sequence), span)
        self.cache, hidden_BD, hidden_BTD = self.prefill_call(shape, chunks).run()
        tokens_B = first = behind = None
        wanted = [chunk.sequence.request.sampling_params.prompt_logprobs for chunk in chunks]
        if hidden_BTD is not None and any(top is not None for top in wanted):
            behind = self.score_call(hidden_BTD, chunks).run()
        if any(chunk.last for chunk in chunks):
            entering = [chunk.sequence if chunk.last else None for chunk in chunks]
            self.state_rows, tokens_B, first = self.begin_call(entering, hidden_BD).run()
            for row, sequence in enumerate(entering):
                if sequence is not None and sequence.keys is not None and sequence.keys.whole:
                    self._ends[sequence.keys.whole] = _End(hidden_BD, row)
        elif behind is None:
            return None
        return Prefilled(chunks, tokens_B, first, behind)

    def start(self, starts: Sequence[Start]) -> list[Prefilled]:
        """Lets sequences draw their first tokens whose whole prompts are in the cache.

        Returns:
            Their tokens, as of chunks without tokens.
        """
        if not starts:
            return []
        copied = [(s.source, s.own) for s in starts if s.source is not None and s.own is not None]
        if copied:
            self.cache = self.copy_call(copied).run()
        # Those that draw from the activations of one dispatch, as many at a time as that has rows.
        sources: dict[int, list[Start]] = {}
        for start in starts:
            sources.setdefault(id(self._ends[start.key].hidden_BD), []).append(start)
        found = []
        for alike in sources.values():
            hidden_BD = self._ends[alike[0].key].hidden_BD
            count = hidden_BD.shape[0]
            for together in (alike[at : at + count] for at in range(0, len(alike), count)):
                sequences = [start.sequence for start in together]
                rows = [self._ends[start.key].row for start in together]
                self.state_rows, tokens_B, first = self.begin_call(sequences, hidden_BD, rows).run()
                chunks = [Chunk(sequence, sequence.prompt, 0) for sequence in sequences]
                found.append(Prefilled(chunks, tokens_B, first, None))
        return found

    def forget(self, keys: Iterable[bytes]) -> None:
        """Lets go of what prefill left of whole prompts that nobody can find any longer."""
        for key in keys:
            self._ends.pop(key, None)

    def form_of(self, sequence: Scheduled) -> Form:
        """In which compiled form a sequence's prompt is prefilled."""
        version = sequence.version
        return self.lattice.form(None if version is None else form(self.residency, version))

    def _verb(self, verb: Any) -> Any:
        return steps.under(verb, self._compiler_options, self.placement)

    def _call(self, verb: Any, arguments: tuple[Any, ...], static: Mapping[str, Any]) -> Call:
        return Call(self._verb(verb), arguments, static)

    def _base(self) -> tuple[Any, ...]:
        return self.definition, self.platform, self.leaves

    def prefill_call(self, shape: PrefillShape, chunks: Sequence[Chunk]) -> Call:
        rows = shape.rows
        tokens_BT = np.zeros((rows, shape.length), np.int32)
        start_B, count_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        names: list[Version | None] = [None] * rows
        for row, (sequence, start, count) in enumerate(chunks):
            ids = sequence.request.prompt_token_ids[start : start + count]
            tokens_BT[row, :count] = ids
            start_B[row], count_B[row], names[row] = start, count, sequence.version
        sequences = [chunk.sequence for chunk in chunks]
        longest = max((chunk.start + chunk.length for chunk in chunks), default=1)
        paging = self._paging(sequences, rows, shape.span, longest, self.prompt_attention)
        own = row_components(self.residency, names, shape.form)
        work = Prompts(own, paging, tokens_BT, start_B, count_B)
        results = self.lattice.chunks[-1] if self.lattice.few else rows
        arguments = (*self._base(), self.residency.layers, self.cache, pack(work))
        static = dict(results=results, whole=self.options.max_logprobs > 0)
        return self._call(steps.prefill, arguments, static)

    def score_call(self, hidden_BTD: Any, chunks: Sequence[Chunk]) -> Call:
        next_BT = np.zeros(hidden_BTD.shape[:2], np.int32)
        for row, (sequence, start, count) in enumerate(chunks):
            ids = sequence.request.prompt_token_ids[start + 1 : start + count + 1]
            next_BT[row, : len(ids)] = ids
        arguments = (self.definition, self.leaves, hidden_BTD, pack(next_BT))
        return self._call(steps.score_chunks, arguments, self._top)

    def begin_call(
        self,
        entering: Sequence[Scheduled | None],
        hidden_BD: jax.Array,
        sources: Sequence[int] | None = None,
    ) -> Call:
        """``sources``: the row of the activations that each entry draws from; by default its own."""
        count = hidden_BD.shape[0]
        source_B = np.arange(count, dtype=np.int32)
        if sources is not None:
            source_B[: len(sources)] = sources
        entries = pack((source_B, self._entries(entering, count)))
        arguments = (*self._base(), self.state_rows, hidden_BD, entries)
        return self._call(steps.begin, arguments, self._top)

    @property
    def _top(self) -> dict[str, int]:
        return dict(top=self.options.max_logprobs)

    def decode(self, decode: Decode) -> Decoded:
        """Begins to draw up to ``decode.steps`` tokens for each sequence.

        Returns:
            The tokens ``[B, N]`` on the device, in order, ``RESTING`` where a sequence has ended.
        """
        versions = [sequence.version for sequence in decode.sequences]
        shape, pairs = self.lattice.decode(versions, decode.longest)
        work = self._decoding(shape, pairs, decode.sequences, decode.longest)
        asked = (sequence.request.sampling_params.logprobs for sequence in decode.sequences)
        scored = any(top is not None for top in asked)
        if self.platform.steps_on_device:
            call = self.decode_call(work, decode.steps, decode.eager, scored)
            self.cache, self.state_rows, tokens_BN, found = call.run()
            return Decoded(tokens_BN, [found] if scored else [])
        how = _least_draw([sequence.request for sequence in decode.sequences])
        packed, rows_B = self.sent((pack(work), work.rows_B))
        tokens_BN, scores = self.resting(shape.rows), []
        for _ in range(max(decode.most)):
            self.cache, logits_BV = self.forward_call(packed).run()
            draw = self.draw_call(logits_BV, rows_B, tokens_BN, how)
            self.state_rows, tokens_BN = draw.run()
            if scored:
                scores.append(self.score_drawn_call(logits_BV, tokens_BN).run())
        return Decoded(tokens_BN, scores)

    def nothing(self, shape: DecodeShape) -> Decoding:
        """A decode dispatch of a shape in which no row runs."""
        return self._decoding(shape, self.lattice.nothing(shape), [], 1)

    def _decoding(
        self, shape: DecodeShape, pairs: Mapping[str, Pairs], sequences: Sequence[Scheduled],
        longest: int,
    ) -> Decoding:  # fmt: skip
        rows_B = np.full(shape.rows, self.rows, np.int32)
        for entry, sequence in enumerate(sequences):
            assert sequence.row is not None
            rows_B[entry] = sequence.row
        attention = self.platform.decode_attention
        paging = self._paging(sequences, shape.rows, shape.span, longest, attention)
        return Decoding(pairs, paging, rows_B)

    def decode_call(self, work: Decoding, number: int, eager: bool, scored: bool = False) -> Call:
        packed = pack((work, Steps(np.int32(number), np.bool_(eager), np.bool_(scored))))
        arguments = (*self._base(), self.residency.layers, self.cache, self.state_rows, packed)
        columns = steps.Columns(self.options.decode_steps, self.options.max_logprobs)
        return self._call(steps.decode, arguments, dict(columns=columns))

    def copy_call(self, pairs: Sequence[tuple[int, int]]) -> Call:
        """Copies blocks, each to another; all are read before any is written."""
        from_M, to_M = (np.full(self.rows, self.blocks, np.int32) for _ in range(2))
        for place, (source, own) in enumerate(pairs):
            from_M[place], to_M[place] = source, own
        return self._call(steps.copy_blocks, (self.cache, pack((from_M, to_M))), {})

    def score_drawn_call(self, logits_BV: Any, tokens_BN: Any) -> Call:
        return self._call(steps.score_drawn, (logits_BV, tokens_BN), self._top)

    def forward_call(self, packed: Packed) -> Call:
        arguments = (*self._base(), self.residency.layers, self.cache, self.state_rows, packed)
        return self._call(steps.forward, arguments, {})

    def draw_call(self, logits_BV: Any, rows_B: Any, tokens_BN: Any, how: Draw) -> Call:
        return self._call(
            steps.draw, (self.state_rows, logits_BV, rows_B, tokens_BN), dict(how=how)
        )

    def copy_out(self, blocks: Sequence[int]) -> Any:
        """The contents of some blocks, on the host."""
        numbers_M = self._block_numbers(blocks)
        copies = jax.device_get(self._verb(steps.take_blocks)(self.cache, numbers_M))
        # Copied again: what lies behind the last block is not kept.
        return jax.tree.map(lambda pool: pool[: len(blocks)].copy(), copies)

    def swap_in(self, sequence: Scheduled, copies: Any) -> None:
        """Puts such contents into a sequence's blocks and gives it its row."""
        self.copy_in(sequence.blocks[: jax.tree.leaves(copies)[0].shape[0]], copies)
        self.insert([sequence], [sequence.stream.token_ids[-1]])

    def insert(self, entering: Sequence[Scheduled | None], tokens: list[int]) -> None:
        """Gives rows to sequences whose last tokens are these."""
        packed = pack((np.asarray(tokens, np.int32), self._entries(entering, len(tokens))))
        self.state_rows = self._verb(steps.insert)(self.state_rows, packed)

    def copy_in(self, blocks: Sequence[int], copies: Any) -> None:
        """Puts contents of :meth:`copy_out` into blocks, the same or others."""

        def pad(copy: np.ndarray) -> np.ndarray:
            return np.pad(copy, ((0, self.lattice.width - len(copy)), *((0, 0),) * 3))

        numbers_M = self._block_numbers(blocks)
        self.cache = self._verb(steps.put_blocks)(self.cache, numbers_M, jax.tree.map(pad, copies))

    def sent(self, tree: Any) -> Any:
        """Small arrays of the host on the device, once for several programs."""
        if not self.placement.allocate:
            return tree
        return jax.device_put(tree, self.placement.everywhere)

    def beside_parameters(self, tree: Any) -> Any:
        """The arrays, committed to the parameters' devices where those are (as a checkpoint's can be).

        What a step returns is committed then, and a program compiled for other arrays would not do.
        """
        return self.placement.put(tree)

    def _block_numbers(self, blocks: Sequence[int]) -> np.ndarray:
        numbers_M = np.full(self.lattice.width, self.blocks, np.int32)
        numbers_M[: len(blocks)] = blocks
        return numbers_M

    def _paging(
        self, sequences: Sequence[Scheduled], rows: int, span: int, longest: int, attention: str
    ) -> Paging:
        width = -(-span // self.options.block_size)
        table_BM = np.full((rows, width), self.blocks, np.int32)
        for row, sequence in enumerate(sequences):
            own = sequence.blocks[:width]
            table_BM[row, : len(own)] = own
        trips = (
            np.int32(key_stretches(longest, self.options.block_size))
            if self.lattice.dynamic
            else None
        )
        return Paging(table_BM, trips, attention)

    def _entries(self, entering: Sequence[Scheduled | None], count: int) -> Entries:
        """What sequences start from that begin to decode; ``None`` is no sequence, and stands past the
        last row.
        """
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
                left_B[entry] = sequence.budget - drawn
                stops = sequence.stream.stops
                stops_BE[entry, : len(stops)] = sorted(stops)
        settings = self._settings(entering, count)
        return Entries(row_B, position_B, drawn_B, left_B, stops_BE, settings)

    def _settings(self, entering: Sequence[Scheduled | None], count: int) -> Settings:
        temperature_B, top_p_B = np.zeros(count, np.float32), np.ones(count, np.float32)
        top_k_B, seeded_B = np.zeros(count, np.int32), np.zeros(count, bool)
        seed_BX = np.zeros((count, 2), np.uint32)
        for row, sequence in enumerate(entering):
            if sequence is None:
                continue
            params, fold_in = sequence.request.sampling_params, sequence.request.fold_in
            temperature_B[row] = params.temperature
            top_k_B[row], top_p_B[row] = params.top_k, params.top_p
            seeded_B[row] = params.seed is not None
            assert fold_in is not None
            seed_BX[row] = (self.options.seed, fold_in) if params.seed is None else (params.seed, 0)
        return Settings(temperature_B, top_k_B, top_p_B, seed_BX, seeded_B)


def _least_draw(requests: Sequence[Request]) -> Draw:
    """The cheapest way to draw that gives every request its own token."""
    warm = [r.sampling_params for r in requests if r.sampling_params.temperature > 0]
    if any(params.top_k > 0 or params.top_p < 1 for params in warm):
        return "digits"
    return "plain" if warm else "greedy"
