"""The tensors of an adapter folder: their names, and loading them.

Knows nothing of adapter_config.json. Factors are float32 in this project; a file may hold them in
float16 or bfloat16, which float32 holds exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from flora_jax.errors import listing
from flora_jax.peft.config import AdapterError
from flora_jax.peft.format import Format

TENSORS_FILE = "adapter_model.safetensors"
TORCH_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
_DTYPES: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Header(NamedTuple):
    """A tensor as its file declares it; ``dtype`` is safetensors' name ("F32")."""

    shape: tuple[int, ...]
    dtype: str


def tensor_names(found: Format, module: str) -> tuple[str, ...]:
    """Names in the file of the tensors of a module (its path), in the order of the format's leaves."""
    return tuple(f"{PREFIX}{module}.{leaf.name}" for leaf in found.leaves)


def read_headers(directory: Path) -> tuple[Path, dict[str, Header]]:
    """Names, shapes and dtypes without the data (an ``adapter_model.bin`` is loaded for them).

    Raises:
        AdapterError: no such file, a truncated or damaged one, or a dtype that is not floating.
    """
    path = _tensors_file(directory)
    if path.name == TORCH_FILE:
        return path, {name: header for name, (header, _) in _load_torch(path).items()}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {
                name: Header(tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file: {error}") from None
    _check_dtypes(path, {name: header.dtype for name, header in headers.items()})
    return path, headers


def read_tensors(directory: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Every tensor of the folder, in float32.

    Raises:
        AdapterError: as :func:`read_headers`.
    """
    path = _tensors_file(directory)
    if path.name == TORCH_FILE:
        return path, {name: array for name, (_, array) in _load_torch(path).items()}
    try:
        entries = dict(safetensors.deserialize(path.read_bytes()))
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file: {error}") from None
    _check_dtypes(path, {name: str(entry["dtype"]) for name, entry in entries.items()})
    arrays = {}
    for name, entry in entries.items():
        flat = np.frombuffer(entry["data"], dtype=_DTYPES[str(entry["dtype"])])
        arrays[name] = flat.reshape(entry["shape"]).astype(np.float32)
    return path, arrays


def _tensors_file(directory: Path) -> Path:
    for name in (TENSORS_FILE, TORCH_FILE):
        if (directory / name).is_file():
            return directory / name
    raise AdapterError(f"{directory}: found neither {TENSORS_FILE} nor {TORCH_FILE}")


def _check_dtypes(path: Path, dtypes: dict[str, str]) -> None:
    wrong = [
        f"{name}: found dtype {dtype}, expected one of {', '.join(_DTYPES)}"
        for name, dtype in dtypes.items()
        if dtype not in _DTYPES
    ]
    if wrong:
        raise AdapterError(listing(f"{path}: dtypes of adapters are floating", wrong))


def _load_torch(path: Path) -> dict[str, tuple[Header, np.ndarray]]:
    try:
        import torch
    except ImportError:
        raise AdapterError(
            f"{path}: reading it needs torch; install torch, or save the adapter as {TENSORS_FILE} "
            "(PEFT's save_pretrained(..., safe_serialization=True))"
        ) from None
    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch errors have no common type
        raise AdapterError(f"{path}: not a whole file of torch tensors: {error}") from None
    if not isinstance(loaded, dict) or not all(torch.is_tensor(t) for t in loaded.values()):
        raise AdapterError(f"{path}: found {type(loaded).__name__}, expected named tensors")
    dtypes = {name: names.get(t.dtype, str(t.dtype)) for name, t in loaded.items()}
    _check_dtypes(path, dtypes)
    return {
        name: (Header(tuple(t.shape), dtypes[name]), t.to(torch.float32).numpy())
        for name, t in loaded.items()
    }
