"""Which shapes the engine's steps are compiled for, and how a batch is padded to one of them.

The lattice of shapes is short, and all of it is known at the start. Knows nothing of requests or
scheduling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from flora_jax.mixing.bank import BASE, Residents, Slots
from flora_jax.mixing.pairs import (
    BASE_FORM,
    Form,
    Groups,
    bucket,
    group_bucket,
    group_lattice,
    list_owned,
    padded_additive,
    padded_multiplicative,
    pair_lattice,
)
from flora_jax.mixing.ragged import Pairs
from flora_jax.platforms import Platform
from flora_jax.serve.options import EngineOptions


class DecodeShape(NamedTuple):
    """Rows, the levels of the pairs and of the additive groups, positions of the table."""

    rows: int
    level: tuple[int, int]
    span: int


class PrefillShape(NamedTuple):
    """Chunks, tokens of each, the form of their adapters, positions of the table."""

    rows: int
    length: int
    form: Form
    span: int


class _Listed(NamedTuple):
    """A batch's slots by target, padded, its level, and the lists that follow from both."""

    owned: dict[str, list[Slots]]
    level: tuple[int, int]
    pairs: dict[str, Pairs]


class Lattice:
    """The shapes of one engine.

    Args:
        bank: whose targets and largest adapters decide the pair lists.
        options: the engine's.
        context: the longest sequence.
        platform: whether attention's trip count is a value, so that one span does for all lengths, and
            whether a few large shapes are better than the closest.
        groups: the sets of targets that adapters have, for their forms; all targets always count.
    """

    def __init__(
        self,
        bank: Residents,
        options: EngineOptions,
        context: int,
        platform: Platform,
        groups: Sequence[tuple[str, ...]] = (),
    ):
        self.bank, self.context = bank, context
        self.options = options
        self.dynamic = platform.values_as_trip_counts
        self.few = platform.few_shapes
        sizes = options.on(platform)
        self.rows = sizes.row_buckets
        self.budget = sizes.max_num_batched_tokens
        self.chunks = tuple(sorted({1, sizes.prefill_chunks}))
        if options.batch_invariant:
            self.chunks = (sizes.prefill_chunks,)
        self.short = min(sizes.chunk, context)
        self.merged = options.merge_prompts and self.short >= platform.merged_from
        self.long = self.short
        if platform.long_chunks:
            self.long = min(sizes.chunk * sizes.prefill_chunks, context)
        self.width = -(-context // options.block_size)
        one_span = self.dynamic or options.batch_invariant
        self.spans = (context,) if one_span else _spans(context, 512)
        self.prompt_spans = self.spans
        if self.few and not one_span:
            # What a short prompt's attention to positions that are not there costs is little.
            self.prompt_spans = _spans(context, 4 * self.short)
        most = [bank.most(target) for target in bank.targets]
        # The lists of the last batch by number of rows: most batches have the slots of the one before.
        self._listed: dict[int, _Listed] = {}
        self._most = tuple(max(counts) for counts in zip(*most)) if most else (1, 0)
        self.groups = tuple(dict.fromkeys((*groups, bank.targets))) if bank.targets else ()
        if self.few and self.groups:
            self.groups = (bank.targets,)

    def decode_shapes(self) -> list[DecodeShape]:
        """Everything that decoding can ask for."""
        return [
            DecodeShape(rows, level, span)
            for rows in self.rows
            for level in sorted(set(self._levels(rows)))
            for span in self.spans
        ]

    def prefill_shapes(self) -> list[PrefillShape]:
        """Everything that prefilling can ask for."""
        sizes = [(rows, self.short) for rows in self.chunks]
        if self.long > self.short:
            sizes.append((1, self.long))
        spans = self.prompt_spans
        return [
            PrefillShape(rows, length, form, span)
            for (rows, length), form, span in itertools.product(sizes, self.forms(), spans)
            if span >= length or span == spans[-1]
        ]

    def forms(self) -> list[Form]:
        """The base's form and those that an adapter within the bank's bounds can have.

        A few of them are one for all with one multiplicative component, the base included, and one for
        all with more.
        """
        mul, add = self._most
        if not self.groups:
            return [BASE_FORM]
        if self.few:
            sizes = {(1, add), *({(mul, 0)} if mul > 1 else ())}
        else:
            sizes = {(padded_multiplicative(n), 0) for n in range(1, mul + 1)}
            sizes |= {(1, padded_additive(n)) for n in range(1, add + 1)}
        adapted = [
            Form(own_mul, own_add, group, self.merged)
            for group in self.groups
            for own_mul, own_add in sorted(sizes)
        ]
        return adapted if self.few else [BASE_FORM, *adapted]

    def form(self, own: Form | None) -> Form:
        """The compiled form for an adapter's own: on the smallest known set of targets that has its."""
        if self.few and self.groups:
            simple = own is None or own.multiplicative == 1
            return self.forms()[0 if simple else -1]
        if own is None or not own.targets:
            return BASE_FORM
        fitting = [group for group in self.groups if set(own.targets) <= set(group)]
        targets = min(fitting, key=len)
        return own._replace(targets=targets, merged=self.merged)

    def chunk_rows(self, chunks: int) -> int:
        """Rows of a dispatch of short chunks."""
        return bucket(chunks, self.chunks)

    def prompt_span(self, length: int) -> int:
        """The table's positions for prompts of up to ``length``, padding behind the context aside."""
        return bucket(min(length, self.prompt_spans[-1]), self.prompt_spans)

    def decode(self, names: Sequence[Any], longest: int) -> tuple[DecodeShape, dict[str, Pairs]]:
        """The smallest shape for rows that use the named adapters and for sequences of up to ``longest``
        positions, and the rows' components on each target, padded to it.

        Raises:
            KeyError: an adapter is not resident.
        """
        rows = bucket(len(names), self.rows)
        padding = [BASE] * (rows - len(names))
        owned = {
            target: [*(self.bank.of(name, target) for name in names), *padding]
            for target in self.bank.targets
        }
        listed = self._listed.get(rows)
        if listed is None or listed.owned != owned:
            level = self._level(rows, owned)
            listed = _Listed(owned, level, self._lists(rows, level, owned))
            self._listed[rows] = listed
        span = self.spans[-1]
        if not self.options.batch_invariant:
            span = bucket(min(longest, span), self.spans)
        return DecodeShape(rows, listed.level, span), listed.pairs

    def nothing(self, shape: DecodeShape) -> dict[str, Pairs]:
        """The lists of a shape whose rows are all under the base model."""
        owned = {target: [BASE] * shape.rows for target in self.bank.targets}
        return self._lists(shape.rows, shape.level, owned)

    def _level(self, rows: int, owned: dict[str, list[Slots]]) -> tuple[int, int]:
        if self.options.batch_invariant:
            return max(self._levels(rows))
        needed = [0, 0]
        for target, own in owned.items():
            pairs, groups = self._sizes(target, rows)
            found = bucket(sum(len(slots.multiplicative) - 1 for slots in own), pairs)
            most = group_bucket([len(slots.additive) for slots in own], groups)
            needed = [max(needed[0], pairs.index(found)), max(needed[1], groups.index(most))]
        enough = (
            level for level in self._levels(rows) if level[0] >= needed[0] and level[1] >= needed[1]
        )
        return min(enough, key=lambda level: (sum(level), level))

    def _lists(
        self, rows: int, level: tuple[int, int], owned: dict[str, list[Slots]]
    ) -> dict[str, Pairs]:
        sizes = self.pair_sizes(DecodeShape(rows, level, self.spans[-1]))
        return {
            target: list_owned(own, self.bank.most(target), *sizes[target])
            for target, own in owned.items()
        }

    def pair_sizes(self, shape: DecodeShape) -> dict[str, tuple[int, Groups]]:
        """By target the length of the list of pairs, and the numbers of additive components."""
        result = {}
        for target in self.bank.targets:
            pairs, groups = self._sizes(target, shape.rows)
            mul, add = shape.level
            result[target] = pairs[min(mul, len(pairs) - 1)], groups[min(add, len(groups) - 1)]
        return result

    def _sizes(self, target: str, rows: int) -> tuple[tuple[int, ...], tuple[Groups, ...]]:
        mul, add = self.bank.most(target)
        return _bucket_sizes(rows, mul, add)

    def _levels(self, rows: int) -> Iterator[tuple[int, int]]:
        """One kind of pairs alone at any level, or both at one: all combinations would be too many.

        A few of them are three: nothing, something in between, and all.
        """
        mul, add = self._most
        tops = len(pair_lattice(rows, mul - 1)) - 1, len(group_lattice(rows, add)) - 1
        if self.options.batch_invariant:
            yield tops
            return
        if self.few:
            # Additive pairs cost little, so those alone are what lies between where both kinds are.
            between = (0, tops[1]) if all(tops) else (-(-tops[0] // 2), -(-tops[1] // 2))
            yield from dict.fromkeys(((0, 0), between, tops))
            return
        yield from ((level, 0) for level in range(tops[0] + 1))
        yield from ((0, level) for level in range(1, tops[1] + 1))
        if all(tops):
            yield from ((min(n, tops[0]), min(n, tops[1])) for n in range(1, max(tops) + 1))


@cache
def _bucket_sizes(rows: int, mul: int, add: int) -> tuple[tuple[int, ...], tuple[Groups, ...]]:
    return pair_lattice(rows, mul - 1), group_lattice(rows, add)


def _spans(context: int, first: int) -> tuple[int, ...]:
    """Powers of four times ``first`` below the context, and the context."""
    sizes = []
    size = first
    while size < context:
        sizes.append(size)
        size *= 4
    return (*sizes, context)
