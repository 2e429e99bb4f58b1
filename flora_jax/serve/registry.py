"""Which adapters are known: names, and the versions that they stand for at a time.

A version is a source and the hash of its content. Any thread may use a registry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from flora_jax.adapters.model_adapter import ModelAdapter, WeightsOf
from flora_jax.errors import InputError
from flora_jax.mixing.bank import Prepared, prepare
from flora_jax.models.family import ModelConfig
from flora_jax.peft.no_adapter import no_adapter
from flora_jax.peft.read import read_adapter

Source = ModelAdapter | Path | str


@dataclasses.dataclass(frozen=True)
class Version:
    """One content under one name."""

    name: str
    digest: str
    source: Source = dataclasses.field(compare=False, repr=False)

    @property
    def in_memory(self) -> bool:
        """Whether its source is an adapter in memory, not a folder."""
        return isinstance(self.source, ModelAdapter)

    def read(self, config: ModelConfig, weights: WeightsOf | None = None) -> Prepared:
        """The adapter's components; ``weights`` gives the base's to a kind that asks for them.

        Raises:
            InputError: it cannot be read, does not fit the model, or has changed since it was hashed.
        """
        adapter = self.source
        if isinstance(adapter, Path | str):
            adapter = read_adapter(Path(adapter), config.projections(), config.n_layer)
            if digest(self.source) != self.digest:
                raise InputError(f"{self.source}: changed since it was registered as {self.name!r}")
        where = f"adapter {self.name!r}"
        return prepare(adapter, config.projections(), config.n_layer, where, weights)


class Registry:
    """Names of adapters and what they stand for now; every method may be called by any thread."""

    def __init__(self) -> None:
        self._names: dict[str, Version] = {}
        self._pinned: set[str] = set()
        self._lock = threading.Lock()

    def register(self, name: str, source: Source, *, pinned: bool = False) -> Version:
        """Makes an adapter known, or replaces what the name stood for.

        A folder is hashed here, by the calling thread, and read when it is needed. ``pinned`` adapters
        are never evicted.

        Raises:
            InputError: there is no adapter at that path.
        """
        found = version(name, source)
        with self._lock:
            self._names[name] = found
            (self._pinned.add if pinned else self._pinned.discard)(name)
        return found

    def unregister(self, name: str) -> None:
        """Forgets a name.

        Raises:
            KeyError: nothing has this name.
        """
        with self._lock:
            del self._names[name]
            self._pinned.discard(name)

    def current(self, name: str) -> Version:
        """What a name stands for now.

        Raises:
            KeyError: nothing has this name.
        """
        with self._lock:
            return self._names[name]

    def knows(self, name: str) -> bool:
        """Whether something has this name."""
        with self._lock:
            return name in self._names

    def is_current(self, version: Version) -> bool:
        """Whether this is what its name stands for now."""
        with self._lock:
            return self._names.get(version.name) == version

    def versions(self) -> list[Version]:
        """What all names stand for now, in the order in which they became known."""
        with self._lock:
            return list(self._names.values())

    def is_pinned(self, version: Version) -> bool:
        """Whether this is what a pinned name stands for now."""
        with self._lock:
            return version.name in self._pinned and self._names.get(version.name) == version


def named_sources(adapters: Mapping[str, Source] | None) -> dict[str, Source]:
    """A caller's adapters by name, checked before anything is made of them.

    Raises:
        InputError: it is no mapping of names to folders or adapters.
    """
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise InputError(f"adapters is a {type(adapters).__name__}, expected {{name: folder}}")
    for name, source in adapters.items():
        if not isinstance(name, str):
            raise InputError(f"adapters has the name {name!r}, expected a string")
        if not isinstance(source, ModelAdapter | Path | str):
            raise InputError(f"adapters[{name!r}] is {source!r}, expected a folder or an adapter")
    return dict(adapters)


def version(name: str, source: Source) -> Version:
    """The version that a source is now. Of an adapter in memory it keeps the factors on the host.

    Raises:
        InputError: there is no adapter at that path.
    """
    if isinstance(source, ModelAdapter):
        layers = jax.tree.map(np.asarray, source.layers)
        source = dataclasses.replace(source, layers=layers)
    return Version(name, digest(source), source)


def digest(source: Source) -> str:
    """A hash of an adapter's content.

    Raises:
        InputError: there is no adapter folder at that path, or it cannot be read.
    """
    found = hashlib.sha256()
    if isinstance(source, Path | str):
        try:
            files = [file for file in sorted(Path(source).glob("adapter_*")) if file.is_file()]
            if not files:
                raise InputError(no_adapter(source))
            for file in files:
                with file.open("rb") as stream:
                    found.update(file.name.encode())
                    found.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise InputError(f"{source}: {error}") from None
    else:
        found.update(f"{source.kind} {jax.tree.structure(source.layers)}".encode())
        for leaf in jax.tree.leaves(source.layers):
            found.update(f"{leaf.shape} {leaf.dtype}".encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()
