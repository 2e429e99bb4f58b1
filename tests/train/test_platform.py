"""What a GPU wants of training, as far as a CPU can tell: the same numbers by the other ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax import platforms
from flora_jax.adapters import apply, multiplicative
from flora_jax.models import attention, attention_trial
from flora_jax.models.attention import IMPLEMENTATIONS, attend_visible, cudnn_refuses, visible
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.train import choice
from flora_jax.train.loss import HeadChunks
from flora_jax.train.step import StepOptions, init_adapter_state, make_adapter_step, make_scorer
from flora_jax.weights import product
from flora_jax.weights.dense import Dense, slopes_of_halves
from flora_jax.weights.quantized import quantize
from tests.helpers.random_adapters import random_adapter
from tests.helpers.tiny_training import CONFIG, random_batch, stacked, tiny_model

HEADS = {"mqa": True, "mha": False}
ROWS, LENGTH = 2, 14


@pytest.fixture
def fused(monkeypatch):
    """The function that calls cuDNN, calling what a CPU has instead, which mixes dtypes."""
    here = functools.partial(attention.fused_attention, implementation="xla")
    monkeypatch.setitem(IMPLEMENTATIONS, "cudnn", here)
    with jax.numpy_dtype_promotion("standard"):
        yield


def packed():
    """Two segments and padding behind them, elsewhere in every row."""
    segments = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    for row, (first, last) in enumerate([(3, 14), (8, 11)]):
        segments[row, :first], segments[row, first:last] = 1, 2
        positions[row] = np.concatenate([np.arange(first), np.arange(LENGTH - first)])
    return jnp.asarray(positions), jnp.asarray(segments)


def attended(name, config, tensors, positions, segments, counted, window=None):
    def loss(q, k, v):
        out = attend_visible(q, k, v, visible(positions, segments, name), config, window)
        out = jnp.where(counted[:, :, None], out.astype(jnp.float32), 0.0)
        return jnp.sum(jnp.sin(out)), out

    slopes, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*tensors)
    return [np.asarray(array, np.float64) for array in (out, *slopes)]


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-6), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_fused_attention_sees_what_einsum_sees(heads, segmented, dtype, tolerance, scaled, fused):
    config = dataclasses.replace(CONFIG, multi_query=HEADS[heads], scale_attn_weights=scaled)
    rng = np.random.default_rng(0)
    tensors = [
        jnp.asarray(rng.standard_normal((ROWS, LENGTH, n, config.head_dim)), dtype)
        for n in (config.n_head, config.kv_heads, config.kv_heads)
    ]
    positions, segments = packed()
    if not segmented:
        positions, segments = jnp.tile(jnp.arange(LENGTH)[None], (ROWS, 1)), None
    counted = jnp.ones((ROWS, LENGTH), bool) if segments is None else segments > 0
    found, expected = (
        attended(name, config, tensors, positions, segments, counted)
        for name in ("cudnn", "einsum")
    )
    for own, right in zip(found, expected, strict=True):
        assert relative(own, right) < tolerance


def test_an_unknown_attention_is_named():
    with pytest.raises(ValueError, match="'fast', expected one of einsum, blocked, cudnn"):
        visible(jnp.zeros((1, 2), jnp.int32), None, "fast")


@pytest.mark.parametrize(
    "changes, dtype, length, why",
    [
        ({}, "bfloat16", 512, None),
        ({}, "float16", 2, None),
        ({}, "float32", 512, "16-bit activations, found float32"),
        ({}, "bfloat16", 511, "511 tokens, expected an even number"),
        ({"n_embd": 2112}, "bfloat16", 512, "132 numbers, expected a multiple of 8"),
        ({"n_head": 8}, "bfloat16", 512, "256 numbers"),
    ],
)
def test_what_cudnn_does_not_take_is_said(changes, dtype, length, why):
    found = cudnn_refuses(dataclasses.replace(PRESETS["1b"], **changes), dtype, length)
    assert found is None if why is None else why in found


def test_every_preset_is_taken_by_cudnn():
    assert {cudnn_refuses(config, "bfloat16", 512) for config in PRESETS.values()} == {None}


def test_an_attention_that_works_is_found_to(fused):
    assert attention_trial.fails("cudnn", CONFIG, "bfloat16", 24) is None


def test_an_attention_that_refuses_or_is_wrong_is_found_out(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such card\nand more")

    def leak(q, k, v, mask, config):
        return attention.attend(q, k, v, jnp.ones_like(mask), config)

    def stop(q, k, v, mask, config):
        return attention.attend(q, jax.lax.stop_gradient(k), v, mask, config)

    def spoil(q, k, v, mask, config):
        return attention.attend(q, k, v, mask, config) * jnp.asarray(jnp.nan, q.dtype)

    for wrong, why in (
        (refuse, "no such card"), (leak, "its result is"), (stop, "its gradient of k is"),
        (spoil, "its result is nan"),
    ):  # fmt: skip
        monkeypatch.setitem(IMPLEMENTATIONS, "cudnn", wrong)
        assert (attention_trial.fails("cudnn", CONFIG, "bfloat16", 24) or "").startswith(why)


@pytest.mark.parametrize(
    "dtype, split, chosen, said",
    [
        ("bfloat16", False, "cudnn", ""),
        ("float32", False, "einsum", "einsum instead of cudnn (it takes 16-bit"),
        ("bfloat16", True, "einsum", "split over devices"),
    ],
)
def test_a_run_chooses_by_platform_and_says_what_it_could_not(
    dtype, split, chosen, said, fused, monkeypatch
):
    monkeypatch.setattr(choice, "platform", lambda: platforms.GPU)
    lines = []
    own = StepOptions(2, "full", 0.25)
    found = choice.choose(own, CONFIG, dtype, 24, lines.append, heads_split=split)
    assert found == dataclasses.replace(
        own, attention=chosen, rounded=True, head=HeadChunks(1 << 26, even=True)
    )
    assert said in "".join(lines)
    assert bool(lines) == bool(said)


def test_on_a_cpu_attention_alone_is_another():
    own = StepOptions(2, "full", 0.25)
    blocked = dataclasses.replace(own, attention="blocked")
    assert choice.choose(own, CONFIG, "bfloat16", 24, print) == blocked
    assert own.head == HeadChunks(1 << 24, even=False)
    assert (own.attention, own.rounded) == ("einsum", False)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("block", [1, 4, LENGTH, LENGTH + 1])
def test_blocked_attention_sees_what_einsum_sees(block, segmented, window, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    rng = np.random.default_rng(0)
    tensors = [
        jnp.asarray(rng.standard_normal((ROWS, LENGTH, n, CONFIG.head_dim)), jnp.float32)
        for n in (CONFIG.n_head, CONFIG.kv_heads, CONFIG.kv_heads)
    ]
    positions, segments = packed()
    if not segmented:
        positions, segments = jnp.tile(jnp.arange(LENGTH)[None], (ROWS, 1)), None
    counted = jnp.ones((ROWS, LENGTH), bool) if segments is None else segments > 0
    found, expected = (
        attended(name, CONFIG, tensors, positions, segments, counted, window)
        for name in ("blocked", "einsum")
    )
    for own, right in zip(found, expected, strict=True):
        assert relative(own, right) < 3e-6


def test_even_chunks_have_no_more_positions_than_allowed_and_little_padding():
    for length in (1, 7, 512, 1000):
        for batch in (1, 3, 8):
            count, step = HeadChunks(1 << 26, even=True).cut(batch, length, 49152)
            plain, longest = HeadChunks(1 << 26).cut(batch, length, 49152)
            assert (count, step <= longest) == (plain, True)
            assert 0 <= count * step - length < count
    assert HeadChunks(1 << 26, even=True).cut(8, 512, 49152) == (4, 128)


def operands(dtype):
    rng = np.random.default_rng(1)
    shapes = (2, 5, 12), (12, 20), (2, 5, 20)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def test_slopes_by_halves_are_those_of_float32():
    x, W, slope = operands("bfloat16")
    # As a projection's slope is: a 16-bit number taken to float32.
    slope = slope.astype(jnp.float32)
    wide = jax.vjp(lambda x, W: x @ W, x.astype(jnp.float32), W.astype(jnp.float32))[1](slope)
    dx, dW = slopes_of_halves("io", x, W, slope)
    turned_dx, dW_OI = slopes_of_halves("oi", x, W.T, slope)
    for found in ((dx, dW), (turned_dx, dW_OI.T)):
        for own, right in zip(found, wide, strict=True):
            assert own.dtype == jnp.bfloat16
            assert relative(np.asarray(own, np.float64), np.asarray(right, np.float64)) < 2**-8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_products_gradient_on_a_cpu_is_that_of_the_plain_product(dtype):
    x, W, slope = operands(dtype)

    def plain(x, W):
        return jnp.matmul(x, W, preferred_element_type=jnp.float32)

    for own, right in zip(
        *(
            jax.jit(lambda x, W, slope, f=f: jax.vjp(f, x, W)[1](slope))(
                x, W, slope.astype(jnp.float32)
            )
            for f in (product.product, plain)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(own, right)


def test_a_factor_summed_or_multiplied_is_one():
    rng = np.random.default_rng(2)
    left, right = (jnp.float32(1 + 0.1 * rng.standard_normal((5, n))) for n in (12, 20))
    slope = jnp.float32(rng.standard_normal((12, 20)))
    np.testing.assert_allclose(
        multiplicative.summed(left, right), multiplicative.multiplied(left, right), rtol=1e-6
    )
    wide = jax.vjp(multiplicative.multiplied, left, right)[1](slope)
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 1e-2)):
        found = multiplicative.rounded_slopes(left, right, slope, dtype=jnp.dtype(dtype))
        for own, right_slope in zip(found, wide, strict=True):
            assert own.dtype == jnp.float32
            assert relative(np.asarray(own), np.asarray(right_slope)) < tolerance


@pytest.mark.parametrize("held", ["array", "by outputs", "int8"])
def test_a_rounded_product_takes_every_weight(held):
    x, W, _ = operands("bfloat16")
    weight = {"array": W, "by outputs": Dense(W.T)}.get(held)
    if held == "int8":
        weight = quantize(W, "int8")
    found = product.rounded(x, weight)
    expected = np.asarray(product.product(x, weight), np.float64)
    assert found.dtype == x.dtype
    assert relative(np.asarray(found, np.float64), expected) < 2**-8
    hooked = apply(product.ROUNDED, x, weight, jnp.ones(20, x.dtype))
    assert relative(np.asarray(hooked, np.float64), expected + 1) < 2**-6


GPUS = StepOptions(attention="cudnn", rounded=True, head=HeadChunks(61 * 16 * 4, even=True))
CPUS = StepOptions(head=HeadChunks(61 * 16 * 3))


@pytest.mark.parametrize(
    "kind, dtype, tolerance, remat",
    [
        ("lora", "float32", 1e-4, "products"),
        ("hira", "float32", 1e-4, "none"),
        ("lora", "bfloat16", 6e-2, "none"),
        ("flora", "bfloat16", 6e-2, "none"),
    ],
)
def test_a_step_as_a_gpu_wants_it_measures_what_a_cpus_does(kind, dtype, tolerance, remat, fused):
    model = tiny_model(0, dtype, n_layer=1)
    adapters = [
        random_adapter(kind, n, CONFIG.projections(), targets=("attn.c_attn",), rank=3)
        for n in range(2)
    ]
    layers = stacked(adapters)
    optimizer = optax.sgd(1.0)
    batch = random_batch(1, 2, 8, 12)
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    found, scored = [], []
    for options in (GPUS, CPUS):
        options = dataclasses.replace(options, remat=remat)
        step = make_adapter_step(model.graph, optimizer, optax.constant_schedule(1.0), options)
        scored.append(make_scorer(model.graph, options)(layers, model.params, batch))
        state = init_adapter_state(jax.tree.map(jnp.copy, layers), optimizer)
        state, measured = step(state, model.params, batch, keys)
        moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), state.params, layers)
        found.append((measured, moved))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[0][0][name], found[1][0][name], rtol=tolerance)
    for own, right in zip(*(jax.tree.leaves(moved) for _, moved in found), strict=True):
        assert relative(own, right) < tolerance
    np.testing.assert_allclose(scored[0].nll, scored[1].nll, rtol=tolerance / 2)
