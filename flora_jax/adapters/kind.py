"""The interface of an adapter kind, and what every kind reduces to: rank-1 components.

Factors are leaves of a frozen dataclass. Without a leading axis, as ``[R, I]``, they belong to one
adapter; with one, as ``[B, R, I]``, row ``b`` of a batch uses adapter ``b``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.weights.product import Weight


@dataclasses.dataclass(frozen=True)
class Components:
    """One adapter on one projection as pairs of float32 vectors on the host, its scale already in
    ``post`` and ``up``.

    ``W_i = W ∘ Σ_r pre_r post_rᵀ + Σ_r down_r up_rᵀ`` and
    ``bias_i = bias + bias_scale ∘ bias``; ``bias_scale`` is ``None`` where the bias stays.
    """

    pre_RI: np.ndarray
    post_RO: np.ndarray
    down_RI: np.ndarray
    up_RO: np.ndarray
    bias_scale_O: np.ndarray | None = None


class Kind(NamedTuple):
    """A kind of adapter as pure functions over its parameter dataclass ``type``.

    ``init(key, inputs, outputs, …) -> params``;
    ``apply(params_B, x_BTI, W_IO, bias_O) -> y_BTO`` with one adapter per row, by einsum;
    ``apply_one(params, x_TI, W_IO, bias_O) -> y_TO``, the same for one example, for ``jax.vmap``;
    ``merge(params, W_IO, bias_O) -> (W_IO, bias_O)``, the explicit weight of one adapter;
    ``components(params, inputs, outputs) -> Components``.
    """

    name: str
    type: type
    init: Callable[..., Any]
    apply: Callable[..., jax.Array]
    apply_one: Callable[..., jax.Array]
    merge: Callable[..., tuple[jax.Array, jax.Array | None]]
    components: Callable[..., Components]


def apply_vmap(
    kind: Kind, params: Any, x_BTI: jax.Array, W_IO: Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """``kind.apply`` written as ``jax.vmap`` of ``kind.apply_one``: ``[B, T, O]``."""
    return jax.vmap(kind.apply_one, in_axes=(0, 0, None, None))(params, x_BTI, W_IO, bias_O)


def stack(adapters: Sequence[Any]) -> Any:
    """Adapters of one kind, rank and configuration as one with a leading axis, for a batch.

    Raises:
        ValueError: they differ in kind, configuration or shape.
    """
    first = jax.tree.structure(adapters[0]), [leaf.shape for leaf in jax.tree.leaves(adapters[0])]
    for number, adapter in enumerate(adapters):
        found = jax.tree.structure(adapter), [leaf.shape for leaf in jax.tree.leaves(adapter)]
        if found != first:
            raise ValueError(
                f"adapter {number} is {found[0]} with shapes {found[1]}, "
                f"expected {first[0]} with {first[1]}; mix kinds and ranks in a ragged batch instead"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def ones(rank: int, features: int) -> np.ndarray:
    return np.ones((rank, features), np.float32)


def zeros(rank: int, features: int) -> np.ndarray:
    return np.zeros((rank, features), np.float32)


def uniform_fan_in(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Uniform within ``±1/sqrt(I)`` for ``[R, I]``: PEFT's start of LoRA's and HiRA's input side."""
    bound = shape[1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
