"""A base in 8 or 4 bits computes what the same base computes with its weights written out."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flora_jax import cli
from flora_jax.adapters import apply, apply_vmap, kind_of, stack
from flora_jax.checkpoints.checkpoint import CheckpointError, load_model, save_hf, save_orbax
from flora_jax.errors import InputError
from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import form, group_lattice, list_pairs, pair_lattice, row_components
from flora_jax.mixing.ragged import ragged_hooks, row_wise_hooks
from flora_jax.models.model import abstract_model, init_model
from flora_jax.models.quantize import quantize_abstract, quantize_model
from flora_jax.models.sharding import named_leaves
from flora_jax.models.starcoder import FAMILY
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from flora_jax.weights import quantized, slices
from flora_jax.weights.product import product
from flora_jax.weights.quantized import Quantized
from tests.helpers.byte_tokenizer import PIECES, byte_tokenizer
from tests.helpers.random_adapters import KINDS, random_adapter, random_projection
from tests.helpers.requests import make_request

METHODS = ("int8", "int4")
# Compiled: one operation after the other takes a compilation each.
quantize = jax.jit(quantized.quantize, static_argnames=("method", "dtype", "group"))
dequantize = jax.jit(quantized.dequantize, static_argnames="dtype")
CONFIG = StarCoderConfig(
    vocab_size=PIECES, n_positions=64, n_embd=16, n_layer=1, n_head=2, n_inner=24,
    eos_token_ids=(0,), initializer_range=0.3,
)  # fmt: skip


def random_weight(seed, shape, dtype=np.float32):
    """Columns and rows of very different magnitudes, and one of zeros."""
    rng = np.random.default_rng(seed)
    W_IO = rng.standard_normal(shape) * np.exp(rng.normal(0, 2, (1, shape[1])))
    W_IO *= np.exp(rng.normal(0, 1, (shape[0], 1)))
    W_IO[:, 0] = 0
    return jnp.asarray(W_IO, dtype)


def written_out(W_IO):
    """The weight by its definition, in NumPy float64, value by value."""
    values = np.asarray(W_IO.values)
    scale_GO = np.asarray(W_IO.scale_GO, np.float64)
    inputs, outputs = W_IO.shape
    size = inputs // len(scale_GO)
    out = np.empty((inputs, outputs))
    for i in range(inputs):
        group, at = divmod(i, size)
        if W_IO.method == "int8":
            steps = values[i].astype(int)
        else:
            byte = values[group * size // 2 + at % (size // 2)].astype(int)
            steps = (byte >> 4 if at >= size // 2 else byte & 15) - 8
        out[i] = steps * scale_GO[group]
    return out


def dense(model):
    """The same model with its quantised weights written out."""
    is_leaf = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    explicit = lambda leaf: dequantize(leaf) if is_leaf(leaf) else leaf  # noqa: E731
    return model._replace(params=jax.tree.map(explicit, model.params, is_leaf=is_leaf))


def random_model(seed=0, config=CONFIG, dtype=jnp.float32):
    """GPT-2's biases start at zero, which would hide a mistake in them."""
    model = init_model(config, seed, dtype)
    rng = np.random.default_rng(seed)
    noise = lambda x: x if x.ndim > 1 else x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    return model._replace(params=jax.tree.map(noise, model.params))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(64, 5), (256, 24), (96, 7), (200, 3)])
