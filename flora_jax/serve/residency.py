"""Where adapters are: being read, ready on the host, or resident in the bank's slots on the device.

The bank has a fixed size. Adapters are read by other threads, get free slots when a sequence claims them,
and are written between dispatches. The least recently used are evicted for others; those of running
sequences and pinned ones stay. New content under an old name is another version: a sequence that was
added under the old one keeps it. For the engine's thread alone, except where a method says otherwise.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flora_jax.adapters.model_adapter import WeightsOf
from flora_jax.adapters.projections import match_targets
from flora_jax.errors import InputError
from flora_jax.mixing.bank import (
    BASE,
    RESERVED,
    Count,
    Prepared,
    Slots,
    empty_layers,
    most_of,
    patch,
    room_for,
    sum_of,
)
from flora_jax.models.family import ModelConfig
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.placement import ANYWHERE, Placement
from flora_jax.serve.readers import Readers, Reading
from flora_jax.serve.registry import Version
from flora_jax.serve.scheduler import Admission, LoadError

# Numbers of slots by target and side (multiplicative, additive, bias), none of them 0.
Held = collections.Counter[tuple[str, int]]


@dataclasses.dataclass
class _Resident:
    slots: dict[str, Slots]
    users: int = 0

    def held(self) -> Held:
        return collections.Counter(
            {(t, side): len(own) for t, s in self.slots.items()
             for side, own in enumerate(s.numbers()) if own}
        )  # fmt: skip


class Residency:
    """Versions of adapters over one device bank.

    Args:
        config: of the base model.
        room: by target the bank's size, reserved slots included.
        most: by target the largest numbers that one adapter may have.
        host_bytes: bound of the host's cache of adapters that are ready to be written.
        additive: dtype of the bank's additive vectors.
        readers: the threads that read adapters; two with a minute each where it is ``None``.
        is_pinned: of which versions are never evicted.
        placement: where the bank lies, and whether it has shapes in place of arrays.
    """

    def __init__(
        self,
        config: ModelConfig,
        room: Mapping[str, Count],
        most: Mapping[str, Count],
        host_bytes: int = 4 << 30,
        additive: Any = "float32",
        *,
        readers: Readers | None = None,
        is_pinned: Callable[[Version], bool] = lambda version: False,
        placement: Placement = ANYWHERE,
    ):
        self.config = config
        self.room = room
        self.capacity = most
        # Gives the base's weights to kinds of adapters that ask for them.
        self.weights: WeightsOf | None = None
        self.targets = tuple(room)
        self.layers: Any = placement.empty_bank(
            partial(empty_layers, room, config.projections(), config.n_layer, additive)
        )
        self._writer = placement.writing(self.layers)
        self.loads = self.evictions = 0
        self.host_bytes = host_bytes
        self._free: dict[str, list[list[int]]] = {
            target: [list(range(total - 1, first - 1, -1)) for first, total in zip(RESERVED, count)]
            for target, count in room.items()
        }
        self._residents: collections.OrderedDict[Version, _Resident] = collections.OrderedDict()
        self._ready: collections.OrderedDict[Version, Prepared] = collections.OrderedDict()
        self._ready_bytes = 0
        self._loading: dict[Version, Reading] = {}
        # Reads that nobody waits for, whose threads are not back yet.
        self._left: dict[Version, Reading] = {}
        # What has slots and is not written there yet.
        self._claimed: list[tuple[Prepared, dict[str, Slots]]] = []
        self._is_pinned = is_pinned
        self._readers = readers or Readers(2, 60.0)

    @classmethod
    def of_size(
        cls, config: ModelConfig, most: Mapping[str, Count], residents: int, **options: Any
    ) -> Residency:
        """One with room for so many adapters of the largest size ``most`` by target."""
        return cls(config, room_for(most, residents), most, **options)

    def add_ready(self, version: Version, prepared: Prepared) -> None:
        """Takes an adapter that is prepared already into the host's cache."""
        self._ready[version] = prepared
        self._ready_bytes += prepared.bytes
        while self._ready_bytes > self.host_bytes and len(self._ready) > 1:
            _, oldest = self._ready.popitem(last=False)
            self._ready_bytes -= oldest.bytes

    def prefetch(self, version: Version) -> None:
        """Begins to read an adapter that somebody will want; it is held until claimed or forgotten."""
        known = (self._residents, self._ready, self._loading)
        if not any(version in place for place in known):
            begun = self._left.pop(version, None)
            # While a thread hangs in this read, another one would hang there as well.
            if begun is None or (begun.done and not begun.hung):
                begun = self._readers.submit(partial(version.read, self.config, self.weights))
            self._loading[version] = begun

    def forget(self, version: Version) -> None:
        """Nobody waits for an adapter any more: what was read of it, or why it could not be, is lost."""
        reading = self._loading.pop(version, None)
        if reading is None or (reading.done and not reading.hung):
            return
        if not self._readers.cancel(reading):
            self._left[version] = reading

    def claim(self, version: Version) -> Admission:
        """Claims an adapter for a sequence; "ready" if it has slots now: :meth:`write_claimed` has to be
        called before they are used.

        Raises:
            LoadError: it cannot be read, or does not fit the model or the bank.
        """
        resident = self._residents.get(version)
        if resident is None:
            prepared = self._ready.get(version)
            if prepared is None:
                self.prefetch(version)
                if not self._loading[version].done:
                    return "loading"
                prepared = self._read(version)
            resident = self._give_slots(version, prepared)
            if resident is None:
                return "full"  # What was preloaded is kept, whatever the host's cache has room for.
            if self._loading.pop(version, None) is not None:
                self.add_ready(version, prepared)
            else:
                self._ready.move_to_end(version)
        resident.users += 1
        self._residents.move_to_end(version)
        return "ready"

    def write_claimed(self) -> None:
        """Writes the adapters that were given slots since the last call into the bank."""
        claimed, self._claimed = self._claimed, []
        for prepared, owned in claimed:
            self._write(prepared, owned)

    def release(self, version: Version) -> None:
        """Gives a claim back."""
        self._residents[version].users -= 1

    @property
    def is_reading(self) -> bool:
        """Whether an adapter that somebody waits for is being read."""
        return any(not reading.done for reading in self._loading.values())

    def expire(self) -> None:
        """Fails the reads whose deadline has passed."""
        self._readers.expire()
        back = [v for v, reading in self._left.items() if reading.done and not reading.hung]
        for version in back:
            del self._left[version]

    def deadline_s(self) -> float | None:
        """When :meth:`expire` should be called, by ``time.monotonic``; any thread may ask."""
        return self._readers.deadline_s()

    def close(self) -> None:
        """Reads no further adapters. Waits for none."""
        self._readers.close()

    def is_resident(self, version: Version) -> bool:
        """Whether it has slots; any thread may ask."""
        return version in self._residents

    def is_read(self, version: Version) -> bool:
        """Whether it has slots or is ready on the host; any thread may ask."""
        return version in self._residents or version in self._ready

    def of(self, version: Version | None, target: str) -> Slots:
        """Raises ``KeyError`` for an adapter that is not resident."""
        return BASE if version is None else self._residents[version].slots.get(target, BASE)

    def most(self, target: str) -> tuple[int, int]:
        """The most multiplicative and additive components that an adapter may have."""
        return self.capacity[target][:2]

    def write_nothing(self) -> None:
        """Runs the writing step without an adapter, so that it is compiled."""
        self._write(None, {})

    def _read(self, version: Version) -> Prepared:
        """What reading gave; a failure is not kept, so a later request tries again."""
        reading = self._loading.pop(version)
        try:
            prepared = reading.result()
        except TimeoutError as error:
            self._left[version] = reading
            where = version.source if isinstance(version.source, str | Path) else "memory"
            raise LoadError(f"adapter {version.name!r}: {where}: {error}") from None
        except (InputError, OSError, ValueError) as error:
            raise LoadError(f"adapter {version.name!r}: {error}") from error
        except Exception as error:  # Whatever a file holds, it is the request's affair alone.
            reason = f"{type(error).__name__}: {error}"
            raise LoadError(f"adapter {version.name!r}: {reason}") from error
        for target, count in prepared.counts.items():
            most = self.capacity.get(target)
            if most is None or any(n > m for n, m in zip(count, most)):
                allowed = "none" if most is None else tuple(most)
                raise LoadError(
                    f"adapter {version.name!r}: {target} has {tuple(count)} components "
                    f"(multiplicative, additive, bias), at most {allowed} are served"
                )
        self._loading[version] = reading  # Kept until it has slots.
        return prepared

    def _give_slots(self, version: Version, prepared: Prepared) -> _Resident | None:
        """Gives the adapter slots, to be written later; ``None`` where running ones leave none.

        Raises:
            LoadError: pinned ones leave no room.
        """
        missing = self._missing(prepared)
        evicted: list[Version] = []
        for candidate, resident in self._residents.items():
            if not missing:
                break
            gain = resident.held()
            if gain.keys() & missing.keys() and not (resident.users or self._is_pinned(candidate)):
                evicted.append(candidate)
                missing -= gain
        if missing:
            for candidate, resident in self._residents.items():
                if resident.users and not self._is_pinned(candidate):
                    missing -= resident.held()
            if missing:
                raise LoadError(f"adapter {version.name!r}: no room beside the pinned ones")
            return None
        for candidate in evicted:
            self._evict(candidate)
        owned = {}
        for target, count in prepared.counts.items():
            mul, add, bias = (
                [free.pop() for _ in range(number)]
                for free, number in zip(self._free[target], count)
            )
            owned[target] = Slots(tuple(mul), tuple(add), bias[0] if bias else 0)
        self._claimed.append((prepared, owned))
        self.loads += 1
        resident = self._residents[version] = _Resident(owned)
        return resident

    def _write(self, prepared: Prepared | None, owned: Mapping[str, Slots]) -> None:
        sizes = self.room, self.capacity, self.config.projections(), self.config.n_layer
        self.layers = self._writer(self.layers, *patch(prepared, owned, *sizes))

    def _missing(self, prepared: Prepared) -> Held:
        """How many slots too few are free."""
        wanted: Held = collections.Counter()
        for target, count in prepared.counts.items():
            for side, (needed, free) in enumerate(zip(count, self._free[target])):
                wanted[target, side] = needed - len(free)
        return +wanted

    def _evict(self, version: Version) -> None:
        for target, slots in self._residents.pop(version).slots.items():
            for free, numbers in zip(self._free[target], slots.numbers()):
                free.extend(numbers)
        self.evictions += 1


