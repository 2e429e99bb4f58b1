"""The projections' kernels held by outputs, for decoding on a CPU. Knows nothing of files or adapters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters.transposed import Transposed
from flora_jax.starcoder.model import Model
from flora_jax.starcoder.quantize import is_quantised
from flora_jax.starcoder.sharding import named_leaves


def for_decoding(model: Model, *, consume: bool = False) -> Model:
    """The model as its machine decodes fastest: on a CPU :func:`outputs_first`, else as it is."""
    return outputs_first(model, consume=consume) if jax.default_backend() == "cpu" else model


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
    values = [
        turn(leaf) if is_quantised(path) and isinstance(leaf, jax.Array) else leaf
        for path, leaf in leaves.items()
    ]
    return model._replace(params=jax.tree.unflatten(structure, values))