def test_every_value_is_within_half_a_step(method, shape):
    for seed, dtype in enumerate([np.float32, jnp.bfloat16, np.float16]):
        W_IO = random_weight(seed, shape, dtype)
        got = quantize(W_IO, method)
        assert got.shape == shape
        assert got.dtype == W_IO.dtype
        groups = len(got.scale_GO)
        steps_IO = np.repeat(np.asarray(got.scale_GO, np.float64), shape[0] // groups, axis=0)
        error = np.abs(written_out(got) - np.asarray(W_IO, np.float64))
        assert np.all(error <= steps_IO / 2 * (1 + 1e-5))
        np.testing.assert_allclose(dequantize(got, jnp.float32), written_out(got), rtol=1e-6)
        largest = np.abs(np.asarray(W_IO, np.float64)).reshape(groups, -1, shape[1]).max(1)
        step = {"int8": 127, "int4": 7}[method]
        np.testing.assert_allclose(np.asarray(got.scale_GO) * step, largest, rtol=1e-5)


def test_four_bits_take_two_values_a_byte_and_a_scale_for_64():
    for method, size in [("int4", 256 * 128 * (4 + 32 / 64) / 8), ("int8", 256 * 128 + 128 * 4)]:
        leaves = jax.tree.leaves(quantize(jnp.ones((256, 128)), method))
        assert sum(leaf.nbytes for leaf in leaves) == size


def test_inputs_that_no_group_divides_and_other_methods_are_errors():
    assert len(quantize(jnp.ones((96, 2)), "int4").scale_GO) == 2
    with pytest.raises(ValueError, match="106 input features"):
        quantize(jnp.ones((106, 2)), "int4")
    with pytest.raises(ValueError, match="'int3'"):
        quantize(jnp.ones((62, 2)), "int3")
    odd = dataclasses.replace(CONFIG, n_inner=33)
    with pytest.raises(InputError, match=r"h\.0\.mlp\.c_proj\.kernel: int4: 33 input features"):
        quantize_abstract(abstract_model(odd), "int4")


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_stays_so(method):
    for bad in (np.nan, np.inf):
        W_IO = jnp.ones((64, 4)).at[3, 1].set(bad)
        back_IO = np.asarray(dequantize(quantize(W_IO, method)))
        assert np.isnan(back_IO[:, 1]).any()
        assert np.all(np.isfinite(np.delete(back_IO, 1, axis=1)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(64, 48), (256, 256), (192, 7)])
def test_the_product_and_its_gradient_are_those_of_the_weight_written_out(
    method, shape, monkeypatch
):
    # Slices of one run at most, as of a weight too large for the limit.
    monkeypatch.setattr(slices, "_SLICE_BYTES", 1 << 14)
    W_IO = quantize(random_weight(1, shape), method)
    explicit = written_out(W_IO)
    rng = np.random.default_rng(2)

    @jax.jit
    def both(x, dy, W_IO):
        y, pull = jax.vjp(lambda x: product(x, W_IO), x)
        return y, *pull(dy)

    for lead, dtype, tolerance in [
        ((), np.float32, 2e-6), ((2, 3), np.float32, 2e-6), ((4,), jnp.bfloat16, 2e-2),
    ]:  # fmt: skip
        x = jnp.asarray(rng.standard_normal((*lead, shape[0])), dtype)
        dy = jnp.asarray(rng.standard_normal((*lead, shape[1])), jnp.float32)
        y, dx = both(x, dy, W_IO)
        assert y.dtype == jnp.float32
        assert dx.dtype == dtype
        for got, left, right in [(y, x, explicit), (dx, dy, explicit.T)]:
            expected = np.asarray(left, np.float64) @ right
            bound = np.abs(np.asarray(left, np.float64)) @ np.abs(right)
            assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= tolerance * bound)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_every_kind_takes_a_quantised_weight(kind, method):
    inputs, outputs, rank = 64, 48, 1 if kind == "ia3" else 3
    W_IO = quantize(random_weight(3, (inputs, outputs)), method)
    explicit = dequantize(W_IO)
    rng = np.random.default_rng(4)
    bias_O = jnp.float32(rng.standard_normal(outputs))
    x_BTI = jnp.float32(rng.standard_normal((3, 5, inputs)))
    adapters = [random_projection(kind, seed, inputs, outputs, rank) for seed in range(3)]
    many, one = stack(adapters), adapters[0]
    forms = {
        "apply": lambda W: apply(many, x_BTI, W, bias_O),
        "shared": lambda W: apply(one, x_BTI, W, bias_O),
        "vmap": lambda W: apply_vmap(kind_of(one), many, x_BTI, W, bias_O),
        "merge": lambda W: kind_of(one).merge(one, W, bias_O)[0],
        "gradient": lambda W: jax.grad(lambda many: jnp.sum(apply(many, x_BTI, W) ** 2))(many),
    }
    run = jax.jit(lambda W: {name: form(W) for name, form in forms.items()})
    got, expected = run(W_IO), run(explicit)
    for name in forms:
        for one_got, one_expected in zip(*map(jax.tree.leaves, (got[name], expected[name]))):
            scale = np.max(np.abs(one_expected))
            np.testing.assert_allclose(
                np.asarray(one_got) / scale, one_expected / scale, atol=3e-6, err_msg=name
            )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_mixed_batches_and_single_rows_take_a_quantised_weight(method, dtype):
    sizes = {"attn.c_attn": (64, 48)}
    adapters = {kind: random_adapter(kind, seed, sizes, rank=8) for seed, kind in enumerate(KINDS)}
    bank = build_bank(adapters, sizes, 1)
    names = [None, "flora", "ia3", "hira", "lora"]
    W_IO = quantize(random_weight(5, (64, 48), dtype), method)
    explicit, x_BTI = dequantize(W_IO), jnp.asarray(np.ones((5, 4, 64)), dtype)
    rows = len(names)
    mul, add = bank.most("attn.c_attn")
    lattice = {"attn.c_attn": (pair_lattice(rows, mul - 1)[-1], group_lattice(rows, add)[-1])}
    pairs = list_pairs(bank, names, lattice)
    hooks = [ragged_hooks(bank.layers, pairs)[0]["attn.c_attn"]]
    rest = [x_BTI]
    for row, name in enumerate(names):
        hooks.append(
            row_wise_hooks(bank.layers, row_components(bank, [name], form(bank, name)))[0][
                "attn.c_attn"
            ]
        )
        rest.append(x_BTI[row : row + 1])
    assert {hook.own.merged for hook in hooks[1:]} == {True, False}
    run = jax.jit(apply)
    for hook, x in zip(hooks, rest):
        got, expected = run(hook, x, W_IO), run(hook, x, explicit)
        assert got.dtype == dtype
        scale = float(jnp.max(jnp.abs(expected)))
        atol = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.float32(got) / scale, np.float32(expected) / scale, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_generation_draws_the_tokens_of_the_weights_written_out(method):
    model = quantize_model(random_model(), method)
    sizes = CONFIG.projections()
    adapters = {
        kind: random_adapter(kind, 1, sizes, rank=2, targets=("attn.c_attn", "mlp.c_proj"))
        for kind in ("lora", "flora")
    }
    names = [None, *adapters]
    requests = [
        make_request(index, (5 + index, 9, 33, 2), adapter=name, max_tokens=12, ignore_eos=True)
        for index, name in enumerate(names)
    ]  # fmt: skip
    options = EngineOptions(max_num_seqs=4, chunk=16, prefill_chunks=1, block_size=4)
    tokens = [
        [list(c.token_ids) for c in generate(Engine(m, adapters, options=options), requests)]
        for m in (model, dense(model))
    ]
    assert tokens[0] == tokens[1]
    assert len({tuple(row) for row in tokens[0]}) > 1


