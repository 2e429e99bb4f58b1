"""HiRA: ``W_i = W ∘ (1 + down_iᵀ up_i)``, a FLoRA of rank r+1 whose first component is frozen ones.

PEFT's ``hira_A`` is ``down``, its ``hira_B`` the transpose of ``up``. There is no scale, and the
bias stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import fits, multiplicative
from flora_jax.adapters.kind import (
    ROUNDING,
    Components,
    Kind,
    WeightOf,
    adds,
    constant_part,
    ones,
    uniform_fan_in,
    zeros,
)
from flora_jax.shapes import check_shapes
from flora_jax.weights import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiRA:
    """``down [R, I]`` and ``up [R, O]``, or both with a leading batch axis."""

    down_RI: jax.Array
    up_RO: jax.Array


def init(
    key: jax.Array,
    inputs: int,
    outputs: int,
    rank: int,
    *,
    weight: WeightOf | None = None,
) -> HiRA:
    """The identity at the start: ``down`` random, ``up`` zero, as in PEFT."""
    return HiRA(uniform_fan_in(key, (rank, inputs)), jnp.zeros((rank, outputs), jnp.float32))


def _with_ones(factor: jax.Array) -> jax.Array:
    """The frozen first component in front, ``[…, R+1, features]`` in float32."""
    first = jnp.ones((*factor.shape[:-2], 1, factor.shape[-1]), jnp.float32)
    return jnp.concatenate([first, factor.astype(jnp.float32)], axis=-2)


def apply(
    params: HiRA, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """``x W + Σ_r up_r ∘ ((x ∘ down_r) W) + bias`` with one adapter per row: ``[B, T, O]``."""
    check_shapes("hira.apply", x_BTI=x_BTI, W_IO=W_IO, down_BRI=params.down_RI, up_BRO=params.up_RO)
    pre, post = _with_ones(params.down_RI), _with_ones(params.up_RO)
    return product.finish(multiplicative.apply_batch(pre, post, x_BTI, W_IO), bias_O, x_BTI.dtype)


def apply_one(
    params: HiRA, x_TI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """One example: ``[T, O]``."""
    pre, post = _with_ones(params.down_RI), _with_ones(params.up_RO)
    return product.finish(multiplicative.apply_one(pre, post, x_TI, W_IO), bias_O, x_TI.dtype)


def merge(
    params: HiRA, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The explicit ``W_i`` in the dtype of ``W``, and the unchanged bias."""
    pre, post = _with_ones(params.down_RI), _with_ones(params.up_RO)
    return multiplicative.merge(pre, post, W_IO), bias_O


def components(
    params: HiRA, inputs: int, outputs: int, weight: WeightOf | None = None
) -> Components:
    down_RI, up_RO = (np.asarray(x, np.float32) for x in (params.down_RI, params.up_RO))
    return Components(
        np.concatenate([ones(1, inputs), down_RI]),
        np.concatenate([ones(1, outputs), up_RO]),
        zeros(0, inputs),
        zeros(0, outputs),
    )


def redraw(params: HiRA, draw: Callable[..., Any], spread: float) -> HiRA:
    """So that ``Σ_r down_r up_r`` deviates by about ``spread``."""
    size = float(spread / params.down_RI.shape[-2]) ** 0.5
    return jax.tree.map(lambda leaf: draw(leaf, 0.0, size), params)


def of_components(components: Components, weight: WeightOf) -> HiRA:
    """Its pairs less the matrix of ones, which goes into a pair with a constant side, or is one more.

    Raises:
        ValueError: something is added to the weight.
    """
    if adds(components):
        raise ValueError("it adds to the weight, and a HiRA only multiplies it")
    constant, pre_RI, post_RO = constant_part(components)
    rest = np.float32(constant - 1.0)
    if abs(rest) > ROUNDING or not len(pre_RI):
        pre_RI, post_RO = _plus(rest, pre_RI, post_RO)
    return HiRA(jnp.asarray(pre_RI), jnp.asarray(post_RO))


def _plus(
    constant: np.float32, pre_RI: np.ndarray, post_RO: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of ``Σ_r pre_r post_rᵀ + constant``; what is given stays as it is."""
    flat_posts, flat_pres = _flat(post_RO), _flat(pre_RI)
    if len(flat_posts):
        r = flat_posts[0]
        pre_RI = pre_RI.copy()
        pre_RI[r] += constant / post_RO[r, 0]
    elif len(flat_pres):
        r = flat_pres[0]
        post_RO = post_RO.copy()
        post_RO[r] += constant / pre_RI[r, 0]
    else:
        pre_RI = np.concatenate([pre_RI, constant * ones(1, pre_RI.shape[1])])
        post_RO = np.concatenate([post_RO, ones(1, post_RO.shape[1])])
    return pre_RI, post_RO


def _flat(side_RX: np.ndarray) -> np.ndarray:
    """The components whose side is one number other than zero everywhere: their indices."""
    return np.flatnonzero((np.ptp(side_RX, axis=1) == 0) & (side_RX[:, 0] != 0))


def nearest(
    W_IO: jax.Array, wanted_IO: jax.Array, rank: int, moments_I: jax.Array, key: jax.Array
) -> HiRA:
    """By alternating least squares, see :func:`flora_jax.adapters.fits.product_of`."""
    fit = fits.product_of(W_IO, wanted_IO - W_IO, rank, moments_I, key=key)
    return HiRA(fit.down_RI, fit.up_RO)


KIND = Kind(
    "hira", HiRA, init, apply, apply_one, merge, components, redraw,
    of_components=of_components, nearest=nearest,
)  # fmt: skip
