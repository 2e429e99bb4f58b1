"""Parameters as an orbax checkpoint: saved, checked against a table of shapes, restored.

Knows nothing of Hugging Face or of configurations. Orbax is imported when first used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from flora_jax.checkpoints.tensor_files import FLOATS, CheckpointError, stored_dtype
from flora_jax.errors import listing
from flora_jax.weights.held import Reading


def save_params(arrays: Mapping[str, jax.Array], directory: Path) -> None:
    """Writes arrays by dotted path as nested dictionaries into ``directory``, which must be new."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), _nested(arrays))


def restore_params(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    readings: Mapping[str, Reading],
    itemsize: int,
) -> dict[str, Any]:
    """Parameters by dotted path, made of arrays that are restored straight into their shardings.

    What is read as it is stored (float64 as float32) becomes what it is read for at once. ``itemsize`` is
    that of most numbers in bytes.

    Raises:
        CheckpointError: the directory is damaged; its parameters are not exactly ``shapes`` (all
            differences in one message); a finite value is too large for its dtype.
    """
    import orbax.checkpoint as ocp

    directory = directory.absolute()
    overflows = jax.jit(lambda array: jnp.isinf(array).any())
    device = SingleDeviceSharding(jax.local_devices()[0])
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            metadata = checkpointer.metadata(directory).item_metadata
            found = _flat(metadata.tree)
        except Exception as error:
            raise _unreadable(directory, error) from None
        _check(directory, found, shapes)
        restored: dict[str, Any] = {}
        for paths in _batches(shapes, itemsize):
            arguments = {
                path: ocp.ArrayRestoreArgs(
                    dtype=readings[path].dtype or stored_dtype(found[path].dtype),
                    sharding=readings[path].sharding or device,
                    global_shape=shapes[path],
                )
                for path in paths
            }
            try:
                part = checkpointer.restore(
                    directory,
                    args=ocp.args.PyTreeRestore(
                        item=_nested(dict.fromkeys(paths, 0)),
                        restore_args=_nested(arguments),
                        partial_restore=True,
                    ),
                )
            except Exception as error:
                raise _unreadable(directory, error) from None
            for path, array in _flat(part).items():
                dtype = readings[path].dtype
                narrows = dtype == np.float16 and found[path].dtype != dtype
                if narrows and bool(overflows(array)):
                    raise CheckpointError(f"{directory}: {path} has values too large for {dtype}")
                restored[path] = readings[path].make(array)
    return restored


def _batches(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    """Largest first, in batches of 1/40 of all: while it reads, orbax holds a batch several times."""
    sizes = {path: math.prod(shape) * itemsize for path, shape in shapes.items()}
    limit = sum(sizes.values()) // 40
    batch: list[str] = []
    for path in sorted(sizes, key=lambda path: -sizes[path]):
        if batch and sum(sizes[other] for other in batch) + sizes[path] > limit:
            yield batch
            batch = []
        batch.append(path)
    yield batch


def _unreadable(directory: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0]
    return CheckpointError(
        f"{directory}: damaged, or not an orbax checkpoint: {type(error).__name__}: {reason}"
    )


def _check(
    directory: Path, found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    problems = [f"{path} is unexpected" for path in found if path not in shapes]
    for path, shape in shapes.items():
        if path not in found:
            problems.append(f"{path} is missing, expected shape {shape}")
        elif tuple(found[path].shape) != shape:
            problems.append(f"{path} has shape {tuple(found[path].shape)}, expected {shape}")
        elif np.dtype(found[path].dtype) not in FLOATS:
            problems.append(f"{path} is {found[path].dtype}, expected floating point")
    if problems:
        head = f"{directory}: {len(problems)} parameters do not fit config.json"
        raise CheckpointError(listing(head, problems))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat
