"""Which weights of a model are quantised: the kernels of the projections, and nothing else.

The embeddings with the tied or own head, the layer norms and the biases keep their dtype, as with
bitsandbytes: they are few, or a token's choice hangs on them. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.family import family_of
from flora_jax.models.model import Model
from flora_jax.models.sharding import named_leaves
from flora_jax.weights.quantized import Method, Quantized, quantize, quantizer


def quantize_model(model: Model, method: Method) -> Model:
    """The model with quantised kernels; they stand for weights of the dtype that they had.

    Raises:
        InputError: int4 cannot take a kernel's number of inputs.
    """
    return _map_kernels(
        model, lambda leaf: quantizer(method, np.dtype(leaf.dtype).name, None)(leaf)
    )


def quantize_abstract(model: Model, method: Method) -> Model:
    """The same of shapes and dtypes (:func:`~flora_jax.models.model.abstract_model`).

    Raises:
        InputError: see :func:`quantize_model`.
    """
    return _map_kernels(model, lambda leaf: jax.eval_shape(partial(quantize, method=method), leaf))


def _map_kernels(model: Model, change: Callable[[Any], Quantized]) -> Model:
    leaves, structure = named_leaves(model.params)
    is_kernel = family_of(model.config).is_kernel
    values = []
    for path, leaf in leaves.items():
        try:
            values.append(change(leaf) if is_kernel(path) else leaf)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
    return model._replace(params=jax.tree.unflatten(structure, values))
