"""The bank: resident adapters' components stacked per layer and target, and where an adapter's lie.

The device side is a pytree of ``TargetBank`` of fixed size into which adapters are written; the host side
(names, slots) is plain Python and NumPy. A target that no adapter touches is absent, and keeps its plain
product. Slots 0 and 1 are never given away (``ragged.NOTHING``, ``ragged.IDENTITY``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.kind import Components, kind_of, ones, zeros
from flora_jax.adapters.model_adapter import ModelAdapter, WeightsOf, check_fits
from flora_jax.mixing.ragged import IDENTITY, BankLayers, TargetBank


class Count(NamedTuple):
    """Numbers of multiplicative and additive components and of bias offsets."""

    multiplicative: int
    additive: int
    bias: int


# What the bank begins with.
RESERVED = Count(2, 1, 1)


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where one adapter's components lie on one target; ``multiplicative`` has at least one."""

    multiplicative: tuple[int, ...] = (IDENTITY,)
    additive: tuple[int, ...] = ()
    bias: int = 0

    def numbers(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The slots that are the adapter's own, multiplicative, additive and of the bias."""
        return self.multiplicative, self.additive, (self.bias,) if self.bias else ()


BASE = Slots()


class SlotArrays(NamedTuple):
    """Where one adapter is written on one target, int32, each padded to one length."""

    multiplicative_J: np.ndarray
    additive_J: np.ndarray
    bias_J: np.ndarray


class Residents(Protocol):
    """Who is resident where; an adapter is named by any hashable, ``None`` is the base."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections of the bank."""
        ...

    def of(self, name: Any, target: str) -> Slots:
        """Raises ``KeyError`` for an adapter that is not resident."""
        ...

    def most(self, target: str) -> tuple[int, int]:
        """The most multiplicative and additive components that an adapter may have."""
        ...


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An adapter's components on the host, ready to be written: ``layers[n][target]``.

    The numbers of components are the same in every layer: where an adapter has a lower rank in some
    layer, or none, the rest are zeros there, and the first the identity.
    """

    layers: tuple[dict[str, Components], ...]
    counts: Mapping[str, Count]

    @property
    def bytes(self) -> int:
        arrays = (a for layer in self.layers for c in layer.values() for a in vars(c).values())
        return sum(array.nbytes for array in arrays if array is not None)


def prepare(
    adapter: ModelAdapter,
    projections: Mapping[str, tuple[int, int]],
    layers: int,
    where: str = "adapter",
    weights: WeightsOf | None = None,
) -> Prepared:
    """The adapter's components as float32 vectors on the host.

    Args:
        adapter: its factors, on the host or a device.
        projections: ``{target: (inputs, outputs)}`` of the base.
        layers: of the base.
        where: names the adapter in errors.
        weights: gives the base's weights, as they are held, to a kind that asks for them.

    Raises:
        InputError: a width or the number of layers is not the base model's; ``where`` names it.
        ValueError: a kind asks for the base's weights, and there are none.
    """
    check_fits(adapter, projections, layers, where)
    found: list[dict[str, Components]] = [{} for _ in range(layers)]
    counts = {}
    for target in adapter.targets():
        inputs, outputs = projections[target]
        own = [
            kind_of(layer[target]).components(
                layer[target], inputs, outputs, weights and partial(weights, number, target)
            )
            if target in layer
            else _identity(inputs, outputs)
            for number, layer in enumerate(adapter.layers)
        ]
        touches_bias = any(c.bias_scale_O is not None for c in own)
        counts[target] = Count(
            max(c.pre_RI.shape[0] for c in own),
            max(c.down_RI.shape[0] for c in own),
            int(touches_bias),
        )
        for number, components in enumerate(own):
            found[number][target] = _padded(components, counts[target])
    return Prepared(tuple(found), counts)


def _identity(inputs: int, outputs: int) -> Components:
    return Components(ones(1, inputs), ones(1, outputs), zeros(0, inputs), zeros(0, outputs))


def _padded(components: Components, count: Count) -> Components:
    """Fills up with components of zeros to the given numbers."""

    def fill(array: np.ndarray, rows: int) -> np.ndarray:
        return np.pad(array, ((0, rows - array.shape[0]), (0, 0)))

    scale_O = components.bias_scale_O
    if count.bias and scale_O is None:
        scale_O = zeros(1, components.post_RO.shape[1])[0]
    return Components(
        fill(components.pre_RI, count.multiplicative),
        fill(components.post_RO, count.multiplicative),
        fill(components.down_RI, count.additive),
        fill(components.up_RO, count.additive),
        scale_O,
    )


def empty_layers(
    room: Mapping[str, Count],
    projections: Mapping[str, tuple[int, int]],
    layers: int,
    additive: Any = np.float32,
    put: Callable[[str, TargetBank], TargetBank] = lambda target, bank: bank,
) -> tuple[dict[str, TargetBank], ...]:
    """A bank with room for so many components by target, the reserved ones included.

    ``additive`` is the dtype of the additive vectors. Multiplicative ones are float32 always: they lie
    near one, where steps of 16 bits swallow a small update. ``put`` moves a target's bank to where it
    belongs.
    """

    def target_bank(target: str) -> TargetBank:
        (inputs, outputs), count = projections[target], room[target]
        # Made on the host: an array of its own for every layer, so that all can be donated.
        pre_CI, post_CO = zeros(count.multiplicative, inputs), zeros(count.multiplicative, outputs)
        pre_CI[IDENTITY] = post_CO[IDENTITY] = 1.0
        bank = TargetBank(
            jnp.array(pre_CI),
            jnp.array(post_CO),
            jnp.array(zeros(count.additive, inputs), additive),
            jnp.array(zeros(count.additive, outputs), additive),
            jnp.array(zeros(count.bias, outputs)) if count.bias > RESERVED.bias else None,
        )
        return put(target, bank)

    targets = [target for target in projections if target in room]
    return tuple({target: target_bank(target) for target in targets} for _ in range(layers))


@partial(jax.jit, donate_argnames="layers")
def write(
    layers: BankLayers, values: Sequence[Mapping[str, Components]], slots: Mapping[str, SlotArrays]
) -> Any:
    """Writes one adapter into a donated bank; see :func:`patch` for the other two arguments."""

    def put(pool_CX: jax.Array, slot_J: Any, new_JX: Any) -> jax.Array:
        return pool_CX.at[slot_J].set(new_JX.astype(pool_CX.dtype), mode="drop")

    result = []
    for layer, own in zip(layers, values, strict=True):
        written = {}
        for target, bank in layer.items():
            new, (mul_J, add_J, bias_1) = own[target], slots[target]
            scale_NO = bank.bias_scale_NO
            if scale_NO is not None and new.bias_scale_O is not None:
                scale_NO = put(scale_NO, bias_1, new.bias_scale_O[None])
            written[target] = TargetBank(
                put(bank.pre_CI, mul_J, new.pre_RI),
                put(bank.post_CO, mul_J, new.post_RO),
                put(bank.down_CI, add_J, new.down_RI),
                put(bank.up_CO, add_J, new.up_RO),
                scale_NO,
            )
        result.append(written)
    return tuple(result)


def patch(
    prepared: Prepared | None,
    owned: Mapping[str, Slots],
    room: Mapping[str, Count],
    most: Mapping[str, Count],
    projections: Mapping[str, tuple[int, int]],
    layers: int,
) -> tuple[list[dict[str, Components]], dict[str, SlotArrays]]:
    """The arguments of :func:`write`, padded to ``most`` so that every adapter has one shape.

    ``None`` in place of an adapter writes nothing.
    """
    slots = {}
    for target, sizes in room.items():
        numbers = owned[target].numbers() if target in owned else ((), (), ())
        padded = []
        # Past the bank's end is where nothing is written.
        for own, size, length in zip(numbers, sizes, most[target], strict=True):
            slot_J = np.full(length, size, np.int32)
            slot_J[: len(own)] = own
            padded.append(slot_J)
        slots[target] = SlotArrays(*padded)
    values = []
    for number in range(layers):
        layer = {}
        for target, count in most.items():
            inputs, outputs = projections[target]
            found = None if prepared is None else prepared.layers[number].get(target)
            empty = Components(
                zeros(0, inputs), zeros(0, outputs), zeros(0, inputs), zeros(0, outputs)
            )
            layer[target] = _padded(found or empty, count)
        values.append(layer)
    return values, slots


@dataclasses.dataclass(frozen=True)
class Bank:
    """All of a fixed set of adapters: ``layers`` on the device, ``slots[name][target]`` on the host."""

    layers: tuple[dict[str, TargetBank], ...]
    slots: Mapping[str | None, Mapping[str, Slots]]
    targets: tuple[str, ...]

    def of(self, name: str | None, target: str) -> Slots:
        """Raises ``KeyError`` for an adapter that is not resident."""
        return self.slots[name].get(target, BASE)

    def most(self, target: str) -> tuple[int, int]:
        """The largest number of multiplicative and of additive components of one adapter."""
        owned = [self.of(name, target) for name in self.slots]
        return max(len(s.multiplicative) for s in owned), max(len(s.additive) for s in owned)


def most_of(prepared: Sequence[Prepared]) -> dict[str, Count]:
    """By target the largest numbers that one of the adapters has."""
    return {
        target: Count(
            *(max(n) for n in zip(*(p.counts.get(target, Count(1, 0, 0)) for p in prepared)))
        )
        for target in dict.fromkeys(target for p in prepared for target in p.counts)
    }


def sum_of(prepared: Sequence[Prepared]) -> dict[str, Count]:
    """By target the room that all of the adapters need together, the reserved slots included."""
    nothing = Count(0, 0, 0)
    return {
        target: Count(*map(sum, zip(RESERVED, *(p.counts.get(target, nothing) for p in prepared))))
        for target in most_of(prepared)
    }


def room_for(most: Mapping[str, Count], residents: int) -> dict[str, Count]:
    """By target the room for so many adapters of the largest size, the reserved slots included."""
    return {
        target: Count(*(reserved + residents * n for reserved, n in zip(RESERVED, count)))
        for target, count in most.items()
    }


def build_bank(
    adapters: Mapping[str, ModelAdapter],
    projections: Mapping[str, tuple[int, int]],
    layers: int,
    weights: WeightsOf | None = None,
) -> Bank:
    """A bank that holds exactly these adapters, by the name that requests use; see :func:`prepare`.

    Raises:
        InputError: an adapter's width or number of layers is not the base model's.
    """
    prepared = {
        name: prepare(adapter, projections, layers, f"adapter {name!r}", weights)
        for name, adapter in adapters.items()
    }
    room, most = sum_of(list(prepared.values())), most_of(list(prepared.values()))
    bank = empty_layers(room, projections, layers)
    taken = {target: list(RESERVED) for target in room}
    slots: dict[str | None, dict[str, Slots]] = {None: {}}
    for name, own in prepared.items():
        slots[name] = {}
        for target, count in own.counts.items():
            mul, add, bias = taken[target]
            slots[name][target] = Slots(
                tuple(range(mul, mul + count.multiplicative)),
                tuple(range(add, add + count.additive)),
                bias if count.bias else 0,
            )
            taken[target] = [a + b for a, b in zip(taken[target], count)]
        bank = write(bank, *patch(own, slots[name], room, most, projections, layers))
    return Bank(bank, slots, tuple(room))
