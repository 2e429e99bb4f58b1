"""The adapter pool: which adapters are known, which are ready on the host, which lie on the device.

The device's bank has a fixed size. Adapters are read in the background, written into free slots between
dispatches, and leave by least recent use when room is needed; those of running sequences and pinned ones
stay. New content under an old name is another version: who was admitted with the old one keeps it.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from flora_jax.errors import InputError
from flora_jax.mixing.bank import (
    BASE,
    RESERVED,
    Count,
    Prepared,
    Slots,
    empty_layers,
    patch,
    room_for,
    write,
)
from flora_jax.models.family import ModelConfig
from flora_jax.serve.scheduler import Admission
from flora_jax.serve.versions import Source, Version
from flora_jax.serve.versions import version as version_of

# Numbers of slots by target and side (multiplicative, additive, bias), none of them 0.
Held = collections.Counter[tuple[str, int]]


class LoadError(InputError):
    """An adapter could not be made ready; the message says which and why."""


@dataclasses.dataclass
class _Resident:
    slots: dict[str, Slots]
    users: int = 0

    def held(self) -> Held:
        return collections.Counter(
            {(t, side): len(own) for t, s in self.slots.items()
             for side, own in enumerate(_numbers(s)) if own}
        )  # fmt: skip


class AdapterPool:
    """Adapters by name over one device bank.

    Args:
        config: of the base model.
        room: by target the bank's size, reserved slots included.
        most: by target the largest numbers that one adapter may have.
        host_bytes: bound of the host's cache of adapters that are ready to be written.
        additive: dtype of the bank's additive vectors.
        allocate: without it the bank has shapes in place of arrays.
    """

    def __init__(
        self,
        config: ModelConfig,
        room: Mapping[str, Count],
        most: Mapping[str, Count],
        host_bytes: int = 4 << 30,
        additive: Any = "float32",
        *,
        allocate: bool = True,
    ):
        self.config = config
        self.room = room
        self.capacity = most
        self.targets = tuple(room)
        make = partial(empty_layers, room, config.projections(), config.n_layer, additive)
        self.layers: Any = make() if allocate else jax.eval_shape(make)
        self.loads = self.evictions = 0
        self.host_bytes = host_bytes
        self._free: dict[str, list[list[int]]] = {
            target: [list(range(total - 1, first - 1, -1)) for first, total in zip(RESERVED, count)]
            for target, count in room.items()
        }
        self._residents: collections.OrderedDict[Version, _Resident] = collections.OrderedDict()
        self._ready: collections.OrderedDict[Version, Prepared] = collections.OrderedDict()
        self._ready_bytes = 0
        self._loading: dict[Version, Future[Prepared]] = {}
        self._names: dict[str, Version] = {}
        self._pinned: set[str] = set()
        self._lock = threading.RLock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    @classmethod
    def of_size(
        cls, config: ModelConfig, most: Mapping[str, Count], residents: int, **options: Any
    ) -> AdapterPool:
        """A pool with room for so many adapters of the largest size ``most`` by target."""
        return cls(config, room_for(most, residents), most, **options)

    def register(self, name: str, source: Source, *, pinned: bool = False) -> Version:
        """Makes an adapter known, or replaces what the name stood for; may be called by any thread.

        Raises:
            InputError: there is no adapter at that path.
        """
        found = version_of(name, source)
        with self._lock:
            self._names[name] = found
            (self._pinned.add if pinned else self._pinned.discard)(name)
        return found

    def unregister(self, name: str) -> None:
        """Forgets a name; running sequences keep their version.

        Raises:
            KeyError: nothing has this name.
        """
        with self._lock:
            del self._names[name]
            self._pinned.discard(name)

    def names(self) -> list[str]:
        with self._lock:
            return list(self._names)

    def current(self, name: str) -> Version:
        """What a name stands for now.

        Raises:
            KeyError: nothing has this name.
        """
        with self._lock:
            return self._names[name]

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
            self._loading[version] = self._reader.submit(version.read, self.config)

    def forget(self, version: Version) -> None:
        """Nobody waits for an adapter any more: what was read of it, or why it could not be, is lost."""
        future = self._loading.pop(version, None)
        if future is not None:
            future.cancel()

    def acquire(self, version: Version) -> Admission:
        """Claims an adapter for a sequence, "ready" if it is on the device now.

        Raises:
            LoadError: it cannot be read, or does not fit the model or the bank.
        """
        resident = self._residents.get(version)
        if resident is None:
            prepared = self._ready.get(version)
            if prepared is None:
                self.prefetch(version)
                if not self._loading[version].done():
                    return "loading"
                prepared = self._read(version)
            resident = self._place(version, prepared)
            if resident is None:
                return "full"  # What was read ahead is held on, whatever the host's cache has room for.
            if self._loading.pop(version, None) is not None:
                self.add_ready(version, prepared)
            else:
                self._ready.move_to_end(version)
        resident.users += 1
        self._residents.move_to_end(version)
        return "ready"

    def release(self, version: Version) -> None:
        """Gives a claim back."""
        self._residents[version].users -= 1

    def wait(self, versions: Iterable[Version], timeout: float | None = None) -> None:
        """Waits until at least one of the adapters that are being read is there."""
        futures = [self._loading[v] for v in versions if v in self._loading]
        done = threading.Event()
        for future in futures:
            future.add_done_callback(lambda _: done.set())
        if futures:
            done.wait(timeout)

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    def is_resident(self, version: Version) -> bool:
        return version in self._residents

    def is_read(self, version: Version | None) -> bool:
        """Whether it lies on the device or is ready on the host; of none, yes."""
        return version is None or version in self._residents or version in self._ready

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
        self._loading[version] = reading  # Held until it is placed.
        return prepared

    def _place(self, version: Version, prepared: Prepared) -> _Resident | None:
        """Gives the adapter slots and writes it there; ``None`` where running ones leave no room.

        Raises:
            LoadError: pinned ones leave no room.
        """
        missing = self._missing(prepared)
        leaving: list[Version] = []
        for candidate, resident in self._residents.items():
            if not missing:
                break
            gain = resident.held()
            if gain.keys() & missing.keys() and not (resident.users or self._is_pinned(candidate)):
                leaving.append(candidate)
                missing -= gain
        if missing:
            for candidate, resident in self._residents.items():
                if resident.users and not self._is_pinned(candidate):
                    missing -= resident.held()
            if missing:
                raise LoadError(f"adapter {version.name!r}: no room beside the pinned ones")
            return None
        for candidate in leaving:
            self._evict(candidate)
        owned = {}
        for target, count in prepared.counts.items():
            mul, add, bias = (
                [free.pop() for _ in range(number)]
                for free, number in zip(self._free[target], count)
            )
            owned[target] = Slots(tuple(mul), tuple(add), bias[0] if bias else 0)
        self._write(prepared, owned)
        self.loads += 1
        resident = self._residents[version] = _Resident(owned)
        return resident

    def _write(self, prepared: Prepared | None, owned: Mapping[str, Slots]) -> None:
        sizes = self.room, self.capacity, self.config.projections(), self.config.n_layer
        self.layers = write(self.layers, *patch(prepared, owned, *sizes))

    def _missing(self, prepared: Prepared) -> Held:
        """How many slots too few are free."""
        wanted: Held = collections.Counter()
        for target, count in prepared.counts.items():
            for side, (needed, free) in enumerate(zip(count, self._free[target])):
                wanted[target, side] = needed - len(free)
        return +wanted

    def _evict(self, version: Version) -> None:
        for target, slots in self._residents.pop(version).slots.items():
            for free, numbers in zip(self._free[target], _numbers(slots)):
                free.extend(numbers)
        self.evictions += 1

    def _is_pinned(self, version: Version) -> bool:
        with self._lock:
            return version.name in self._pinned and self._names.get(version.name) == version


def _numbers(slots: Slots) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return slots.multiplicative, slots.additive, (slots.bias,) if slots.bias else ()
