"""DoRA against its definition: forms, gradients, zero outputs, components over weights as held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax import adapters
from flora_jax.adapters.dora import KIND, DoRA, gain
from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import form, list_pairs, row_components
from flora_jax.mixing.ragged import Ragged, RowWise
from flora_jax.serve.ahead import Compilations
from flora_jax.weights.dense import Dense
from flora_jax.weights.product import explicit
from flora_jax.weights.quantized import quantize
from tests.helpers import oracles
from tests.helpers.random_adapters import KINDS, random_adapter, random_projection

INPUTS, OUTPUTS = 24, 40
TARGET = "attn.c_attn"


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def case(seed, rank, rows=3, dtype=jnp.float32):
    own = [random_projection("dora", 10 * seed + n, INPUTS, OUTPUTS, rank, alpha=3.0)
           for n in range(rows)]  # fmt: skip
    x, W = draw(seed, rows, 4, INPUTS).astype(dtype), draw(seed + 1, INPUTS, OUTPUTS).astype(dtype)
    return own, x, W, draw(seed + 2, OUTPUTS).astype(dtype)


def assert_close(found, expected, share=3e-6):
    assert np.abs(np.asarray(found, np.float64) - expected).max() < share * np.abs(expected).max()


@pytest.mark.parametrize("dtype, share", [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("rank", [1, 5])
def test_every_form_equals_the_explicit_weight(rank, dtype, share):
    own, x, W, bias = case(rank, rank, dtype=dtype)
    expected = np.stack([oracles.project(p, row, W, bias) for p, row in zip(own, x)])

    @jax.jit
    def forms(own, x, W, bias):
        stacked = adapters.stack(own)
        merged = [adapters.apply(None, row[None], *KIND.merge(p, W, bias))[0]
                  for p, row in zip(own, x)]  # fmt: skip
        return (
            adapters.apply(stacked, x, W, bias),
            adapters.apply_vmap(KIND, stacked, x, W, bias),
            jnp.stack([adapters.apply(p, row[None], W, bias)[0] for p, row in zip(own, x)]),
            jnp.stack(merged),
        )

    for found in forms(own, x, W, bias):
        assert found.dtype == dtype
        assert_close(found, expected, share)


def test_a_fresh_adapter_is_the_identity_and_needs_the_weight():
    _, x, W, bias = case(0, 2)
    fresh = KIND.init(jax.random.key(0), INPUTS, OUTPUTS, 2, weight=lambda: W)
    np.testing.assert_allclose(fresh.magnitude_O, np.linalg.norm(W, axis=0), rtol=1e-6)
    assert_close(adapters.apply(fresh, x, W, bias), np.asarray(adapters.apply(None, x, W, bias)))
    for ask in (
        lambda: KIND.init(jax.random.key(0), INPUTS, OUTPUTS, 2),
        lambda: KIND.components(fresh, INPUTS, OUTPUTS, None),
    ):
        with pytest.raises(ValueError, match="depends on the base's weights"):
            ask()


def test_the_norm_gets_no_gradient():
    (own, *_), x, W, bias = case(3, 2)
    changed = W + own.scale * own.down_RI.T @ own.up_RO
    norm = jnp.linalg.norm(changed, axis=0)

    def detached(params):
        changed = W + params.scale * params.down_RI.T @ params.up_RO
        return jnp.sum(jnp.sin(x[0] @ (changed * (params.magnitude_O / norm)[None]) + bias[None]))

    def ours(params):
        return jnp.sum(jnp.sin(adapters.apply(params, x[:1], W, bias)))

    for found, right in zip(*(jax.tree.leaves(jax.grad(f)(own)) for f in (ours, detached))):
        assert np.abs(right).max() > 0
        assert_close(found, np.asarray(right, np.float64), 1e-4)


@pytest.mark.parametrize("cancelled", [False, True])
def test_an_output_of_no_length_is_its_bias_alone(cancelled):
    """Rows of zeros, and rows that the low-rank part takes to zero: 0 / 0 is never computed."""
    (own, *_), x, W, bias = case(4, 2)
    up = own.up_RO.at[:, 7].set(0.0)
    W = W.at[:, 7].set(0.0)
    if cancelled:
        up = up.at[:, 7].set(jnp.array([1.0, 0.0]))
        W = W.at[:, 7].set(-own.scale * own.down_RI[0])
    own = DoRA(own.down_RI, up, own.magnitude_O, own.scale)
    value, grads = jax.value_and_grad(lambda p: jnp.sum(adapters.apply(p, x[:1], W, bias) ** 2))(
        own
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in (value, *jax.tree.leaves(grads)))
    found = KIND.components(own, INPUTS, OUTPUTS, lambda: W)
    assert found.post_RO[0, 7] == 0
    assert not found.up_RO[:, 7].any()
    y = adapters.apply(own, x[:1], W, bias)
    np.testing.assert_array_equal(y[0, :, 7], np.full(4, bias[7]))
    expected = oracles.project(own, x[0], np.asarray(W), bias)
    expected[:, 7] = bias[7]
    assert_close(y[0], expected)


HELD = {
    "dense": lambda W: W,
    "by outputs": lambda W: Dense(W.T),
    "int8": lambda W: quantize(W, "int8"),
    "int4": lambda W: quantize(W, "int4"),
}


@pytest.mark.parametrize("held", HELD)
def test_a_batch_with_all_other_kinds_equals_explicit_weights_of_the_weight_as_held(held):
    W = HELD[held](draw(1, INPUTS, OUTPUTS))
    x, bias = draw(2, 8, 3, INPUTS), draw(3, OUTPUTS)
    size = {TARGET: (INPUTS, OUTPUTS)}
    made = {f"{kind}{n}": random_adapter(kind, n, size, rank=3 + n)
            for kind in (*KINDS, "dora") for n in range(2)}  # fmt: skip
    bank = build_bank(made, size, 1, lambda layer, target: W)
    names = [None, "dora0", "lora1", "flora0", "dora1", "ia30", "hira1", "dora0"]
    explicit_W = explicit(W)
    expected = np.stack([
        oracles.project(None if name is None else made[name].layers[0][TARGET], row, explicit_W, bias)
        for name, row in zip(names, x)
    ])  # fmt: skip
    pairs = list_pairs(bank, names)[TARGET]
    found = adapters.apply(Ragged(bank.layers[0][TARGET], pairs), x, W, bias)
    assert_close(found, expected, 2e-5)
    own = row_components(bank, names[1:2], form(bank, "dora0"))[TARGET]
    alone = adapters.apply(RowWise(bank.layers[0][TARGET], own), x[1:2], W, bias)
    assert_close(alone[0], expected[1], 2e-5)


def test_a_large_weight_is_read_in_slices(monkeypatch):
    (own, *_), _, W, _ = case(5, 3)
    whole = gain(own, W)
    monkeypatch.setattr("flora_jax.adapters.dora.slices", lambda shape: 5)
    for held in (W, Dense(W.T)):
        np.testing.assert_allclose(gain(own, held), whole, rtol=1e-5)


def test_components_of_any_rank_compile_nothing_after_the_rehearsal():
    inputs = INPUTS + 2
    W, other, compilations = draw(6, inputs, OUTPUTS), draw(7, inputs, OUTPUTS), Compilations()
    own = {
        rank: jax.device_get(random_projection("dora", rank, inputs, OUTPUTS, rank))
        for rank in (1, 4, 5, 16, 17)
    }
    compilations.reset()
    KIND.rehearse(W, 6)
    assert compilations.count > 0
    compilations.reset()
    for rank in (1, 4, 5, 16):
        KIND.components(own[rank], inputs, OUTPUTS, lambda: other)
    assert compilations.count == 0
    KIND.components(own[17], inputs, OUTPUTS, lambda: W)
    assert compilations.count > 0