def make_residency(
    first: Mapping[Version, Prepared],
    config: ModelConfig,
    options: EngineOptions,
    additive: Any = "float32",
    **others: Any,
) -> Residency:
    """With slots for all of these adapters, or for as many of the largest as the options say.

    ``additive`` is the dtype of the bank's additive vectors; ``others`` go to :class:`Residency`.

    Raises:
        InputError: targets without anything that says how many components they may have.
    """
    prepared = list(first.values())
    most, room = most_of(prepared), sum_of(prepared)
    more = options.max_components
    if more is not None:
        for target in {*most, *match_targets(options.targets, config.projections())}:
            known = most.get(target, Count(1, 0, 0))
            most[target] = Count(max(more, known[0]), max(more, known[1]), 1)
    elif options.targets:
        if not most:
            raise InputError(
                f"targets are {', '.join(options.targets)} and max_components is None, expected a "
                "number where no adapter is there at the start"
            )
        largest = Count(*map(max, zip(*most.values())))
        most = dict.fromkeys(match_targets(options.targets, config.projections()), largest) | most
    number = options.resident_adapters
    if number is not None or more is not None or options.targets:
        number = number or max(len(prepared), options.max_num_seqs)
        room = room_for(most, number)
    targets = [target for target in config.projections() if target in most]
    residency = Residency(
        config,
        {target: room[target] for target in targets},
        {target: most[target] for target in targets},
        options.host_adapter_bytes,
        additive,
        **others,
    )
    for version, own in first.items():
        residency.add_ready(version, own)
    return residency


def target_groups(first: Mapping[Version, Prepared]) -> list[tuple[str, ...]]:
    """The sets of targets that the adapters have."""
    return [tuple(own.counts) for own in first.values()]
