"""A weight held by outputs stands in a weight's place: every form of an adapter, loading and saving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from flora_jax.adapters import apply, kind_of
from flora_jax.checkpoints.checkpoint import load_model, save_hf
from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import form, list_pairs, row_components
from flora_jax.mixing.ragged import Ragged, RowWise
from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.weights import product
from flora_jax.weights.dense import Dense
from flora_jax.weights.quantized import quantize
from flora_jax.weights.slices import join_columns
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
    for run in (product.product, jax.vmap(product.product, (0, None))):
        found = jax.jit(run)(x, Dense(W.T))
        assert found.dtype == jnp.float32
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_only_a_cpu_has_the_weight_first():
    x, W = jnp.zeros((4, 24)), Dense(jnp.zeros((40, 24)))
    for platform, barriers in (("cpu", 1), ("cuda", 0), ("tpu", 0)):
        lowered = jax.jit(product.product).trace(x, W).lower(lowering_platforms=(platform,))
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


def test_a_models_kernels_are_what_files_have_and_compute_as_arrays_do(tmp_path):
    """By outputs, the bits of the files; read again they are the same."""
    model = init_model(CONFIG, 3)
    save_hf(model, tmp_path / "one")
    files = load_file(tmp_path / "one" / "model.safetensors")
    for layer in range(CONFIG.n_layer):
        for target in CONFIG.projections():
            held = model.weight(layer, target)
            assert isinstance(held, Dense)
            np.testing.assert_array_equal(
                held.W_OI, files[f"transformer.h.{layer}.{target}.weight"]
            )
    assert jax.tree.all(
        jax.tree.map(np.array_equal, load_model(tmp_path / "one").params, model.params)
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 9)), jnp.int32)
    plain = jax.tree.map(
        lambda leaf: product.explicit(leaf),
        model.params,
        is_leaf=lambda leaf: isinstance(leaf, Dense),
    )
    logits = jax.jit(lambda params: nnx.merge(model.graph, params)(tokens))
    np.testing.assert_allclose(logits(model.params), logits(plain), atol=1e-5)


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-6), ("bfloat16", 2**-7)])
def test_gradients_are_those_with_the_weight_itself(rows, dtype, tolerance):
    rng = np.random.default_rng(rows)
    x, W, slope = (
        jnp.asarray(rng.normal(size=size), dtype)
        for size in ((2, rows, 24), (24, 40), (2, rows, 40))
    )

    @jax.jit
    def slopes(x, weight):
        return jax.vjp(product.product, x, weight)[1](slope.astype(jnp.float32))

    found = (*slopes(x, Dense(W.T)), *slopes(x, W))
    dx, dW = (
        np.float64(slope) @ np.float64(W).T,
        np.einsum("bri,bro->io", np.float64(x), np.float64(slope)),
    )
    for own, right in zip(found, (dx, Dense(dW.T), dx, dW), strict=True):
        own, right = (leaf.W_OI if isinstance(leaf, Dense) else leaf for leaf in (own, right))
        assert own.dtype == dtype
        assert np.abs(np.float64(own) - right).max() <= tolerance * np.abs(right).max()


def test_slices_of_the_outputs_are_those_of_the_weight():
    W = jnp.asarray(np.random.default_rng(0).normal(size=(24, 512)), jnp.float32)
    for held in (Dense(W.T), product.as_weight(W), quantize(W, "int8"), quantize(W, "int4")):
        parts = jnp.stack([held.columns(jnp.int32(n), 2).explicit() for n in range(2)])
        assert parts.shape == (2, 24, 256)
        np.testing.assert_array_equal(join_columns(parts), held.explicit())


def test_only_what_needs_more_memory_when_it_is_explicit_is_cut_before_a_merge():
    W = jnp.zeros((24, 512))
    assert [product.as_weight(own).slices_to_merge for own in (W, Dense(W.T))] == [1, 1]
    assert quantize(W, "int8").slices_to_merge == 2


def test_a_plain_weight_in_float32_is_differentiated_forwards_too():
    """As Hessian-vector products of the functional layers need it."""
    rng = np.random.default_rng(0)
    sizes = ((3, 4), (4, 5), (3, 4))
    x_NI, W_IO, direction_NI = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes)
    _, tangent_NO = jax.jvp(lambda x_NI: product.product(x_NI, W_IO), (x_NI,), (direction_NI,))
    np.testing.assert_allclose(tangent_NO, direction_NI @ W_IO, rtol=1e-5)
