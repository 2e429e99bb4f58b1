"""A weight held by outputs stands in a weight's place: every form of an adapter, loading and saving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters import apply, kind_of
from flora_jax.checkpoints.checkpoint import load_model, save_hf
from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import form, list_pairs, row_components
from flora_jax.mixing.ragged import Ragged, RowWise
from flora_jax.models.model import init_model
from flora_jax.models.quantize import quantize_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.weights import product
from flora_jax.weights.dense import Dense, matmul
from tests.helpers.random_adapters import KINDS, random_adapter

TARGET, SIZES = "attn.c_attn", {"attn.c_attn": (24, 40)}
CONFIG = StarCoderConfig(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=4, n_inner=32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)])
def test_every_form_gives_what_it_gives_with_the_weight_itself(seed, dtype, tolerance):
    rng = np.random.default_rng(seed)
    adapters = {
        f"{kind}{rank}": random_adapter(kind, seed + rank, SIZES, rank=rank)
        for kind in KINDS
        for rank in ((1,) if kind == "ia3" else (1, 3, 11))
    }
    bank, names = build_bank(adapters, SIZES, 1), [None, *adapters]
    x = jnp.asarray(rng.normal(size=(len(names), 3, 24)), dtype)
    W, bias = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((24, 40), (40,)))
    held = Dense(jnp.asarray(W.T))
    mixed = Ragged(bank.layers[0][TARGET], list_pairs(bank, names)[TARGET])
    hooks = [(None, x), (mixed, x)]
    for row, name in enumerate(names):
        own = row_components(bank, [name], form(bank, name))[TARGET]
        hooks.append((RowWise(bank.layers[0][TARGET], own), x[row, None]))
    run = jax.jit(apply)
    for hook, rows in hooks:
        expected = np.asarray(run(hook, rows, W, bias), np.float64)
        found = run(hook, rows, held, bias)
        assert found.dtype == dtype
        assert np.abs(np.float64(found) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 5, 600])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)])
def test_products_of_few_and_of_many_rows_are_those_with_the_weight_itself(rows, dtype, tolerance):
    rng = np.random.default_rng(rows)
    x, W = (jnp.asarray(rng.normal(size=size), dtype) for size in ((2, rows, 24), (24, 40)))
    expected = np.float64(x) @ np.float64(W)
    for run in (matmul, jax.vmap(matmul, (0, None))):
        found = jax.jit(run)(x, Dense(W.T))
        assert found.dtype == jnp.float32
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_only_a_cpu_has_the_weight_first():
    x, W = jnp.zeros((4, 24)), Dense(jnp.zeros((40, 24)))
    for platform, barriers in (("cpu", 1), ("cuda", 0), ("tpu", 0)):
        lowered = jax.jit(matmul).trace(x, W).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("optimization_barrier") == barriers


def test_merging_gives_the_same_explicit_weight():
    W = jnp.asarray(np.random.default_rng(0).normal(size=(24, 40)), jnp.float32)
    for kind in KINDS:
        params = random_adapter(kind, 1, SIZES, rank=3).layers[0][TARGET]
        for weight in (W, Dense(W.T)):
            found, _ = kind_of(params).merge(params, weight)
            assert found.shape == (24, 40)
        np.testing.assert_allclose(found, kind_of(params).merge(params, W)[0], rtol=1e-6)
    np.testing.assert_array_equal(product.explicit(Dense(W.T)), W)
    with pytest.raises(TypeError, match="no parts"):
        Dense(W)[0]


def test_a_model_by_outputs_has_the_same_logits_and_saves_as_the_same_files(tmp_path):
    model = init_model(CONFIG, 3)
    turned = outputs_first(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 9)), jnp.int32)

    @jax.jit
    def logits(params):
        from flax import nnx

        return nnx.merge(model.graph, params)(tokens)

    np.testing.assert_allclose(logits(turned.params), logits(model.params), atol=1e-5)
    save_hf(model, tmp_path / "one")
    save_hf(turned, tmp_path / "other")
    same = (tmp_path / name / "model.safetensors" for name in ("one", "other"))
    assert len({path.read_bytes() for path in same}) == 1
    # Already by outputs: nothing is made again.
    again = outputs_first(turned)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, turned.params, again.params))


def test_consuming_leaves_one_copy_and_quantised_kernels_stay(tmp_path):
    save_hf(init_model(CONFIG), tmp_path / "model")
    model = load_model(tmp_path / "model", "float32")
    before = jax.tree.leaves(model.params)
    turned = outputs_first(model, consume=True)
    assert sum(leaf.is_deleted() for leaf in before) == 4 * CONFIG.n_layer
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(turned.params))
    quantised = quantize_model(init_model(CONFIG), "int8")
    kept = outputs_first(quantised)
    assert jax.tree.structure(kept.params) == jax.tree.structure(quantised.params)
