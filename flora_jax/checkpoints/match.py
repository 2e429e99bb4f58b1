"""The check that a checkpoint's tensors are the model's parameters, all of them and no others.

Knows nothing of file formats or of JAX arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flora_jax.checkpoints.tensor_files import FLOATS, CheckpointError, StoredTensor
from flora_jax.errors import listing
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.models.starcoder.names import hf_tensors

_BUFFER = re.compile(r"(?:transformer\.)?(?:h\.(\d+)\.attn\.)?(bias|masked_bias)")


def match_tensors(
    directory: Path, stored: Mapping[str, StoredTensor], config: StarCoderConfig
) -> dict[str, StoredTensor]:
    """The stored tensor of every parameter, by our dotted path; every tensor is used or accounted for.

    Names may lack the prefix ``transformer.`` (exports of the model without its head). Accepted
    beside the parameters are a ``lm_head.weight`` equal to the tied embedding to the bit (or in the
    embedding's place), and causal masks as buffers.

    Raises:
        CheckpointError: tensors are missing, unexpected, mis-shaped or not floating point, or a
            redundant one contradicts the rest: all of them in one message.
    """
    table = hf_tensors(config)
    paths = {tensor.name: path for path, tensor in table.items()}
    paths |= {tensor.name.removeprefix("transformer."): path for path, tensor in table.items()}
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    head: StoredTensor | None = None
    for name, tensor in stored.items():
        path = paths.get(name)
        if path is None and name == "lm_head.weight":
            head = tensor
        elif path is None:
            problems += _buffer_problems(tensor, config)
        elif path in found:
            problems.append(f"{name} and {found[path].name} are the same parameter")
        else:
            found[path] = tensor
    embedding = found.get("wte.embedding")
    if head is not None and embedding is None:
        found["wte.embedding"] = head
    for path, wanted in table.items():
        if path not in found:
            problems.append(f"{wanted.name} is missing, expected shape {wanted.shape}")
        else:
            problems += _form_problems(found[path], wanted.shape)
    if head is not None and embedding is not None and not _same_bits(head, embedding):
        problems.append(
            f"{head.name} in {head.file.name} differs from {embedding.name}, but config.json ties them"
        )
    if problems:
        summary = f"{directory}: {len(problems)} tensors do not fit config.json"
        raise CheckpointError(listing(summary, problems))
    return found


def _form_problems(tensor: StoredTensor, shape: tuple[int, ...]) -> Iterator[str]:
    where = f"{tensor.name} in {tensor.file.name}"
    if tensor.shape != shape:
        yield f"{where} has shape {tensor.shape}, expected {shape}"
    # NumPy takes None for float64, so that `None in FLOATS` is true.
    if tensor.dtype is None or tensor.dtype not in FLOATS:
        yield f"{where} is {tensor.dtype_name}, expected floating point"


def _same_bits(one: StoredTensor, other: StoredTensor) -> bool:
    if one.dtype is None or (one.shape, one.dtype_name) != (other.shape, other.dtype_name):
        return False
    return all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for (_, a), (_, b) in zip(one.blocks(), other.blocks(), strict=True)
    )


def _buffer_problems(tensor: StoredTensor, config: StarCoderConfig) -> Iterator[str]:
    where = f"{tensor.name} in {tensor.file.name}"
    match = _BUFFER.fullmatch(tensor.name)
    if match is None or int(match[1] or 0) >= config.n_layer:
        yield f"{where} is unexpected, of shape {tensor.shape}"
    elif tensor.dtype is None:
        yield f"{where} is {tensor.dtype_name}, expected a mask"
    elif match[2] == "masked_bias":
        value = tensor.read(0, 1).astype(np.float64) if tensor.shape in ((), (1,)) else None
        # -1e4 is -9984 in bfloat16.
        if value is None or not value[0] <= -9e3:
            seen = f"shape {tensor.shape}" if value is None else f"value {value[0]:g}"
            yield f"{where} has {seen}, expected one number of about -1e4 or less"
    elif not _is_causal(tensor, config.n_positions):
        yield (
            f"{where}, of shape {tensor.shape}, is not the causal mask of {config.n_positions} "
            "positions (ones on and below the diagonal)"
        )


def _is_causal(tensor: StoredTensor, positions: int) -> bool:
    *ones, rows, columns = tensor.shape if len(tensor.shape) >= 2 else (0, 0)
    if (rows, columns) != (positions, positions) or any(size != 1 for size in ones):
        return False
    step = max(1, (1 << 20) // columns)
    return all(
        np.array_equal(
            tensor.read(start * columns, min(rows, start + step) * columns).astype(np.float32),
            np.tri(min(step, rows - start), columns, start, dtype=np.float32).reshape(-1),
        )
        for start in range(0, rows, step)
    )
