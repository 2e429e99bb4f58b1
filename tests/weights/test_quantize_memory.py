"""A quantised base is never kept dequantised: peak temporary memory of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flora_jax.mixing.grouped import grouped_hooks
from flora_jax.models.model import abstract_model
from flora_jax.models.quantize import quantize_abstract
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.platforms import CPU
from flora_jax.serve.ahead import abstract_device
from flora_jax.serve.lattice import DecodeShape
from flora_jax.serve.options import EngineOptions
from flora_jax.weights.quantized import matmul, quantize
from tests.helpers.gpu_target import placed_on_h100
from tests.helpers.random_adapters import random_adapter

pytestmark = pytest.mark.usefixtures("optimised")
METHODS = ("int8", "int4")


def config(layers):
    return StarCoderConfig(
        vocab_size=64, n_positions=64, n_embd=512, n_layer=layers, n_head=4, n_inner=2048
    )


def gradient_temporaries(method, layers):
    """Of a step's gradient with respect to LoRA factors, one row of eight tokens."""
    model = quantize_abstract(abstract_model(config(layers)), method)
    adapter = random_adapter("lora", 0, model.config.projections(), layers, rank=1)

    def loss(factors, params, tokens):
        return jnp.sum(nnx.merge(model.graph, params)(tokens, adapters=factors) ** 2)

    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(adapter.layers, model.params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def explicit_temporaries(method, layers):
    """Of a step's gradient with respect to FLoRAs of rank 2, which build explicit weights."""
    model = quantize_abstract(abstract_model(config(layers)), method)
    adapter = random_adapter(
        "flora", 0, model.config.projections(), layers, rank=2, targets=("mlp.c_fc",)
    )
    stacked = jax.tree.map(lambda leaf: leaf[None], adapter.layers)

    def loss(factors, params, tokens):
        model_ = nnx.merge(model.graph, params)
        return jnp.sum(model_(tokens, adapters=grouped_hooks(factors)) ** 2)

    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(stacked, model.params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def decode_temporaries(method, layers):
    """Of a dispatch of four tokens for two rows, a loop on the device."""
    model = quantize_abstract(abstract_model(config(layers)), method)
    options = EngineOptions(max_num_seqs=2, max_model_len=32, block_size=8, decode_steps=4)
    device = abstract_device(model, options, CPU, {}, 0)
    shape = DecodeShape(2, (0, 0), 32)
    call = device.decode_call(device.nothing(shape), 4, False)
    return call.lower().compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("measure", [gradient_temporaries, decode_temporaries])
@pytest.mark.parametrize("method", METHODS)
def test_more_layers_do_not_add_dequantised_weights(method, measure):
    largest = 512 * 2048 * 4
    one, two = measure(method, 1), measure(method, 2)
    assert one < 2 * largest
    # A layer's weights are three times the largest.
    assert two - one < largest / 4


@pytest.mark.parametrize("method", METHODS)
def test_more_layers_do_not_add_explicit_weights(method):
    """Only activations: 64 tokens of an inner width of 2,048, three times."""
    largest = 512 * 2048 * 4
    assert explicit_temporaries(method, 3) - explicit_temporaries(method, 2) < largest / 2


@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_program_has_no_weight_sized_temporary(method):
    """Compiled ahead of time for an H100, where that compiler is installed; nothing runs."""
    rows, inputs, outputs = 32, 6144, 24576
    weight = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    W_IO = placed_on_h100(jax.eval_shape(lambda W: quantize(W, method), weight))
    x = placed_on_h100(jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16))
    dy = placed_on_h100(jax.ShapeDtypeStruct((rows, outputs), jnp.float32))
    gradient = lambda x, W, dy: jax.vjp(lambda x: matmul(x, W), x)[1](dy)  # noqa: E731
    for function, arguments in [(matmul, (x, W_IO)), (gradient, (x, W_IO, dy))]:
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(W_IO))
        assert memory.argument_size_in_bytes > stored
        assert memory.temp_size_in_bytes < 32 << 20 < inputs * outputs / 4
