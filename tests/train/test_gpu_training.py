"""A training step at 1B's width, compiled ahead of time for an H100: launches, bytes, products, flash."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from experiments import gpu_counts_train as counts
from flora_jax.adapters import multiplicative
from flora_jax.models.attention import attend_visible, visible
from flora_jax.models.model import abstract_model
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.plan.launches import Program
from flora_jax.train.step import StepOptions
from flora_jax.weights import product
from tests.helpers.gpu_target import placed_on_h100

pytestmark = pytest.mark.usefixtures("optimised")
MIB = 1 << 20
LAYERS = (1, 2)
WANTED = counts.OPTIONS["gpu's"]


@functools.cache
def compiled(layers, kind, adapters):
    placed_on_h100(())  # Skips where there is no compiler.
    return counts.compile_step("1b", layers, kind, 8, adapters, WANTED)


@functools.cache
def counted(kind, adapters):
    """A layer's, and the rest's."""
    few, more = (counts.count(compiled(layers, kind, adapters)) for layers in LAYERS)
    return more - few, few - (more - few).share(1 / LAYERS[0])


# Launches and MiB a layer: 52 and 4,374 before, of which attention's scores were a third.
@pytest.mark.parametrize(
    "kind, launches, mib",
    [("lora", 36, 1600), pytest.param("flora", 34, 1550, marks=pytest.mark.slow)],
)
def test_a_layer_of_training_has_few_launches_and_no_scores(kind, launches, mib):
    layer, rest = counted(kind, 1)
    print(kind, layer, rest)
    assert layer.launches <= launches
    assert layer.bytes <= mib * MIB
    assert layer.temporaries <= 150 * MIB
    assert rest.temporaries <= 600 * MIB


@pytest.mark.parametrize("kind", ["lora", pytest.param("flora", marks=pytest.mark.slow)])
def test_every_large_product_is_of_16_bit_arrays(kind):
    layer, rest = counted(kind, 1)
    assert layer.wide_products <= 0.001 * layer.half_products
    assert rest.wide_products <= 0.001 * rest.half_products


@pytest.mark.parametrize("kind", ["lora", pytest.param("flora", marks=pytest.mark.slow)])
def test_a_step_waits_for_no_host_and_attention_is_flash(kind):
    text = compiled(LAYERS[1], kind, 1).text
    launches = Program(text).launches()
    assert (launches.loops, launches.static_loops) == ((), 1)
    assert len(re.findall(r'custom_call_target="__cudnn\$fmha\w+"', text)) == 2 * LAYERS[1]
    assert len(re.findall(r'target="__cudnn\$fmha\w+Backward"', text)) == LAYERS[1]
    epilogues = re.findall(r'"epilogue":"(\w+)"', text)
    assert epilogues.count("BIAS_GELU_AUX") == LAYERS[1]


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "flora"])
def test_eight_adapters_take_a_tenth_longer_than_one_at_most(kind):
    one, eight = (counts.step_seconds("1b", *counted(kind, adapters)) for adapters in (1, 8))
    print(kind, eight / one)
    assert eight <= 1.1 * one
    assert counted(kind, 8)[0].launches <= counted(kind, 1)[0].launches


@pytest.mark.parametrize(
    "segmented, groups, dtype",
    [(True, 1, "bfloat16"), (True, 16, "float16"), (False, 1, "bfloat16"), (False, 16, "bfloat16")],
)
def test_flash_attention_compiles_forward_and_backward(segmented, groups, dtype):
    config = PRESETS["1b"]
    shapes = [(8, 512, n, config.head_dim) for n in (config.n_head, groups, groups)]
    tensors = placed_on_h100([jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes])
    rows = placed_on_h100(jax.ShapeDtypeStruct((8, 512), jnp.int32))

    def loss(tensors, positions, segments):
        seen = visible(positions, segments if segmented else None, "cudnn")
        out = attend_visible(*tensors, seen, config)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    with mock.patch(counts.CUDNN_VERSION, return_value=91200):
        lowered = jax.jit(jax.grad(loss)).lower(tensors, rows, rows)
    program = lowered.compile()
    found = re.findall(r'target="__cudnn\$(fmha\w+)"', program.as_text())
    name = "fmhaScaleBiasSoftmax" if segmented else "fmhaSoftmax"
    assert sorted(found) == [name, f"{name}Backward"]
    # Of 128 MiB of float32 scores nothing.
    assert program.memory_analysis().temp_size_in_bytes < 64 * MIB


def test_an_explicit_weight_is_one_pass_over_the_weight():
    rows, inputs, outputs = 4, 6144, 6400
    shapes = (rows, 64, inputs), (inputs, outputs)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float16) for shape in shapes]
    factors = [jax.ShapeDtypeStruct((rows, 8, n), jnp.float32) for n in (inputs, outputs)]

    def under_own(x_TI, pre_RI, post_RO, W_IO):
        return product.product(x_TI, multiplicative.merge_as_held(pre_RI, post_RO, W_IO))

    x, W, pre, post = placed_on_h100((*arrays, *factors))
    program = jax.jit(jax.vmap(under_own, (0, 0, 0, None))).lower(x, pre, post, W).compile()
    launched = list(counts.kernels(Program(program.as_text())))
    assert sum(moved for _, moved, _ in launched) <= 720 * MIB
    assert len(launched) == 2


def test_the_base_gets_no_gradient_and_is_not_copied():
    """No copy or transpose of a projection, either way round."""
    kernels = {
        ("bf16", leaf.shape)
        for leaf in jax.tree.leaves(abstract_model(PRESETS["1b"], jnp.bfloat16).params)
        if leaf.ndim == 2 and leaf.shape[0] <= 8192 and leaf.shape[1] <= 8192 and leaf.size > 10**6
    }
    assert Program(compiled(LAYERS[1], "lora", 1).text).copies_of(kernels) == []


@pytest.mark.slow
def test_without_the_options_attention_writes_its_scores():
    """What the other tests look for is found where it is."""
    placed_on_h100(())
    text = counts.compile_step("1b", 1, "lora", 8, 1, StepOptions()).text
    assert "__cudnn$fmha" not in text
    assert re.search(r"f32\[8,1,16,512,512\]|f32\[8,8192,512\]", text)
