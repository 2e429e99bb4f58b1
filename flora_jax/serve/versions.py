"""What an adapter's name stands for at a time: a source and the hash of its content."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.errors import InputError
from flora_jax.mixing.bank import Prepared, prepare
from flora_jax.models.family import ModelConfig
from flora_jax.peft.read import read_adapter

Source = ModelAdapter | Path | str


@dataclasses.dataclass(frozen=True)
class Version:
    """One content under one name."""

    name: str
    digest: str
    source: Source = dataclasses.field(compare=False, repr=False)

    def read(self, config: ModelConfig) -> Prepared:
        """The adapter's components.

        Raises:
            InputError: it cannot be read, does not fit the model, or has changed since it was hashed.
        """
        adapter = self.source
        if isinstance(adapter, Path | str):
            adapter = read_adapter(Path(adapter), config.projections(), config.n_layer)
            if digest(self.source) != self.digest:
                raise InputError(f"{self.source}: changed since it was registered as {self.name!r}")
        return prepare(adapter, config.projections(), config.n_layer, f"adapter {self.name!r}")


def version(name: str, source: Source) -> Version:
    """The version that a source is now.

    Raises:
        InputError: there is no adapter at that path.
    """
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
                raise InputError(
                    f"{source}: no adapter folder (adapter_config.json and its weights)"
                )
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
