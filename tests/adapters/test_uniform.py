"""One kind and one rank in a batch: einsum, vmap and merged forms against explicit weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from flora_jax import adapters
from flora_jax.adapters import KINDS
from tests.helpers import oracles
from tests.helpers.random_adapters import random_projection

CASES = [
    ("lora", {"alpha": 3.0}),
    ("flora", {"reduction": "mean"}),
    ("flora", {"reduction": "sum"}),
    ("flora", {"init": "frozen_ones"}),
    ("hira", {}),
    ("ia3", {"side": "output"}),
    ("ia3", {"side": "input"}),
]
# Of the largest output: float32 sums of a few hundred terms; 16 bits have 8 and 11 bits of mantissa.
TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}


def _draw(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _case(kind, options, seed, rank, sizes, dtype=jnp.float32):
    batch, tokens, inputs, outputs = sizes
    own = [
        random_projection(kind, 100 * seed + row, inputs, outputs, rank, **options)
        for row in range(batch)
    ]
    x = _draw(seed, (batch, tokens, inputs), dtype)
    W, bias = _draw(seed + 1, (inputs, outputs), dtype), _draw(seed + 2, (outputs,), dtype)
    expected = np.stack([oracles.project(p, x[row], W, bias) for row, p in enumerate(own)])
    return own, x, W, bias, expected


def _assert_close(found, expected, dtype):
    error = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert found.dtype == dtype
    assert error < TOLERANCE[dtype], error


RANKS = {jnp.float32: (1, 2, 5, 16), jnp.bfloat16: (5,), jnp.float16: (16,)}


@pytest.mark.parametrize(
    "kind, options, rank, dtype",
    [
        (kind, options, rank, dtype)
        for kind, options in CASES
        for dtype, ranks in RANKS.items()
        for rank in ((1,) if kind == "ia3" else ranks)
    ],
)
def test_every_form_equals_the_explicit_weight(kind, options, rank, dtype):
    sizes = {1: (3, 4, 24, 40), 2: (1, 1, 7, 3), 5: (5, 2, 16, 16), 16: (2, 3, 8, 33)}[rank]

    @jax.jit
    def forms(own, x, W, bias):
        stacked = adapters.stack(own)
        merged = [
            adapters.apply(None, row[None], *KINDS[kind].merge(params, W, bias))[0]
            for params, row in zip(own, x)
        ]
        return (
            adapters.apply(stacked, x, W, bias),
            adapters.apply_vmap(KINDS[kind], stacked, x, W, bias),
            jnp.stack(merged),
        )

    for seed in range(3):
        own, x, W, bias, expected = _case(kind, options, seed, rank, sizes, dtype)
        for found in forms(own, x, W, bias):
            _assert_close(found, expected, dtype)


@pytest.mark.parametrize("kind, options", CASES)
def test_one_adapter_is_shared_by_all_rows_without_a_batch_axis(kind, options):
    own, x, W, bias, _ = _case(kind, options, 4, 3, (3, 4, 8, 12))
    expected = np.stack([oracles.project(own[0], row, W, bias) for row in x])
    _assert_close(adapters.apply(own[0], x, W, bias), expected, jnp.float32)


@pytest.mark.parametrize("kind, options", CASES)
def test_gradients_are_numerically_right(kind, options):
    own, x, W, bias, _ = _case(kind, options, 7, 2, (2, 3, 5, 4))
    stacked = adapters.stack(own)

    def loss(leaves, x):
        params = jax.tree.unflatten(jax.tree.structure(stacked), leaves)
        return jnp.sum(jnp.sin(adapters.apply(params, x, W, bias)))

    loss = jax.jit(loss)
    leaves = jax.tree.leaves(stacked)
    if options.get("init") == "frozen_ones":
        grads = jax.grad(loss)(leaves, x)
        for grad in grads:
            assert not np.any(grad[:, 0])
            assert np.any(grad[:, 1])
        return
    check_grads(loss, (leaves, x), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_reduction_is_part_of_the_adapter():
    mean = random_projection("flora", 0, 8, 6, 4, reduction="mean")
    total = random_projection("flora", 0, 8, 6, 4, reduction="sum")
    np.testing.assert_array_equal(mean.down_RI, total.down_RI)
    x, W = _draw(1, (1, 3, 8)), _draw(2, (8, 6))
    np.testing.assert_allclose(
        4 * adapters.apply(mean, x, W), adapters.apply(total, x, W), rtol=1e-5
    )


def test_factors_of_another_width_are_refused_with_both_shapes():
    params = adapters.stack([random_projection("flora", 0, 8, 6, 4)])
    with pytest.raises(
        ValueError, match=r"flora.apply: down_BRI has shape \(1, 4, 8\), but I is 9"
    ):
        adapters.apply(params, _draw(0, (1, 2, 9)), _draw(1, (9, 6)))


def test_adapters_of_different_rank_do_not_stack():
    with pytest.raises(ValueError, match="ragged"):
        adapters.stack([random_projection("lora", 0, 8, 6, rank) for rank in (1, 2)])
