"""Checkpoints of a model: read from and written to Hugging Face's files or our orbax directories.

A directory of ours has config.json as Hugging Face's, the marker flora_jax.json, and the parameters in
``params/`` (orbax). Knows nothing of the forward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from flora_jax.checkpoints import orbax_io
from flora_jax.checkpoints.chat import Chat, load_chat
from flora_jax.checkpoints.describe import (
    MARKER,
    VERSION,
    Description,
    Source,
    describe_directory,
    format_of,
    is_ours,
    parameter_dtype,
    read_config,
)
from flora_jax.checkpoints.match import match_tensors
from flora_jax.checkpoints.sources import copy_companions, is_hub_id, resolve
from flora_jax.checkpoints.tensor_files import (
    FLOATS,
    MAX_SHARD_BYTES,
    CheckpointError,
    Entry,
    StoredTensor,
    read_array,
    stored_dtype,
    stored_tensors,
    unreadable,
    write_shards,
)
from flora_jax.checkpoints.tokenizer import load_tokenizer
from flora_jax.errors import InputError
from flora_jax.files import whole_directory
from flora_jax.models.family import DTYPES, ModelConfig, Tensor, changed, family_of
from flora_jax.models.model import Model, abstract_model
from flora_jax.models.quantize import quantize_abstract
from flora_jax.models.sharding import named_leaves
from flora_jax.models.sharding import shardings as mesh_shardings
from flora_jax.weights.held import Reading, reading_of, stored_array
from flora_jax.weights.quantized import Method

__all__ = [
    "CheckpointError",
    "Description",
    "Opened",
    "describe",
    "load_model",
    "open_checkpoint",
    "save_hf",
    "save_orbax",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint whose configuration was read; its tokenizer and weights are read when asked for.

    ``source`` is as it was given; ``found`` is where its files were at opening, perhaps relative to the
    process's own directory, and ``place`` the same as an absolute path; ``from_hub`` says whether the
    source is a hub id, whose weights may not be there yet.
    """

    source: str
    found: Path
    place: Path
    config: ModelConfig
    from_hub: bool

    @property
    def directory(self) -> Path:
        """Where its files are: as at opening, absolute once the process has moved."""
        with contextlib.suppress(OSError):  # The process's own directory may be gone.
            if self.found.absolute() == self.place:
                return self.found
        return self.place

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        """The ``tokenizers.Tokenizer`` beside the weights, ``None`` where there is none.

        Raises:
            InputError: its file is damaged, or has ids that the model has no embedding for.
        """
        return load_tokenizer(self.directory, self.config.vocab_size)

    def text_tokens(self, what: str) -> tuple[Any, int]:
        """The tokenizer, and the token that ends a document; ``what`` needs both.

        Raises:
            InputError: one is missing, see :attr:`tokenizer`, or the token is not in the vocabulary.
        """
        if self.tokenizer is None or not self.config.eos_token_ids:
            raise InputError(f"{self.directory}: {what} needs tokenizer.json and an end token")
        end_id, size = self.config.eos_token_ids[0], self.config.vocab_size
        if end_id >= size:
            raise InputError(
                f"{self.directory}: the end token is {end_id}, expected below the vocabulary's {size} "
                "(eos_token_id of config.json and generation_config.json)"
            )
        return self.tokenizer, end_id

    @functools.cached_property
    def chat(self) -> Chat:
        """The chat template beside the weights, which says so where there is none.

        Raises:
            InputError: its file is damaged.
        """
        return load_chat(self.directory, self.source)

    @property
    def format(self) -> str:
        """How the weights are held: "safetensors", "pytorch", "orbax", or "hub" for a hub id.

        Raises:
            CheckpointError: no weights, a broken index, or an unknown version of our layout.
        """
        return format_of(self.directory, self.from_hub)[0]

    def describe(self) -> Description:
        """Format and sizes, the files' headers checked against the configuration.

        Raises:
            CheckpointError: safetensors that do not fit config.json, or an unknown version of our layout.
        """
        return describe_directory(self.source, self.directory, self.config, self.from_hub)

    def load(
        self,
        dtype: Any = None,
        *,
        quantize: Method | None = None,
        mesh: Mesh | None = None,
        shardings: Any = None,
    ) -> Model:
        """The model; a hub id's weights are fetched now.

        Tensors are read, cast and placed one at a time, the largest first, so that the process holds
        little more than the model itself.

        Args:
            dtype: of all parameters: float32, bfloat16 or float16; None for the checkpoint's own.
            quantize: "int8" or "int4" quantises the projections' kernels as they are read, from the
                precision in which they are stored (:mod:`flora_jax.models.quantize`).
            mesh: places every parameter by :func:`flora_jax.models.sharding.shardings`.
            shardings: instead of ``mesh``, a tree like ``Model.params`` with a sharding at every leaf.

        Raises:
            CheckpointError: a damaged file; tensors missing, unexpected, mis-shaped or not floating
                point; values too large for ``dtype``.
            InputError: ``quantize`` is another word, or int4 cannot take a kernel's number of inputs.
        """
        try:
            return _load(self, dtype, quantize, mesh, shardings)
        except OSError as error:
            raise unreadable(self.directory, error) from None


