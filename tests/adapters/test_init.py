"""How adapters start: as the identity, and free to use their rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax import adapters
from flora_jax.adapters import KINDS, flora
from tests.helpers import oracles

IDENTITIES = [
    ("lora", {}, True),
    ("hira", {}, True),
    ("flora", {"init": "frozen_ones", "reduction": "sum"}, True),
    ("flora", {"init": "frozen_ones", "reduction": "mean"}, True),
    ("flora", {"init": "ones"}, False),
    ("flora", {"init": "ones", "reduction": "sum"}, False),
    ("flora", {"init": "zero_sum"}, False),
    ("flora", {"init": "zero_sum", "reduction": "sum"}, False),
]
CASES = [(*case, rank) for case in IDENTITIES for rank in (1, 2, 8, 16)]
CASES += [("ia3", {"side": side}, True, 1) for side in ("output", "input")]


@pytest.mark.parametrize("kind, options, exact, rank", CASES)
def test_a_fresh_adapter_is_the_identity(kind, options, exact, rank):
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 4)
        params = KINDS[kind].init(keys[0], 24, 40, rank, **options)
        x = jax.random.normal(keys[1], (2, 3, 24))
        W, bias = jax.random.normal(keys[2], (24, 40)), jax.random.normal(keys[3], (40,))
        merged_W, merged_bias = KINDS[kind].merge(params, W, bias)
        np.testing.assert_array_equal(merged_bias, bias)
        # The bits are those of the weight; a product of other shape may round differently.
        np.testing.assert_allclose(merged_W, W, rtol=0 if exact else 1e-6)
        expected = adapters.apply(None, x, W, bias)
        np.testing.assert_allclose(adapters.apply(params, x, W, bias), expected, atol=1e-4)


def test_unknown_inits_reductions_and_ranks_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="init is 'random'"):
        flora.init(key, 4, 4, 2, init="random")
    with pytest.raises(ValueError, match="reduction is 'max'"):
        flora.init(key, 4, 4, 2, reduction="max")
    with pytest.raises(ValueError, match="rank is 0"):
        flora.init(key, 4, 4, 0)
    with pytest.raises(ValueError, match="IA3's rank is 2"):
        KINDS["ia3"].init(key, 4, 4, 2)


@pytest.mark.parametrize(
    "init, expected_rank, solved",
    [("ones", 1, False), ("zero_sum", 4, True), ("frozen_ones", 4, True)],
)
def test_only_a_broken_symmetry_uses_the_rank(init, expected_rank, solved):
    """Regression to a weight times a rank-4 matrix: components that start equal stay equal."""
    rng = np.random.default_rng(0)
    inputs, outputs, rank = 24, 32, 4
    W = jnp.asarray(rng.normal(size=(inputs, outputs)) / inputs**0.5, jnp.float32)
    factor = 1 + 0.3 * rng.normal(size=(inputs, rank - 1)) @ rng.normal(size=(rank - 1, outputs))
    target = W * jnp.asarray(factor, jnp.float32)
    params = flora.init(jax.random.key(1), inputs, outputs, rank, init=init)
    optimizer = optax.adam(3e-3)

    def loss(params):
        return jnp.sum(jnp.square(flora.merge(params, W)[0] - target)) / outputs

    @jax.jit
    def step(params, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    first = float(loss(params))
    for _ in range(3000):
        params, state = step(params, state)
    learned = np.einsum("ri,ro->io", params.down_RI, params.up_RO)
    assert oracles.effective_rank(learned, 0.01) >= expected_rank
    if solved:
        assert float(loss(params)) < 0.02 * first
    else:
        assert oracles.effective_rank(learned, 1e-4) == 1
        assert float(loss(params)) > 0.3 * first