@pytest.mark.parametrize("method", METHODS)
def test_loading_quantises_to_the_bits_of_quantising_the_loaded_model(method, tmp_path):
    stored = jnp.float32 if method == "int8" else jnp.bfloat16
    model = random_model(dtype=stored)
    save_hf(model, tmp_path / "hf")
    save_orbax(model, tmp_path / "orbax")
    expected = quantize_model(model, method)
    described = quantize_abstract(abstract_model(CONFIG, stored), method)
    for stored_as in ("hf", "orbax"):
        got = load_model(tmp_path / stored_as, quantize=method)
        assert jax.tree.structure(got.params) == jax.tree.structure(described.params)
        for one, other, shape in zip(
            *map(jax.tree.leaves, (got.params, expected.params, described.params))
        ):
            assert (one.shape, one.dtype) == (shape.shape, shape.dtype)
            np.testing.assert_array_equal(one, other)


def test_kernels_are_quantised_from_what_is_stored_whatever_the_dtype_of_the_rest(tmp_path):
    save_hf(random_model(), tmp_path / "hf")
    save_orbax(random_model(), tmp_path / "orbax")
    full, _ = named_leaves(quantize_model(random_model(), "int8").params)
    for stored_as in ("hf", "orbax"):
        half = load_model(tmp_path / stored_as, jnp.bfloat16, quantize="int8")
        for path, leaf in named_leaves(half.params)[0].items():
            assert leaf.dtype == jnp.bfloat16
            assert isinstance(leaf, Quantized) == FAMILY.is_kernel(path)
            if isinstance(leaf, Quantized):
                np.testing.assert_array_equal(leaf.values, full[path].values)
                np.testing.assert_array_equal(leaf.scale_GO, full[path].scale_GO)
    logits = jax.jit(lambda params, tokens: nnx.merge(half.graph, params)(tokens))
    assert np.all(np.isfinite(logits(half.params, jnp.arange(8)[None])))


