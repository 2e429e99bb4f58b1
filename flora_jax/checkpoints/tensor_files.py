"""Files of named tensors: safetensors read and written, pytorch_model.bin read, single or sharded.

Tensors are read a stretch of elements at a time, and no mapping of a file is kept: mapped pages count
as the process's memory until something else pushes them out. Knows nothing of models or of what a
tensor is for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from flora_jax.errors import InputError

_BLOCK_BYTES = 4 << 20
_MAPPED_BYTES = 32 << 20
# Of transformers' writer too.
MAX_SHARD_BYTES = 5_000_000_000
FLOATS = tuple(np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
_SAFETENSORS_DTYPES = {
    **{"BF16": FLOATS[0], "F16": FLOATS[1], "F32": FLOATS[2], "F64": FLOATS[3]},
    **{"BOOL": np.dtype(bool), "U8": np.dtype("u1"), "I8": np.dtype("i1")},
    **{f"{sign}{8 * n}": np.dtype(f"{sign.lower()}{n}") for sign in "IU" for n in (2, 4, 8)},
}
_TO_SAFETENSORS = {dtype: word for word, dtype in _SAFETENSORS_DTYPES.items()}


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written; the message has the file and the values."""


def unreadable(place: Path, error: OSError) -> CheckpointError:
    """The error of the operating system in one line with the file's name."""
    return CheckpointError(f"{error.filename or place}: cannot be read: {error.strerror or error}")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. ``dtype`` is None for a kind that NumPy cannot hold (8-bit floats).

    ``read(start, stop)`` gives those elements of the flattened tensor.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype | None
    dtype_name: str
    read: Callable[[int, int], np.ndarray]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive runs of whole rows ``[n, *shape[1:]]``, each with its first row's number."""
        assert self.dtype is not None
        rows, *rest = self.shape or (1,)
        row = math.prod(rest)
        step = max(1, _BLOCK_BYTES // max(1, row * self.dtype.itemsize))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield start, self.read(start * row, stop * row).reshape(stop - start, *rest)


def stored_dtype(dtype: Any) -> np.dtype:
    """The dtype in which to hold a stored tensor as it is: its own, of float64 the half."""
    return np.dtype(np.float32) if np.dtype(dtype) == np.float64 else np.dtype(dtype)


def read_array(stored: StoredTensor, dtype: np.dtype) -> np.ndarray:
    """The whole tensor in ``dtype``.

    Raises:
        CheckpointError: a finite value is too large for ``dtype``.
    """
    out = np.empty(stored.shape, dtype)
    for start, block in stored.blocks():
        with np.errstate(over="ignore"):
            cast = block.astype(dtype, copy=False)
        if stored.dtype != dtype and np.any(np.isinf(cast) & ~np.isinf(block)):
            worst = np.max(np.abs(np.where(np.isinf(block), 0, block).astype(np.float64)))
            raise CheckpointError(
                f"{stored.file}: {stored.name} has values up to {worst:.4g}, too large for {dtype}"
            )
        out[start : start + len(cast)] = cast
    return out


def open_directory(directory: Path) -> tuple[str, list[Path], dict[str, str] | None]:
    """How a directory holds its tensors: ``(format, files, which file holds which tensor)``.

    The format is "safetensors" or "pytorch"; the last is None for a single file without an index.

    Raises:
        CheckpointError: no weights, or an index that is broken or names a file that is missing.
    """
    for kind, single in (("safetensors", "model.safetensors"), ("pytorch", "pytorch_model.bin")):
        if (directory / single).is_file():
            return kind, [directory / single], None
        index = directory / f"{single}.index.json"
        if index.is_file():
            weight_map = _read_index(index)
            files = [directory / name for name in sorted(set(weight_map.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(f"{index}: missing beside it: {', '.join(missing)}")
            return kind, files, weight_map
    raise CheckpointError(
        f"{directory}: no weights: expected model.safetensors or pytorch_model.bin, or either's "
        "index with its shards"
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        plain = all(Path(name).name == name for name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!r}") from None
    if not plain or not weight_map:
        raise CheckpointError(f"{index}: expected names of files in the same directory")
    return weight_map


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by name, none of them read yet.

    Raises:
        CheckpointError: see :func:`open_directory`; or a file is damaged, of another kind, or holds a
            tensor that the index does not have. What the index has and no file holds is no error here:
            whether it is needed is the model's to say.
    """
    kind, files, weight_map = open_directory(directory)
    opener = safetensors_file if kind == "safetensors" else torch_file
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = opener(file)
        if weight_map is not None and (more := set(found) - set(weight_map)):
            raise CheckpointError(
                f"{file}: holds tensors that the index does not have: {', '.join(sorted(more)[:8])}"
            )
        if twice := set(found) & set(tensors):
            name = min(twice)
            raise CheckpointError(f"{file}: holds {name}, as does {tensors[name].file.name}")
        tensors |= found
    return tensors


def safetensors_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is truncated or damaged.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated, or not safetensors: {error}") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: _in_safetensors(file, name, entry, 8 + length) for name, entry in header.items()}


def _in_safetensors(file: Path, name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    begin = data + entry["data_offsets"][0]

    def read(start: int, stop: int) -> np.ndarray:
        assert dtype is not None
        out = np.empty(stop - start, dtype)
        with file.open("rb") as stream:
            stream.seek(begin + start * dtype.itemsize)
            if stream.readinto(out.view(np.uint8).data) != out.nbytes:
                raise CheckpointError(f"{file}: ended inside {name}")
        return out

    word = entry["dtype"] if dtype is None else dtype.name
    return StoredTensor(name, file, tuple(entry["shape"]), dtype, word, read)


def torch_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one pytorch_model.bin, read without running anything that it holds.

    Raises:
        CheckpointError: PyTorch is not installed, or the file is damaged or holds more than tensors.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{file}: reading it takes PyTorch: pip install torch, or convert it to safetensors"
        ) from None
    try:
        state = _TorchState(file, zipfile.is_zipfile(file))
    except Exception as error:  # pickle's, zip's and torch's have no common type.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file}: damaged, or holds more than tensors: {reason}") from None
    tensors = state.tensors
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise CheckpointError(f"{file}: expected a dictionary of tensors")
    return {name: _in_torch(state, name, tensor) for name, tensor in tensors.items()}


class _TorchState:
    """An unpickled file, mapped anew now and then: pages once read stay resident in a mapping."""

    def __init__(self, file: Path, mapped: bool):
        self.file, self.mapped = file, mapped
        self.map()

    def map(self) -> None:
        import torch

        self.seen = 0
        self.tensors: Any = None
        self.tensors = torch.load(
            self.file, map_location="cpu", weights_only=True, mmap=self.mapped
        )

    def read(self, name: str, start: int, stop: int) -> Any:
        if self.mapped and self.seen > _MAPPED_BYTES:
            self.map()
        part = self.tensors[name].reshape(-1)[start:stop]
        self.seen += part.nbytes
        return part


def _in_torch(state: _TorchState, name: str, tensor: Any) -> StoredTensor:
    import torch

    brain = tensor.dtype == torch.bfloat16
    dtype: np.dtype | None = FLOATS[0] if brain else None
    if not brain:
        with contextlib.suppress(TypeError):
            dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype

    def read(start: int, stop: int) -> np.ndarray:
        part = state.read(name, start, stop)
        return part.view(torch.int16).numpy().view(FLOATS[0]) if brain else part.numpy()

    word = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(name, state.file, tuple(tensor.shape), dtype, word, read)


class Entry(NamedTuple):
    """A tensor to be written; ``get`` makes its array when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    directory: Path, entries: Sequence[Entry], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes model.safetensors, or beyond so many bytes several files and their index.

    A larger tensor has a file of its own.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        write_safetensors(directory / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {
                entry.name: name for name, shard in zip(names, shards) for entry in shard
            },
        }
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text)


def write_safetensors(file: Path, tensors: Sequence[Entry]) -> None:
    """Writes one after the other; one array is held at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype, _ in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        word = _TO_SAFETENSORS[dtype]
        header[name] = {"dtype": word, "shape": shape, "data_offsets": (begin, end)}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape, dtype, get in tensors:
            array = np.ascontiguousarray(get())
            assert (array.shape, array.dtype) == (shape, dtype), name
            stream.write(array.reshape(-1).view(np.uint8).data)
