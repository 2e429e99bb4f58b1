"""Which shapes the engine's steps are compiled for: a short lattice, all of it known at the start.

Knows nothing of requests or scheduling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flora_jax.adapters.bank import Residents
from flora_jax.adapters.pairs import (
    BASE_FORM,
    Form,
    Groups,
    bucket,
    group_bucket,
    group_lattice,
    padded_additive,
    padded_multiplicative,
    pair_lattice,
)
from flora_jax.serve.options import EngineOptions


class DecodeShape(NamedTuple):
    """Rows, the levels of the pairs and of the additive groups, positions of the table."""

    rows: int
    level: tuple[int, int]
    span: int


class PrefillShape(NamedTuple):
    """Pieces, tokens of each, the form of their adapters, positions of the table."""

    rows: int
    length: int
    form: Form
    span: int


class Lattice:
    """The shapes of one engine.

    Args:
        bank: whose targets and largest adapters decide the pair lists.
        options: the engine's.
        context: the longest sequence.
        dynamic: attention's trip count is a value, not a shape, so one span does for all lengths. Right
            for a CPU; a GPU would ask the host before every trip.
        groups: the sets of targets that adapters have, for their forms; all targets always count.
    """

    def __init__(
        self,
        bank: Residents,
        options: EngineOptions,
        context: int,
        dynamic: bool,
        groups: Sequence[tuple[str, ...]] = (),
    ):
        self.bank = bank
        self.options = options
        self.dynamic = dynamic
        self.rows = options.buckets()
        self.pieces = tuple(sorted({1, options.pieces}))
        if options.batch_invariant:
            self.pieces = (options.pieces,)
        self.short = min(options.chunk, context)
        self.long = min(options.chunk * options.pieces, context)
        self.width = -(-context // options.page)
        self.spans = (context,) if dynamic or options.batch_invariant else _spans(context)
        most = [bank.most(target) for target in bank.targets]
        self._most = tuple(max(counts) for counts in zip(*most)) if most else (1, 0)
        self.groups = tuple(dict.fromkeys((*groups, bank.targets))) if bank.targets else ()

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
        sizes = [(rows, self.short) for rows in self.pieces]
        if self.long > self.short:
            sizes.append((1, self.long))
        return [
            PrefillShape(rows, length, form, span)
            for (rows, length), form, span in itertools.product(sizes, self.forms(), self.spans)
            if span >= length or span == self.spans[-1]
        ]

    def forms(self) -> list[Form]:
        """The base's form and those that an adapter within the bank's bounds can have."""
        mul, add = self._most
        sizes = {(padded_multiplicative(n), 0) for n in range(1, mul + 1)}
        sizes |= {(1, padded_additive(n)) for n in range(1, add + 1)}
        return [
            BASE_FORM,
            *(
                Form(*size, group, self.options.merge_prompts)
                for group in self.groups
                for size in sorted(sizes)
            ),
        ]

    def form(self, own: Form | None) -> Form:
        """The compiled form for an adapter's own: on the smallest known set of targets that has its."""
        if own is None or not own.targets:
            return BASE_FORM
        fitting = [group for group in self.groups if set(own.targets) <= set(group)]
        targets = min(fitting, key=len)
        return own._replace(targets=targets, merged=self.options.merge_prompts)

    def piece_rows(self, pieces: int) -> int:
        """Rows of a dispatch of short pieces."""
        return bucket(pieces, self.pieces)

    def span(self, length: int) -> int:
        """The table's positions for sequences of up to ``length``, padding behind the context aside."""
        return bucket(min(length, self.spans[-1]), self.spans)

    def decode(self, names: Sequence[Any], longest: int) -> DecodeShape:
        """The smallest shape for rows that use the named adapters."""
        rows = bucket(len(names), self.rows)
        if self.options.batch_invariant:
            return DecodeShape(rows, max(self._levels(rows)), self.spans[-1])
        needed = [0, 0]
        for target in self.bank.targets:
            owned = [self.bank.of(name, target) for name in names]
            pairs, groups = self._sizes(target, rows)
            found = bucket(sum(len(slots.multiplicative) - 1 for slots in owned), pairs)
            most = group_bucket([len(slots.additive) for slots in owned], groups)
            needed = [max(needed[0], pairs.index(found)), max(needed[1], groups.index(most))]
        mul, add = needed
        if mul and add:
            mul = add = max(mul, add)
            top = max(self._levels(rows))
            mul, add = min(mul, top[0]), min(add, top[1])
        return DecodeShape(rows, (mul, add), self.span(longest))

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
        return pair_lattice(rows, mul - 1), group_lattice(rows, add)

    def _levels(self, rows: int) -> Iterator[tuple[int, int]]:
        """One kind of pairs alone at any level, or both at one: all combinations would be too many."""
        mul, add = self._most
        tops = len(pair_lattice(rows, mul - 1)) - 1, len(group_lattice(rows, add)) - 1
        if self.options.batch_invariant:
            yield tops
            return
        yield from ((level, 0) for level in range(tops[0] + 1))
        yield from ((0, level) for level in range(1, tops[1] + 1))
        if all(tops):
            yield from ((min(n, tops[0]), min(n, tops[1])) for n in range(1, max(tops) + 1))


def _spans(context: int) -> tuple[int, ...]:
    """Powers of four from 512 below the context, and the context."""
    sizes = []
    size = 512
    while size < context:
        sizes.append(size)
        size *= 4
    return (*sizes, context)
