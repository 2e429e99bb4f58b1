"""The nearest low-rank change of a weight, added to it or multiplied with it, in least squares.

Errors are those of the adapted weight, ``Σ_io m_i (W_i - wanted)²``, with a weight ``m_i`` for each input
(one, or the mean square of what it is fed with, so that the error is that of the outputs).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Alternations of one start; the error has long settled by then.
_ALTERNATIONS = 60
# The first start and as many random ones; the best counts.
STARTS = 5
# Added to the normal equations' diagonal, as a share of its mean: components may be alike.
_RIDGE = 1e-6


class Fit(NamedTuple):
    """Factors ``down [R, I]`` and ``up [R, O]``, and the share of ``Σ m wanted²`` that they leave."""

    down_RI: jax.Array
    up_RO: jax.Array
    left: jax.Array


@partial(jax.jit, static_argnames="rank")
def sum_of(wanted_IO: jax.Array, rank: int, moments_I: jax.Array) -> Fit:
    """The best ``downᵀ up ≈ wanted`` of a rank: a truncated singular value decomposition."""
    root_m = jnp.sqrt(moments_I)[:, None]
    inner, values, outer = jnp.linalg.svd(root_m * wanted_IO, full_matrices=False)
    root = jnp.sqrt(values[:rank])
    down_RI = ((inner[:, :rank] * root[None]) / jnp.where(root_m > 0, root_m, 1.0)).T
    total = jnp.sum(values**2)
    left = jnp.sum(values[rank:] ** 2) / jnp.where(total > 0, total, 1.0)
    return Fit(_padded(down_RI, rank), _padded(root[:, None] * outer[:rank], rank), left)


def _padded(factor: jax.Array, rank: int) -> jax.Array:
    """A rank above the weight's smaller side has components of zeros."""
    return jnp.pad(factor, ((0, rank - len(factor)), (0, 0)))


def product_of(
    W_IO: jax.Array,
    wanted_IO: jax.Array,
    rank: int,
    moments_I: jax.Array,
    *,
    key: jax.Array,
    starts: int = STARTS,
) -> Fit:
    """A good ``W ∘ downᵀ up ≈ wanted`` of a rank; never divides by ``W``.

    It has no closed form: alternating least squares from several starts, of which the best is kept. The
    first is the low-rank part of ``wanted / W`` where ``W`` is not small, the others are random. Where
    half of the rank does better, as it may where that is exact and more components only make the
    equations singular, the others stay without effect: they have an ``up``, and ``down`` of zeros.
    """
    best = _alternate(W_IO, wanted_IO, _first(W_IO, wanted_IO, rank), moments_I)
    for number in range(1, starts):
        drawn_RO = jax.random.normal(jax.random.fold_in(key, number), best.up_RO.shape, jnp.float32)
        found = _alternate(W_IO, wanted_IO, drawn_RO, moments_I)
        if found.left < best.left:
            best = found
    if rank > 1:
        half = product_of(W_IO, wanted_IO, rank // 2, moments_I, key=key, starts=starts)
        if half.left < best.left:
            own = len(half.up_RO)
            best = Fit(_padded(half.down_RI, rank), best.up_RO.at[:own].set(half.up_RO), half.left)
    return best


def _first(W_IO: jax.Array, wanted_IO: jax.Array, rank: int) -> jax.Array:
    """``up [R, O]`` of the first start."""
    square_IO = jnp.square(W_IO)
    median = jnp.median(square_IO)
    # More than half of a pruned weight is zeros.
    below_IO = square_IO + jnp.where(median > 0, median, jnp.mean(square_IO))
    ratio_IO = W_IO * wanted_IO / jnp.where(below_IO > 0, below_IO, 1.0)
    return sum_of(ratio_IO, rank, jnp.ones(len(W_IO))).up_RO


@jax.jit
def _alternate(
    W_IO: jax.Array, wanted_IO: jax.Array, up_RO: jax.Array, moments_I: jax.Array
) -> Fit:
    """From ``up``: each side in turn is the solution of its least squares for the other."""
    square_IO, both_IO = jnp.square(W_IO), W_IO * wanted_IO
    own = moments_I[:, None]

    def turn(_: jax.Array, factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # An input's weight is common to all of its equations.
        down_RI = _solve(square_IO, both_IO, factors[1])
        new = down_RI, _solve((own * square_IO).T, (own * both_IO).T, down_RI)
        # More components than the change has leave the equations singular: what was found stays.
        sound = jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all()
        return jax.tree.map(lambda one, old: jnp.where(sound, one, old), new, factors)

    none_RI = jnp.zeros((len(up_RO), len(W_IO)), jnp.float32)
    down_RI, up_RO = jax.lax.fori_loop(0, _ALTERNATIONS, turn, (none_RI, up_RO))
    left_IO = W_IO * jnp.matmul(down_RI.T, up_RO, precision="highest") - wanted_IO
    total = jnp.sum(own * jnp.square(wanted_IO))
    left = jnp.sum(own * jnp.square(left_IO)) / jnp.where(total > 0, total, 1.0)
    return Fit(*_balanced(down_RI, up_RO), left)


def _solve(square: jax.Array, both: jax.Array, other: jax.Array) -> jax.Array:
    """For each ``x`` the numbers ``[R]`` that make ``Σ_y (W_xy Σ_r n_r other_ry - wanted_xy)²`` least.

    ``square`` is ``W²``, ``both`` is ``W ∘ wanted``, both ``[X, Y]``; ``other`` is ``[R, Y]``.
    """
    rank = len(other)
    pairs = (other[:, None] * other[None]).reshape(rank * rank, -1)
    normal_XRR = jnp.matmul(square, pairs.T, precision="highest").reshape(-1, rank, rank)
    mean = (jnp.trace(normal_XRR, axis1=1, axis2=2) / rank)[:, None, None]
    ridge_XRR = jnp.where(mean > 0, _RIDGE * mean, 1.0) * jnp.eye(rank)[None]
    right = jnp.matmul(both, other.T, precision="highest")[..., None]
    return jnp.linalg.solve(normal_XRR + ridge_XRR, right)[..., 0].T


def _balanced(down_RI: jax.Array, up_RO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same components, with both sides of each equally large."""
    sizes = [jnp.sqrt(jnp.mean(jnp.square(factor), axis=1)) for factor in (down_RI, up_RO)]
    empty_R = (sizes[0] == 0) | (sizes[1] == 0)
    ratio_R = jnp.sqrt(jnp.where(empty_R, 1.0, sizes[1]) / jnp.where(empty_R, 1.0, sizes[0]))
    return down_RI * ratio_R[:, None], up_RO / ratio_R[:, None]
