"""Which components the rows of a batch use: pair lists in bucketed sizes, on the host.

Bucket sizes bound the number of programs that a jitted step is compiled to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.bank import Bank
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
    bank: Bank, names: Sequence[str | None], lattice: Mapping[str, tuple[int, int]] | None = None
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
            first_B=jnp.asarray([slots.multiplicative[0] for slots in owned], jnp.int32),
            row_P=jnp.asarray(row),
            slot_P=jnp.asarray(slot),
            mine_BJ=jnp.asarray(mine),
            add_row_A=jnp.asarray(add_row),
            add_slot_A=jnp.asarray(add_slot),
            add_mine_BJ=jnp.asarray(add_mine),
            bias_B=jnp.asarray([slots.bias for slots in owned], jnp.int32),
        )
    return result


def form(bank: Bank, name: str | None) -> dict[str, tuple[int, int]]:
    """How many multiplicative and additive components a single row is padded to, by target.

    Powers of two that follow from the adapter alone, the same for all its targets; a target it does
    not have stays at (1, 0).

    Raises:
        KeyError: the adapter is not resident.
    """
    own = bank.slots[name]
    mul = max((len(slots.multiplicative) for slots in own.values()), default=1)
    add = max((len(slots.additive) for slots in own.values()), default=0)
    sizes = _next_power(mul), _next_power(add)
    return {target: sizes if target in own else (1, 0) for target in bank.targets}


def _next_power(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


def one_row(bank: Bank, name: str | None) -> dict[str, RowComponents]:
    """The components of one row that uses the named adapter, by target, in the adapter's form.

    Two or more multiplicative components are merged into the explicit weight, one is factored.

    Raises:
        KeyError: the adapter is not resident.
    """
    result = {}
    for target, (most_mul, most_add) in form(bank, name).items():
        owned = bank.of(name, target)
        slot = np.full(most_mul, NOTHING, np.int32)
        slot[: len(owned.multiplicative)] = owned.multiplicative
        add = np.full(most_add, NOTHING, np.int32)
        add[: len(owned.additive)] = owned.additive
        result[target] = RowComponents(
            jnp.asarray(slot), jnp.asarray(add), jnp.int32(owned.bias), merged=most_mul > 1
        )
    return result
