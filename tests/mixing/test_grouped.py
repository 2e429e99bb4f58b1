"""Several adapters in one training batch: each row gets what its own adapter alone gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters import KINDS, apply, stack
from flora_jax.mixing import grouped
from flora_jax.mixing.grouped import Grouped, builds_weight, grouped_hooks
from tests.helpers import oracles
from tests.helpers.peft_folders import random_factors

INPUTS, OUTPUTS, TARGET = 12, 20, "attn.c_attn"
RANKED = [(kind, rank) for kind in ("lora", "flora", "hira") for rank in (1, 2, 4)]
CASES = {f"{kind}-{rank}": (kind, rank, {}) for kind, rank in RANKED} | {
    "flora-sum": ("flora", 2, {"reduction": "sum"}),
    "flora-frozen": ("flora", 3, {"frozen": 1}),
    "lora-scaled": ("lora", 2, {"scale": 2.5}),
    "ia3-output": ("ia3", 1, {"side": "output"}),
    "ia3-input": ("ia3", 1, {"side": "input"}),
}
# Adapters, rows of each, tokens of a row, activations' dtype: 21 tokens an adapter stay under the
# limit from which weights are built, 64 reach it.
SHAPES = [
    (1, 3, 7, "float32"),
    (3, 3, 7, "bfloat16"),
    (1, 4, 16, "bfloat16"),
    (3, 4, 16, "float32"),
]


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weights(seed, dtype="float32"):
    rng = np.random.default_rng([seed, 1])
    kernel = rng.standard_normal((INPUTS, OUTPUTS)) * INPUTS**-0.5
    return jnp.asarray(kernel, dtype), jnp.asarray(rng.standard_normal(OUTPUTS), dtype)


def factors(case, seed, many):
    kind, rank, fields = CASES[case]
    rng = np.random.default_rng([seed, 2])
    if kind == "lora":
        fields = {"scale": 1.0, **fields}
    return [random_factors(kind, INPUTS, OUTPUTS, rank, rng, **fields) for _ in range(many)]


@functools.partial(jax.jit, static_argnames="dropout")
def project(params, x_BTI, W_IO, bias_O, keys_N=None, dropout=0.0):
    (hooks,) = grouped_hooks([{TARGET: params}], keys_N, dropout)
    return apply(hooks[TARGET], x_BTI, W_IO, bias_O)


@pytest.mark.parametrize("case", CASES)
def test_each_row_gets_what_its_adapter_alone_gives(case):
    for seed, (many, rows, tokens, dtype) in enumerate(SHAPES):
        own = factors(case, seed, many)
        x = draw(seed, rows * many, tokens, INPUTS, dtype=dtype)
        W, bias = weights(seed, dtype)
        found = project(stack(own), x, W, bias)
        assert found.dtype == x.dtype
        expected = np.stack(
            [oracles.project(own[row % many], x[row], W, bias) for row in range(len(x))]
        )
        error = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
        assert error < (2e-6 if dtype == "float32" else 1.5e-2), (many, rows, tokens, dtype)


@pytest.mark.parametrize(
    "case, explicit",
    [("flora-1", False), ("flora-2", True), ("hira-1", True), ("hira-4", True), ("lora-4", False),
     ("ia3-input", False), ("ia3-output", False)],
)  # fmt: skip
def test_weights_are_built_for_many_tokens_of_more_than_one_component(case, explicit):
    (params,) = factors(case, 0, 1)
    assert builds_weight(params, 64) == explicit
    assert not builds_weight(params, 63)


@pytest.mark.parametrize(
    "case, many",
    [("flora-2", 1), ("flora-4", 3), ("flora-frozen", 3), ("hira-1", 3), ("hira-4", 1)],
)
def test_gradients_do_not_depend_on_whether_the_weight_is_built(case, many, monkeypatch):
    params = stack(factors(case, 5, many))
    x, (W, bias) = draw(5, 4 * many, 16, INPUTS), weights(5)
    slope, built = draw(6, 4 * many, 16, OUTPUTS), []
    explicit = grouped._explicit
    monkeypatch.setattr(grouped, "_explicit", lambda *a: built.append(1) or explicit(*a))

    def slopes(limit):
        monkeypatch.setattr(grouped, "_MERGE_TOKENS", limit)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def run(params, x):
            return jnp.sum(apply(Grouped(params), x, W, bias) * slope)

        return run(params, x), len(built)

    (merged, first), (factored, second) = slopes(64), slopes(65)
    assert first == second == 1
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(factored), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    if case == "flora-frozen":
        for leaf in jax.tree.leaves(merged[0]):
            np.testing.assert_array_equal(leaf[:, :1], 0.0)
            assert np.all(leaf[:, 1:] != 0)


@pytest.mark.parametrize("case", ["lora-2", "flora-1", "hira-1", "ia3-output", "ia3-input"])
def test_an_adapters_gradient_is_that_of_its_own_rows_alone(case):
    many, rows, tokens = 3, 2, 5
    own = factors(case, 7, many)
    x, (W, bias) = draw(7, rows * many, tokens, INPUTS), weights(7)
    slope = draw(8, rows * many, tokens, OUTPUTS)
    together = jax.jit(
        jax.grad(lambda params: jnp.sum(apply(Grouped(params), x, W, bias) * slope))
    )(stack(own))
    alone = jax.jit(
        jax.grad(lambda p, x, s: jnp.sum(KINDS[CASES[case][0]].apply_one(p, x, W, bias) * s))
    )
    for n, params in enumerate(own):
        flat = [leaf[n::many].reshape(rows * tokens, -1) for leaf in (x, slope)]
        expected = alone(params, *flat)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[n], b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def kept_mask(key, dropout, shape):
    """As documented: the projection's key is the adapter's folded with 64·layer + place."""
    return jax.random.bernoulli(jax.random.fold_in(key, 0), 1.0 - dropout, shape)


@pytest.mark.parametrize(
    "case, many, dropout, dtype",
    [
        ("lora-1", 1, 0.5, "float32"),
        ("lora-scaled", 3, 0.1, "float32"),
        ("lora-4", 3, 0.3, "bfloat16"),
    ],
)
def test_dropout_takes_inputs_from_the_branch_and_scales_the_others_up(case, many, dropout, dtype):
    own = factors(case, 9, many)
    rows, tokens = 2, 30
    x, (W, bias) = draw(9, rows * many, tokens, INPUTS, dtype=dtype), weights(9, dtype)
    keys = jax.random.split(jax.random.key(3), many)
    found = np.asarray(project(stack(own), x, W, bias, keys, dropout), np.float64)
    base = np.asarray(x, np.float64) @ np.asarray(W, np.float64) + np.asarray(bias, np.float64)
    for n, params in enumerate(own):
        x_XI = np.asarray(x[n::many], np.float64).reshape(-1, INPUTS)
        mask_XI = np.asarray(kept_mask(keys[n], dropout, x_XI.shape))
        assert abs(mask_XI.mean() - (1 - dropout)) < 0.07
        down, up = (np.asarray(leaf, np.float64) for leaf in (params.down_RI, params.up_RO))
        branch = params.scale * (x_XI * mask_XI / (1 - dropout)) @ down.T @ up
        expected = base[n::many] + branch.reshape(rows, tokens, OUTPUTS)
        rtol = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(found[n::many], expected, rtol=rtol, atol=rtol)


def test_dropout_changes_nothing_on_average():
    params, (W, bias) = stack(factors("lora-4", 10, 2)), weights(10)
    x, many = draw(10, 2, 3, INPUTS), 2000
    keys = jax.random.split(jax.random.key(0), (many, 2))
    drawn = jax.jit(jax.vmap(lambda keys: project(params, x, W, bias, keys, 0.3)))(keys)
    expected = project(params, x, W, bias)
    error = np.std(drawn, axis=0) / many**0.5
    assert np.all(error > 1e-4)
    assert np.max(np.abs(np.mean(drawn, axis=0) - expected) / error) < 4.5


def test_dropout_does_not_depend_on_the_company():
    own, (W, bias) = factors("lora-2", 11, 3), weights(11)
    x, keys = draw(11, 6, 5, INPUTS), jax.random.split(jax.random.key(1), 3)
    together = project(stack(own), x, W, bias, keys, 0.4)
    for n, params in enumerate(own):
        alone = project(stack([params]), x[n::3], W, bias, keys[n : n + 1], 0.4)
        np.testing.assert_allclose(together[n::3], alone, rtol=1e-5, atol=1e-5)
        other = project(stack([params]), x[n::3], W, bias, keys[n - 1][None], 0.4)
        assert np.abs(other - alone).max() > 0.01


def test_every_projection_of_every_layer_drops_by_a_key_of_its_own():
    params = stack(factors("lora-1", 0, 2))
    layers = [{t: params for t in ("mlp.c_fc", "attn.c_attn", "mlp.c_proj")} for _ in range(3)]
    hooks = grouped_hooks(layers, jax.random.split(jax.random.key(5), 2), 0.1)
    keys = {
        tuple(jax.random.key_data(key).tolist())
        for layer in hooks
        for hook in layer.values()
        for key in hook.keys
    }
    assert len(keys) == 3 * 3 * 2


def test_without_keys_or_probability_nothing_is_dropped():
    layers = [{TARGET: stack(factors("flora-1", 0, 2))}]
    keys = jax.random.split(jax.random.key(0), 2)
    for hooks in (grouped_hooks(layers, None, 0.5), grouped_hooks(layers, keys, 0.0)):
        assert hooks[0][TARGET].keys is None


@pytest.mark.parametrize("case", ["flora-1", "hira-1", "ia3-output"])
def test_dropout_of_a_kind_that_has_none_is_an_error(case):
    layers = [{TARGET: stack(factors(case, 0, 1))}]
    name = KINDS[CASES[case][0]].type.__name__
    with pytest.raises(ValueError, match=f"dropout belongs to lora.*, found {name}"):
        grouped_hooks(layers, jax.random.split(jax.random.key(0), 1), 0.1)


def test_rows_that_cannot_be_shared_out_evenly_are_an_error():
    hook, (W, bias) = Grouped(stack(factors("lora-1", 0, 3))), weights(0)
    with pytest.raises(ValueError, match="7 rows cannot be split evenly over 3 adapters"):
        apply(hook, draw(0, 7, 2, INPUTS), W, bias)
