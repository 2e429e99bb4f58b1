"""Which components the rows of a batch use: pair lists in bucketed sizes, on the host.

Bucket sizes bound the number of programs that a jitted step is compiled to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flora_jax.mixing.bank import Residents, Slots
from flora_jax.mixing.ragged import GROUP, NOTHING, Pairs, RowComponents


def _list_pairs(
    owned: Sequence[Sequence[int]], length: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, slots ``[length]`` and each row's own entries ``[rows, most]``, padded."""
    # Lists first: an array's single entries are slow to write, and this is done at every dispatch.
    row = [number for number, own in enumerate(owned) for _ in own]
    slot = [component for own in owned for component in own]
    mine, used = [], 0
    for own in owned:
        mine.append([*range(used, used + len(own)), *[length] * (most - len(own))])
        used += len(own)
    row += [0] * (length - used)
    slot += [NOTHING] * (length - used)
    return (
        np.array(row, np.int32),
        np.array(slot, np.int32),
        np.array(mine, np.int32).reshape(len(owned), most),
    )


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


class Groups(NamedTuple):
    """Additive components of a batch: ``width`` in each row's own place, ``more`` further groups."""

    width: int
    more: int


def group_lattice(rows: int, most: int) -> tuple[Groups, ...]:
    """Bucket sizes for up to ``most`` additive components a row: doubling widths, then groups."""
    sizes = [Groups(0, 0)]
    while sizes[-1].width < min(most, GROUP):
        sizes.append(Groups(max(1, 2 * sizes[-1].width), 0))
    further = pair_lattice(rows, max(0, -(-most // GROUP) - 1))
    return (*sizes, *(Groups(GROUP, more) for more in further if more))


def group_bucket(counts: Sequence[int], lattice: Sequence[Groups]) -> Groups:
    """The smallest size of the lattice that holds rows with so many additive components.

    Raises:
        ValueError: even the largest does not.
    """
    width = min(GROUP, max(counts, default=0))
    more = sum(max(0, -(-count // GROUP) - 1) for count in counts)
    for size in lattice:
        if size.width >= width and size.more >= more:
            return size
    raise ValueError(f"{Groups(width, more)} does not fit the largest bucket {lattice[-1]}")


def _list_groups(
    owned: Sequence[Sequence[int]], size: Groups, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Slots ``[rows, width]``; of the groups rows, slots ``[more, GROUP]`` and whose they are."""
    heads = [own[:GROUP] for own in owned]
    first = [[*head, *[NOTHING] * (size.width - len(head))] for head in heads]
    groups = [[own[at : at + GROUP] for at in range(GROUP, len(own), GROUP)] for own in owned]
    width = -(-most // GROUP) - 1 if size.more else 0
    row, _, mine = _list_pairs([range(len(own)) for own in groups], size.more, width)
    slot = [[*group, *[NOTHING] * (GROUP - len(group))] for own in groups for group in own]
    slot += [[NOTHING] * GROUP] * (size.more - len(slot))
    return (
        np.array(first, np.int32).reshape(len(owned), size.width),
        row,
        np.array(slot, np.int32).reshape(size.more, GROUP),
        mine,
    )


def list_pairs(
    bank: Residents, names: Sequence[Any], lattice: Mapping[str, tuple[int, Groups]] | None = None
) -> dict[str, Pairs]:
    """Each row's components on each target of the bank, for rows that use the named adapters.

    ``lattice`` fixes the numbers of further multiplicative pairs and of additive components by target;
    without it each is the smallest bucket of :func:`pair_lattice` and :func:`group_lattice` that fits.

    Raises:
        KeyError: an adapter is not resident.
        ValueError: the pairs do not fit the given numbers.
    """
    result = {}
    for target in bank.targets:
        owned = [bank.of(name, target) for name in names]
        most_mul, most_add = bank.most(target)
        if lattice is None:
            pairs = bucket(
                sum(len(slots.multiplicative) - 1 for slots in owned),
                pair_lattice(len(names), most_mul - 1),
            )
            counts = [len(slots.additive) for slots in owned]
            groups = group_bucket(counts, group_lattice(len(names), most_add))
        else:
            pairs, groups = lattice[target]
        result[target] = list_owned(owned, (most_mul, most_add), pairs, groups)
    return result


def list_owned(owned: Sequence[Slots], most: tuple[int, int], pairs: int, groups: Groups) -> Pairs:
    """The components of rows with these slots on one target, padded to so many pairs and groups.

    ``most`` is the largest number of multiplicative and of additive components of one adapter.

    Raises:
        ValueError: the components do not fit the given numbers.
    """
    more = [slots.multiplicative[1:] for slots in owned]
    add = [slots.additive for slots in owned]
    most_mul, most_add = most
    bucket(sum(map(len, more)), (pairs,))
    group_bucket([len(own) for own in add], (groups,))
    # Without pairs there is nothing to gather, whatever the resident adapters could ask for.
    row, slot, mine = _list_pairs(more, pairs, most_mul - 1 if pairs else 0)
    add_slot, more_row, more_slot, more_mine = _list_groups(add, groups, most_add)
    return Pairs(
        first_B=np.asarray([slots.multiplicative[0] for slots in owned], np.int32),
        row_P=row,
        slot_P=slot,
        mine_BJ=mine,
        add_slot_BJ=add_slot,
        more_row_A=more_row,
        more_slot_AJ=more_slot,
        more_mine_BN=more_mine,
        bias_B=np.asarray([slots.bias for slots in owned], np.int32),
    )


class Form(NamedTuple):
    """How a prompt's pass treats one adapter: padded numbers of components on ``targets``.

    On the bank's other targets it is the base's, (1, 0). With ``merged``, two or more multiplicative
    components are merged into the explicit weight.
    """

    multiplicative: int
    additive: int
    targets: tuple[str, ...]
    merged: bool = True


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
        result[target] = RowComponents(
            slot_BJ, add_slot_BJ, bias_B, merged=shape.merged and mul > 1
        )
    return result