def open_checkpoint(source: Source) -> Opened:
    """Opens a Hugging Face directory, a directory of :func:`save_orbax`, or a hub id.

    Reads its configuration; of a hub id only that and the tokenizer are fetched. Where its config.json
    names no dtype, :meth:`Opened.load` finds it in the weights.

    Raises:
        CheckpointError: not a checkpoint; another architecture; a configuration that is damaged, has
            sizes that no model has, or that cannot be honoured.
    """
    directory = resolve(source, weights=False)
    try:
        config = read_config(directory)
        place, from_hub = directory.absolute(), is_hub_id(source)
        return Opened(os.fspath(source), directory, place, config, from_hub)
    except OSError as error:
        raise unreadable(directory, error) from None


def load_model(
    source: Source,
    dtype: Any = None,
    *,
    quantize: Method | None = None,
    mesh: Mesh | None = None,
    shardings: Any = None,
) -> Model:
    """The model of a checkpoint: :func:`open_checkpoint`, then :meth:`Opened.load`."""
    return open_checkpoint(source).load(dtype, quantize=quantize, mesh=mesh, shardings=shardings)


def describe(source: Source) -> Description:
    """What a checkpoint is: :func:`open_checkpoint`, then :meth:`Opened.describe`."""
    return open_checkpoint(source).describe()


def _load(
    opened: Opened, dtype: Any, quantize: Method | None, mesh: Mesh | None, shardings: Any
) -> Model:
    if quantize not in (None, *get_args(Method)):
        raise CheckpointError(f"quantize is {quantize!r}, expected 'int8', 'int4' or None")
    directory, config = opened.directory, opened.config
    if opened.from_hub:
        directory = resolve(opened.source)
        # Only now the weights are sure to be there, whose dtype counts where config.json names none.
        config = changed(config, dtype=read_config(directory).dtype)
    wanted = parameter_dtype(dtype, config)
    # Before anything of the configuration's size is built.
    ours = is_ours(directory)
    stored = {} if ours else match_tensors(directory, stored_tensors(directory), config)
    dense = abstract_model(config, wanted)
    abstract = dense if quantize is None else quantize_abstract(dense, quantize)
    if mesh is not None:
        if shardings is not None:
            raise CheckpointError("mesh and shardings are both given, expected one")
        shardings = mesh_shardings(abstract, mesh)
    leaves, structure = named_leaves(abstract.params)
    placed = {} if shardings is None else named_leaves(shardings)[0]
    readings = {path: reading_of(leaf, placed.get(path)) for path, leaf in leaves.items()}
    shapes = _stored_shapes(config)
    if ours:
        values = orbax_io.restore_params(directory / "params", shapes, readings, wanted.itemsize)
    else:
        values = _load_hf(stored, readings)
    params = jax.tree.unflatten(structure, [values[path] for path in leaves])
    return Model(config, abstract.graph, params)


