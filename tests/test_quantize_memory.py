"""A quantised base is never kept dequantised: peak temporary memory of compiled programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from random_adapters import random_adapter

from flora_jax.adapters.grouped import grouped_hooks
from flora_jax.adapters.quantized import matmul, quantize
from flora_jax.serve import steps
from flora_jax.starcoder.config import StarCoderConfig
from flora_jax.starcoder.model import abstract_model
from flora_jax.starcoder.quantize import quantize_abstract

pytestmark = pytest.mark.usefixtures("optimised")
METHODS = ("int8", "int4")
# What XLA's compiler asks of a device. The operations a clock, by XLA's number of a type: 10 is
# float16, 16 bfloat16, 11 float32, 2 int8.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  matrix_unit_description {
    rate_infos { key: 10 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 512 } }
    rate_infos { key: 16 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 512 } }
    rate_infos { key: 11 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 256 } }
    rate_infos { key: 2 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 1024 } }
  }
  name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


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
    state = jax.eval_shape(
        functools.partial(steps.init_state, model.config, 2, 32, jnp.dtype(jnp.float32))
    )
    compiled = steps.decode.lower(
        model.graph, model.params, [{}] * layers, {}, state, mode="greedy", steps=4
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes


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
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax-cuda13-pjrt")
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def describe(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    rows, inputs, outputs = 32, 6144, 24576
    weight = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    W_IO = jax.tree.map(describe, jax.eval_shape(lambda W: quantize(W, method), weight))
    x = describe(jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16))
    dy = describe(jax.ShapeDtypeStruct((rows, outputs), jnp.float32))
    gradient = lambda x, W, dy: jax.vjp(lambda x: matmul(x, W), x)[1](dy)  # noqa: E731
    for function, arguments in [(matmul, (x, W_IO)), (gradient, (x, W_IO, dy))]:
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(W_IO))
        assert memory.argument_size_in_bytes > stored
        assert memory.temp_size_in_bytes < 32 << 20 < inputs * outputs / 4
