"""The check that a checkpoint's tensors are the model's parameters, all of them and no others.

Knows nothing of file formats or of JAX arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flora_jax.checkpoints.tensor_files import FLOATS, CheckpointError, StoredTensor
from flora_jax.errors import listing
from flora_jax.models.family import ModelConfig, family_of


def match_tensors(
    directory: Path, stored: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The stored tensor of every parameter, by our dotted path; every tensor is used or accounted for.

    Names may lack the family's prefix (exports of the model without its head). Accepted beside the
    parameters are a head equal to the tied embedding to the bit (or in the embedding's place), and what
    the family says is redundant (causal masks as buffers).

    Raises:
        CheckpointError: tensors are missing, unexpected, mis-shaped or not floating point, or a
            redundant one contradicts the rest: all of them in one message.
    """
    family = family_of(config)
    table, prefix = family.tensors(config), family.optional_prefix
    paths = {tensor.name: path for path, tensor in table.items()}
    paths |= {tensor.name.removeprefix(prefix): path for path, tensor in table.items()}
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    head: StoredTensor | None = None
    for name, tensor in stored.items():
        path = paths.get(name)
        if path is None and name == family.tied_head:
            head = tensor
        elif path is None:
            problems += family.redundant(tensor, config)
        elif path in found:
            problems.append(f"{name} and {found[path].name} are the same parameter")
        else:
            found[path] = tensor
    embedding = found.get(family.embedding)
    if head is not None and embedding is None:
        found[family.embedding] = head
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