def _stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter's array in files, ours and Hugging Face's, by dotted path."""
    table = family_of(config).tensors(config)
    return {path: tensor.shape for path, tensor in table.items()}


def _load_hf(stored: Mapping[str, StoredTensor], readings: Mapping[str, Reading]) -> dict[str, Any]:
    def load(path: str) -> Any:
        reading = readings[path]
        host = read_array(stored[path], reading.dtype or stored_dtype(stored[path].dtype))
        # A transfer still under way would keep the host's copy beside the next one's.
        return jax.block_until_ready(reading.make(_put(host, reading.sharding)))

    by_size = sorted(stored, key=lambda path: -math.prod(stored[path].shape))
    return {path: load(path) for path in by_size}


def _put(host: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    # ``device_put`` would compare the whole array among the processes.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def save_hf(
    model: Model,
    directory: Source,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: Source | None = None,
) -> None:
    """Writes config.json and safetensors as transformers does, in the parameters' dtype.

    Args:
        model: to be written.
        directory: is new or empty, and appears only when all is written.
        max_shard_bytes: beyond these, several files and an index; a larger tensor has its own file.
        companions: a directory whose tokenizer files and generation_config.json are copied along.

    Raises:
        CheckpointError: ``directory`` is not empty, or the parameters are not those of the config.
    """
    leaves = _checked_leaves(model)
    table = family_of(model.config).tensors(model.config)
    entries = [_entry(tensor, leaves[path]) for path, tensor in table.items()]
    with whole_directory(directory) as part:
        write_shards(part, entries, max_shard_bytes)
        _write_config(model, part)
        copy_companions(companions, part)


def _entry(wanted: Tensor, leaf: jax.Array) -> Entry:
    return Entry(wanted.name, wanted.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))


def save_orbax(model: Model, directory: Source, *, companions: Source | None = None) -> None:
    """Writes a directory that :func:`load_model` restores straight into a dtype and a sharding.

    ``directory`` is new or empty, and appears only when all is written; the tokenizer files and
    generation_config.json of the directory ``companions`` are copied along.

    Raises:
        CheckpointError: ``directory`` is not empty, or the parameters are not those of the config.
    """
    leaves = _checked_leaves(model)
    with whole_directory(directory) as part:
        orbax_io.save_params(leaves, part / "params")
        _write_config(model, part)
        _write_json(part / MARKER, {"format": "flora_jax", "version": VERSION})
        copy_companions(companions, part)


def _checked_leaves(model: Model) -> dict[str, jax.Array]:
    """The arrays that files have."""
    leaves: dict[str, jax.Array] = {}
    for path, leaf in named_leaves(model.params)[0].items():
        try:
            leaves[path] = stored_array(leaf)
        except ValueError as error:
            raise CheckpointError(
                f"save: parameter {path} is {error}, expected full precision"
            ) from None
    expected = _stored_shapes(model.config)
    for path in expected.keys() | leaves.keys():
        leaf = leaves.get(path)
        found = None if leaf is None else (leaf.shape, np.dtype(leaf.dtype))
        if found is None or found[0] != expected.get(path) or found[1] not in FLOATS[:3]:
            seen = "missing" if found is None else f"{found[1]} of shape {found[0]}"
            raise CheckpointError(
                f"save: parameter {path} is {seen}, expected {' or '.join(DTYPES)} of shape "
                f"{expected.get(path)}"
            )
    return leaves


def _write_config(model: Model, directory: Path) -> None:
    raw = model.config.to_dict() | {"dtype": np.dtype(model.embedding.dtype).name}
    _write_json(directory / "config.json", raw)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
