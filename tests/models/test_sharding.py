"""The sharding table covers every parameter once, and tensor parallelism changes no result."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec

from flora_jax.models.model import abstract_model
from flora_jax.models.sharding import make_mesh, named_leaves, partition_specs, shardings
from flora_jax.models.starcoder import FAMILY
from flora_jax.models.starcoder.config import PRESETS, StarCoderConfig
from flora_jax.weights.dense import Dense

TINY = StarCoderConfig(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=48)

# The number of devices is fixed when JAX starts, hence a process of its own for all checks.
EIGHT_DEVICES = """
import dataclasses, json, sys, tempfile
from pathlib import Path
import jax, numpy as np
from flax import nnx
from flora_jax.checkpoints.checkpoint import load_model, save_hf, save_orbax
from flora_jax.models.llama.config import LlamaConfig
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.models.model import abstract_model
from flora_jax.models.sharding import make_mesh, named_leaves, shardings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
base = StarCoderConfig(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=8, n_inner=128)
# Queries and keys of as many devices' heads, biases and norms of heads.
llama = LlamaConfig(
    model_type="qwen3", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16, qkv_bias=True, output_bias=True,
    qk_norm=True, windows=(5,),
)
cases = [
    (base, "h.0.mlp.c_fc.kernel", (1, 8)),
    (dataclasses.replace(base, multi_query=False), "h.0.mlp.c_fc.kernel", (2, 4)),
    (dataclasses.replace(base, tie_word_embeddings=False), "h.0.mlp.c_fc.kernel", (2, 3)),
    (llama, "layers.0.mlp.up_proj.kernel", (2, 4)),
]
results = []
for seed, (config, split, (data, tensor)) in enumerate(cases):
    # Every parameter is random: GPT-2's biases start at zero, which would hide one added twice.
    rng = np.random.default_rng(seed)
    model = abstract_model(config)
    draw = lambda leaf: jax.device_put(0.3 * rng.standard_normal(leaf.shape, np.float32))
    model = model._replace(params=jax.tree.map(draw, model.params))
    tokens = rng.integers(0, config.vocab_size, (4, 12)).astype(np.int32)
    forward = jax.jit(lambda params, tokens: nnx.merge(model.graph, params)(tokens))
    expected = np.asarray(forward(model.params, tokens))
    mesh = make_mesh(data, tensor)
    wanted = shardings(model, mesh)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder, "hf"))
        loaded = [load_model(Path(folder, "hf"), mesh=mesh)]
        if seed == 0:
            save_orbax(model, Path(folder, "orbax"))
            loaded.append(load_model(Path(folder, "orbax"), mesh=mesh))
            loaded.append(load_model(Path(folder, "orbax"), shardings=wanted))
    for sharded in loaded:
        got = np.asarray(forward(sharded.params, tokens))
        leaves, _ = named_leaves(sharded.params)
        arrays, places = jax.tree.leaves(sharded.params), jax.tree.leaves(wanted)
        misplaced = [
            path for path, array, place in zip(leaves, arrays, places, strict=True)
            if not array.sharding.is_equivalent_to(place, array.ndim)
        ]
        kernel_OI = leaves[split].W_OI
        results.append({
            "error": float(np.max(np.abs(got - expected)) / np.max(np.abs(expected))),
            "misplaced": misplaced, "tensor": tensor,
            "part": kernel_OI.addressable_shards[0].data.shape[0] / kernel_OI.shape[0],
        })
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def eight_devices():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tensor_parallel_logits_equal_those_of_one_device(eight_devices):
    assert len(eight_devices) == 6
    for result in eight_devices:
        assert result["error"] < 2e-6, result


def test_loading_places_every_parameter_in_its_sharding(eight_devices):
    for result in eight_devices:
        assert result["misplaced"] == []
        divides = 128 % result["tensor"] == 0
        assert result["part"] == (1 / result["tensor"] if divides else 1.0)


@pytest.mark.parametrize("name", ["mini", "164m"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_rule(name, tied):
    config = dataclasses.replace(PRESETS[name], tie_word_embeddings=tied)
    params = abstract_model(config).params
    specs, _ = named_leaves(partition_specs(params, FAMILY.axes))
    leaves, _ = named_leaves(params)
    assert list(specs) == list(leaves)
    arrays, places = jax.tree.leaves(params), [jax.tree.leaves(spec) for spec in specs.values()]
    assert all(len(spec) == array.ndim for array, (spec,) in zip(arrays, places, strict=True))
    assert specs["wte.embedding"] == PartitionSpec("tensor", None)
    assert specs["h.0.mlp.c_fc.kernel"] == Dense(PartitionSpec("tensor", None))
    assert specs["h.0.mlp.c_proj.kernel"] == Dense(PartitionSpec(None, "tensor"))
    assert specs["h.0.mlp.c_proj.bias"] == PartitionSpec(None)


def test_a_parameter_without_or_with_two_rules_is_an_error():
    params = abstract_model(TINY).params
    without = [rule for rule in FAMILY.axes if rule[0] != "h.*.attn.c_proj.bias"]
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_proj\.bias matches 0 rules"):
        partition_specs(params, without)
    with pytest.raises(ValueError, match=r"ln_f\.bias matches 2 rules"):
        partition_specs(params, [*FAMILY.axes, ("ln_f.bias", ("embed",))])
    with pytest.raises(ValueError, match=r"ln_f\.bias has 1 dimensions, rule ln_f\.\* is for 2"):
        partition_specs(
            params, [r for r in FAMILY.axes if r[0] != "ln_f.*"] + [("ln_f.*", ("a", "b"))]
        )


def test_an_explicit_mesh_axis_is_an_error():
    model = abstract_model(TINY)
    with pytest.raises(ValueError, match="'tensor' is Explicit"):
        shardings(model, jax.make_mesh((1, 1), ("data", "tensor")))
    assert all(
        place.is_fully_replicated for place in jax.tree.leaves(shardings(model, make_mesh(1, 1)))
    )
