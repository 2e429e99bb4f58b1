"""The small host arrays of a dispatch as one array, which costs one copy to the device instead of many.

Knows nothing of what the arrays mean.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = (np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32))


class Layout:
    """Where each array of a tree lies among the words; one object for all trees of equal shapes."""

    def __init__(self, structure: Any, shapes: tuple[tuple[tuple[int, ...], np.dtype], ...]):
        self.structure, self.shapes = structure, shapes


@functools.cache
def _layout(structure: Any, shapes: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> Layout:
    # Compared by identity from here on: hashing shapes at every call is what this saves.
    return Layout(structure, shapes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree of small arrays as int32 words ``[N]``, and where they lie among them."""

    words_N: Any
    layout: Layout = dataclasses.field(metadata=dict(static=True))

    def unpack(self) -> Any:
        """The tree; inside a jitted step."""
        arrays, start = [], 0
        for shape, dtype in self.layout.shapes:
            end = start + math.prod(shape)
            words = self.words_N[start:end].reshape(shape)
            if dtype == np.bool_:
                arrays.append(words != 0)
            elif dtype == np.int32:
                arrays.append(words)
            else:
                arrays.append(jax.lax.bitcast_convert_type(words, jnp.dtype(dtype)))
            start = end
        return jax.tree.unflatten(self.layout.structure, arrays)


def pack(tree: Any) -> Packed:
    """A tree of NumPy arrays and scalars, int32, uint32, float32 or bool, as one array.

    Raises:
        TypeError: an array of another dtype.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes, words = [], []
    for leaf in leaves:
        array = np.asarray(leaf)
        shapes.append((array.shape, array.dtype))
        if array.dtype == np.bool_:
            array = array.astype(np.int32)
        elif array.dtype not in _WORDS:
            raise TypeError(f"found {array.dtype}, expected int32, uint32, float32 or bool")
        words.append(array.reshape(-1).view(np.int32))
    whole = np.concatenate(words) if words else np.zeros(0, np.int32)
    return Packed(whole, _layout(structure, tuple(shapes)))
