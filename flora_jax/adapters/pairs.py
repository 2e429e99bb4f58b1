"""Which components the rows of a batch use: pair lists in bucketed sizes, on the host.

Bucket sizes bound the number of programs that a jitted step is compiled to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flora_jax.adapters.bank import Residents
from flora_jax.adapters.ragged import NOTHING, Pairs, RowComponents


def _list_pairs(
    owned: Sequence[Sequence[int]], length: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, slots ``[length]`` and each row's own entries ``[rows, most]``, padded."""
    row = np.zeros(length, np.int32)
    slot = np.full(length, NOTHING, np.int32)
    mine = np.full((len(owned), most), length, np.int32)
    used = 0
    for number, own in enumerate(owned):
        for position, component in enumerate(own):
            row[used], slot[used], mine[number, position] = number, component, used
            used += 1
    return row, slot, mine


def bucket(count: int, lattice: Sequence[int]) -> int:
    """The smallest size of the lattice that holds ``count``.

    Raises:
        ValueError: even the largest does not.
    """
    for size in lattice:
        if size >= count:
            return size
    raise ValueError(f"{count} does not fit the largest bucket {max(lattice)}")


def pair_lattice(rows: int, most: int) -> tuple[int, ...]:
    """Bucket sizes for up to ``rows · most`` pairs: none, then from ``rows`` doubling to the whole."""
    whole = rows * most
    sizes = [0]
    size = rows
    while size < whole:
        sizes.append(size)
        size *= 2
    return (*sizes, whole) if whole else (0,)


def list_pairs(
    bank: Residents, names: Sequence[Any], lattice: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, Pairs]:
    """Each row's components on each target of the bank, for rows that use the named adapters.

    ``lattice`` fixes the numbers of further multiplicative and of additive pairs by target; without
    it each is the smallest bucket of :func:`pair_lattice` that fits.

    Raises:
        KeyError: an adapter is not resident.
        ValueError: the pairs do not fit the given numbers.
    """
    result = {}
    for target in bank.targets:
        owned = [bank.of(name, target) for name in names]
        more = [slots.multiplicative[1:] for slots in owned]
        add = [slots.additive for slots in owned]
        most_mul, most_add = bank.most(target)
        if lattice is None:
            sizes = (
                bucket(sum(map(len, more)), pair_lattice(len(names), most_mul - 1)),
                bucket(sum(map(len, add)), pair_lattice(len(names), most_add)),
            )
        else:
            sizes = lattice[target]
            for found, size in zip((more, add), sizes, strict=True):
                bucket(sum(map(len, found)), (size,))
        # Without pairs there is nothing to gather, whatever the resident adapters could ask for.
        row, slot, mine = _list_pairs(more, sizes[0], most_mul - 1 if sizes[0] else 0)
        add_row, add_slot, add_mine = _list_pairs(add, sizes[1], most_add if sizes[1] else 0)
        result[target] = Pairs(
            first_B=np.asarray([slots.multiplicative[0] for slots in owned], np.int32),
            row_P=row,
            slot_P=slot,
            mine_BJ=mine,
            add_row_A=add_row,
            add_slot_A=add_slot,
            add_mine_BJ=add_mine,
            bias_B=np.asarray([slots.bias for slots in owned], np.int32),
        )
    return result


class Form(NamedTuple):
    """How a prompt's pass treats one adapter: padded numbers of components on ``targets``.

    On the bank's other targets it is the base's, (1, 0).
    """

    multiplicative: int
    additive: int
    targets: tuple[str, ...]

    @property
    def merged(self) -> bool:
        """Two or more multiplicative components are merged into the explicit weight."""
        return self.multiplicative > 1


BASE_FORM = Form(1, 0, ())


def form(bank: Residents, name: Any) -> Form:
    """The form of an adapter; it follows from the adapter alone.

    Raises:
        KeyError: the adapter is not resident.
    """
    own = {target: bank.of(name, target) for target in bank.targets}
    targets = tuple(t for t, slots in own.items() if slots != bank.of(None, t))
    mul = max((len(slots.multiplicative) for slots in own.values()), default=1)
    add = max((len(slots.additive) for slots in own.values()), default=0)
    return Form(padded_multiplicative(mul), padded_additive(add), targets)


def padded_multiplicative(count: int) -> int:
    """One, or a power of two from four: below, padding costs less than a program more."""
    return 1 if count <= 1 else max(4, 1 << (count - 1).bit_length())


def padded_additive(count: int) -> int:
    """None, or a power of four: an additive component costs a prompt's pass next to nothing."""
    size = 4
    while size < count:
        size *= 4
    return size if count else 0


def row_components(bank: Residents, names: Sequence[Any], shape: Form) -> dict[str, RowComponents]:
    """The components of rows that use the named adapters, by target, all in one form.

    Raises:
        KeyError: an adapter is not resident.
        ValueError: an adapter has more components than the form holds.
    """
    result = {}
    for target in bank.targets:
        mul, add = shape[:2] if target in shape.targets else (1, 0)
        slot_BJ = np.full((len(names), mul), NOTHING, np.int32)
        add_slot_BJ = np.full((len(names), add), NOTHING, np.int32)
        owned = [bank.of(name, target) for name in names]
        for row, slots in enumerate(owned):
            bucket(len(slots.multiplicative), (mul,))
            bucket(len(slots.additive), (add,))
            slot_BJ[row, : len(slots.multiplicative)] = slots.multiplicative
            add_slot_BJ[row, : len(slots.additive)] = slots.additive
        bias_B = np.asarray([slots.bias for slots in owned], np.int32)
        result[target] = RowComponents(slot_BJ, add_slot_BJ, bias_B, merged=mul > 1)
    return result
