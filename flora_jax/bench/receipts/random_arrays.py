"""Random arrays made where they are used: for measurements, whose time may depend on the numbers.

Products of zeros or of one number draw less power than real ones, and so run faster. The numbers come
from a hash of each element's place, one short program for a shape; the generators of ``jax.random`` take
far longer to compile, and the host longer to fill a large model. Knows nothing of what is measured.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.models.family import ModelConfig, changed
from flora_jax.models.model import Model, abstract_model


def _mixed(number: jax.Array) -> jax.Array:
    """A hash of each uint32: every bit of the result depends on every one of the number."""
    for multiplier in (0x7FEB352D, 0x846CA68B):
        number = (number ^ (number >> 16)) * jnp.uint32(multiplier)
    return number ^ (number >> 16)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(
    seed: jax.Array, mean: jax.Array, scale: jax.Array, *, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    place = jax.lax.iota(jnp.uint32, math.prod(shape))
    hashed = _mixed(place + _mixed(seed + jnp.uint32(0x9E3779B9)))
    unit = (hashed >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    # Uniform of standard deviation one: ±sqrt(3).
    drawn = (2 * unit - 1) * jnp.float32(3**0.5) * scale + mean
    return drawn.astype(dtype).reshape(shape)


def draw(
    shape: tuple[int, ...], dtype: Any, seed: int, mean: float = 0.0, scale: float = 1.0
) -> jax.Array:
    """An array of independent uniform numbers of this mean and standard deviation."""
    numbers = jnp.uint32(seed % 2**32), jnp.float32(mean), jnp.float32(scale)
    return _draw(*numbers, shape=tuple(shape), dtype=jnp.dtype(dtype))


def fill(tree: Any, seed: int, mean: float = 0.0, scale: float = 1.0) -> Any:
    """Such an array in the place of every leaf, of its shape and dtype; each has other numbers."""
    leaves, structure = jax.tree.flatten(tree)
    made = [
        draw(leaf.shape, leaf.dtype, _seed(seed, number), mean, scale)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, made)


def random_model(config: ModelConfig, dtype: Any, seed: int = 0) -> Model:
    """A model whose activations keep their size; every array has random numbers of its own.

    Kernels, ``[O, I]``, have a standard deviation of ``I^-0.5``, embeddings the configuration's, the
    scales of norms lie around one.
    """
    config = changed(config, dtype=str(jnp.dtype(dtype)))
    model = abstract_model(config, dtype)
    found, structure = jax.tree_util.tree_flatten_with_path(model.params)
    made = []
    for number, (path, leaf) in enumerate(found):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            mean, scale = 1.0, 0.1
        elif "kernel" in name:
            mean, scale = 0.0, leaf.shape[-1] ** -0.5
        else:
            mean, scale = 0.0, config.initializer_range
        made.append(draw(leaf.shape, leaf.dtype, _seed(seed, number), mean, scale))
    return model._replace(params=jax.tree.unflatten(structure, made))


def _seed(seed: int, number: int) -> int:
    return seed * 1_000_003 + number