def test_saving_a_quantised_model_and_other_words_are_refused(tmp_path):
    model = quantize_model(random_model(), "int8")
    for save in (save_hf, save_orbax):
        with pytest.raises(CheckpointError, match="is int8, expected full precision"):
            save(model, tmp_path / "out")
    save_hf(random_model(), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="'int3'"):
        load_model(tmp_path / "hf", quantize="int3")


def test_the_command_generates_with_a_quantised_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    save_hf(random_model(), tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "in").write_text('{"prompt": "def", "max_tokens": 4}\n')

    def run(word):
        arguments = ["generate", str(tmp_path / "model"), "--quantize", word]
        arguments += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["flora-jax", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().err

    code, err = run("int8")
    assert code == 0, err
    assert json.loads((tmp_path / "out").read_text())["token_ids"]
    code, err = run("int3")
    assert code == 2
    assert err.strip().count("\n") == 0
    assert "'int3' is not one of 'none', 'int8', 'int4'" in err


# The number of devices is fixed when JAX starts, hence a process of its own.
FOUR_DEVICES = """
import json, sys, tempfile
from pathlib import Path
import jax, numpy as np
from flax import nnx
from flora_jax.checkpoints.checkpoint import load_model, save_hf, save_orbax
from flora_jax.models.starcoder import FAMILY
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.models.model import init_model
from flora_jax.models.sharding import make_mesh, named_leaves
from tests.helpers.requests import make_request

config = StarCoderConfig(
    vocab_size=96, n_positions=32, n_embd=256, n_layer=1, n_head=4, n_inner=512,
    initializer_range=0.1,
)
tokens = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)
model = init_model(config)

def loss(scale, params, tokens):
    hooked = nnx.merge(model.graph, params)
    x = hooked.wte.embedding[...][tokens] * scale
    return (hooked.h[0].mlp(x, {}, config) ** 2).mean(), hooked(tokens)

slope_and_logits = jax.jit(jax.grad(loss, has_aux=True))

results = []
with tempfile.TemporaryDirectory() as folder:
    save_hf(model, Path(folder, "hf"))
    save_orbax(model, Path(folder, "orbax"))
    for method in ("int8", "int4"):
        for form, mesh in [("hf", make_mesh(1, 4)), ("hf", None)] + (
            [("orbax", make_mesh(1, 4))] if method == "int4" else []
        ):
            loaded = load_model(Path(folder, form), quantize=method, mesh=mesh)
            slope, logits = slope_and_logits(np.float32(1), loaded.params, tokens)
            leaves, _ = named_leaves(loaded.params)
            parts = [
                [leaf.addressable_shards[0].data.nbytes / leaf.nbytes for leaf in
                 jax.tree.leaves(leaves[path])]
                for path in ("h.0.mlp.c_fc.kernel", "h.0.mlp.c_proj.kernel")
            ]
            bits = [np.asarray(leaf).tobytes().hex()[:4000] for leaf in jax.tree.leaves(loaded.params)]
            results.append([np.asarray(logits).tolist(), float(slope), parts, str(bits)])
print(json.dumps(results))
"""


def test_a_mesh_changes_no_result_of_a_quantised_model():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for method, (hf, alone, *more) in zip(METHODS, (found[:2], found[2:])):
        for logits, slope, parts, bits in (hf, *more):
            np.testing.assert_allclose(logits, alone[0], atol=2e-5)
            np.testing.assert_allclose(slope, alone[1], rtol=1e-5)
            assert bits == alone[3]
            # A scale of int8 belongs to an output: with split inputs every device needs it.
            last = 1.0 if method == "int8" else 0.25
            assert parts == [[0.25, 0.25], [0.25, last]]
