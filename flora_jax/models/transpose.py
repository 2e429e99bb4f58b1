"""The projections' kernels held by outputs, for decoding on a CPU. Knows nothing of files or adapters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.models.family import family_of
from flora_jax.models.model import Model
from flora_jax.models.sharding import named_leaves
from flora_jax.platforms import Platform
from flora_jax.platforms import platform as platform_of
from flora_jax.weights.transposed import Transposed


def for_decoding(model: Model, *, consume: bool = False, platform: Platform | None = None) -> Model:
    """The model as a platform, by default JAX's, decodes fastest: :func:`outputs_first`, or as it is."""
    by_outputs = (platform or platform_of()).weights_by_outputs
    return outputs_first(model, consume=consume) if by_outputs else model


def outputs_first(model: Model, *, consume: bool = False) -> Model:
    """The model with its projections' kernels as :class:`Transposed`; quantised ones stay as they are.

    With ``consume`` each kernel of ``model`` is deleted as soon as its transpose is there, so that no
    more than one is in memory twice; ``model`` is of no use afterwards.
    """
    transpose = jax.jit(jnp.transpose)

    def turn(leaf: Any) -> Transposed:
        turned = jax.block_until_ready(Transposed(transpose(leaf)))
        if consume:
            leaf.delete()
        return turned

    leaves, structure = named_leaves(model.params)
    is_kernel = family_of(model.config).is_kernel
    values = [
        turn(leaf) if is_kernel(path) and isinstance(leaf, jax.Array) else leaf
        for path, leaf in leaves.items()
    ]
    return model._replace(params=jax.tree.unflatten(structure, values))
