"""StarCoder2 against transformers' torch model; decoding beyond its window; its checkpoints."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from flora_jax.adapters.model_adapter import init_adapter
from flora_jax.checkpoints import open_checkpoint
from flora_jax.checkpoints.checkpoint import save_hf, save_orbax
from flora_jax.errors import InputError
from flora_jax.models.cache import Paging, contiguous, init_cache
from flora_jax.models.family import presets, read_family_config
from flora_jax.models.model import abstract_model, init_model
from flora_jax.models.sharding import named_leaves, partition_specs
from flora_jax.models.starcoder2 import FAMILY
from flora_jax.models.starcoder2.config import PRESETS, StarCoder2Config
from flora_jax.models.starcoder2.names import hf_tensors
from flora_jax.platforms import platform
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from flora_jax.train.step import StepOptions, init_adapter_state, make_adapter_step
from flora_jax.weights.held import stored_array
from flora_jax.weights.quantized import Quantized
from tests.helpers.random_adapters import random_adapter
from tests.helpers.requests import make_request
from tests.helpers.tiny_training import random_batch, stacked
from tests.helpers.torch_models import (
    flax_logits,
    random_tokens,
    redrawn,
    to_flax,
    torch_logits,
)

TINY = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=6,
    eos_token_id=0, bos_token_id=0,
)  # fmt: skip
WINDOWED = StarCoder2Config.from_dict({"model_type": "starcoder2", **TINY})
# Values that the three published files share, names of GPTBigCode among them.
SHARED = dict(
    model_type="starcoder2", architectures=["Starcoder2ForCausalLM"], activation_function="gelu",
    attention_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1, bos_token_id=0,
    eos_token_id=0, attention_softmax_in_fp32=True, hidden_act="gelu_pytorch_tanh",
    initializer_range=0.018042, layer_norm_epsilon=1e-05, max_position_embeddings=16384,
    mlp_type="default", norm_epsilon=1e-05, norm_type="layer_norm", sliding_window=4096,
    scale_attention_softmax_in_fp32=True, scale_attn_weights=True, use_bias=True, use_cache=True,
    vocab_size=49152, torch_dtype="bfloat16", transformers_version="4.37.0.dev0",
)  # fmt: skip
PUBLISHED = {
    "starcoder2-3b": SHARED
    | dict(
        hidden_size=3072, intermediate_size=12288, num_hidden_layers=30, num_attention_heads=24,
        num_key_value_heads=2, rope_theta=999999.4420358813,
    ),
    "starcoder2-7b": SHARED
    | dict(
        hidden_size=4608, intermediate_size=18432, num_hidden_layers=32, num_attention_heads=36,
        num_key_value_heads=4, rope_theta=1000000,
    ),
    "starcoder2-15b": SHARED
    | dict(
        hidden_size=6144, intermediate_size=24576, num_hidden_layers=40, num_attention_heads=48,
        num_key_value_heads=4, rope_theta=100000, initializer_range=0.01275,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
SIZES = {
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024,
}


def tiny_torch(seed, **overrides):
    config = Starcoder2Config(**{**TINY, **overrides})
    config._attn_implementation = "eager"
    return redrawn(Starcoder2ForCausalLM(config).eval(), seed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_its_preset(name):
    config = read_family_config(PUBLISHED[name], "config.json")
    assert dataclasses.replace(config, dtype="float32") == PRESETS[name] == presets()[name]
    theirs = Starcoder2Config(**PUBLISHED[name])
    assert read_family_config(theirs.to_dict(), "config.json") == config
    assert sum(math.prod(t.shape) for t in hf_tensors(config).values()) == SIZES[name]
    assert (config.head_dim, config.n_positions) == (128, 16384)
    assert set(config.windows) == {4096}
    assert set(dict(config.others)) >= {"residual_dropout", "bos_token_id"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": None, "use_bias": False, "tie_word_embeddings": False},
        {"head_dim": 16, "eos_token_id": [0, 3]},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
    ],
)
def test_a_configuration_is_written_as_transformers_reads_it(changes):
    raw = {"model_type": "starcoder2", **TINY, **changes}
    config = StarCoder2Config.from_dict(raw)
    assert StarCoder2Config.from_dict(config.to_dict()) == config
    again = Starcoder2Config(**config.to_dict())
    assert StarCoder2Config.from_dict(again.to_dict()) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mlp_type": "gated"}, "mlp_type is 'gated', only 'default' is supported"),
        ({"norm_type": "rms_norm"}, "norm_type is 'rms_norm', only 'layer_norm' is supported"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', expected one of gelu_pytorch_tanh"),
        ({"sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ({"sliding_window": 2.5}, "sliding_window is 2.5, expected int | None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_he"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"norm_epsilon": 0}, "norm_epsilon is 0, expected above 0"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'"),
        ({"n_inner": 3}, "fields of unknown effect: n_inner=3"),
        ({"rotary": {}}, "fields of unknown effect: rotary={}"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_name(change, message):
    with pytest.raises(InputError) as found:
        StarCoder2Config.from_dict({"model_type": "starcoder2", **TINY, **change}, "x.json")
    assert str(found.value).startswith("x.json: ")
    assert message in str(found.value)


def random_overrides(seed):
    """A random configuration of every field that changes the logits."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 2, 4]))
    heads = groups * int(rng.choice([1, 2]))
    scalings = (
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    return dict(
        hidden_size=heads * int(rng.choice([4, 8])),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **([{}, {"head_dim": 6}][seed % 4 == 3]),
        num_hidden_layers=int(rng.integers(1, 4)),
        intermediate_size=int(rng.choice([24, 64])),
        hidden_act=("gelu_pytorch_tanh", "gelu", "silu")[seed % 3],
        norm_epsilon=float(rng.choice([1e-5, 1e-3])),
        use_bias=bool(seed % 2),
        tie_word_embeddings=bool(rng.integers(2)),
        sliding_window=(None, 1, 5, 100)[seed % 4],
        rope_parameters=scalings[seed % 3],
    )


@pytest.mark.parametrize("seed", range(8))
def test_logits_equal_those_of_torch(seed):
    torch_model = tiny_torch(seed, **random_overrides(seed))
    tokens = random_tokens(seed, rows=3, length=19)
    expected = torch_logits(torch_model, tokens)
    found = flax_logits(to_flax(torch_model), tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("attention", ["loop", "gather"])
def test_decoding_beyond_the_window_equals_the_full_pass(attention):
    model = init_model(dataclasses.replace(WINDOWED, initializer_range=0.2), 3)
    tokens = jnp.asarray(random_tokens(0, 3, 21), jnp.int32)
    adapters = random_adapter(
        "flora", 0, WINDOWED.projections(), 2, rank=3, targets=("self_attn.k_proj", "mlp.c_fc")
    ).layers
    expected = flax_logits(model, tokens, adapters)
    paging = contiguous(3, 24, 4)

    @jax.jit
    def step(params, tokens_BT, positions_BT, cache):
        merged = nnx.merge(model.graph, params)
        hidden, cache = merged.hidden(
            tokens_BT, positions_BT, cache=cache,
            paging=Paging(paging.table_BM, attention=attention), adapters=adapters,
        )  # fmt: skip
        return merged.logits(hidden), cache

    cache = init_cache(WINDOWED, 18, 4, jnp.float32)
    # A prompt longer than the window in two chunks, then one token at a time.
    found, at = [], 0
    for length in (8, 8, *(1,) * 5):
        positions = jnp.broadcast_to(at + jnp.arange(length), (3, length))
        logits, cache = step(model.params, tokens[:, at : at + length], positions, cache)
        found.append(logits)
        at += length
    np.testing.assert_allclose(
        np.concatenate(found, 1), expected, atol=2e-4 * np.abs(expected).max()
    )


def test_a_token_sees_its_window_in_every_layer_and_no_further():
    model = init_model(dataclasses.replace(WINDOWED, initializer_range=0.2), 1)
    table = np.asarray(model.embedding)
    tokens = jnp.arange(20, dtype=jnp.int32)[None]

    @jax.jit
    def influence(place):
        def output(embedding):
            params = jax.tree.map(lambda x: x, model.params)
            params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"].replace(
                embedding
            )
            hidden, _ = nnx.merge(model.graph, params).hidden(tokens, jnp.arange(20)[None])
            return jnp.sum(jnp.sin(hidden[0, place]))

        return jnp.abs(jax.grad(output)(jnp.asarray(table))).sum(axis=1)[:20]

    # Two layers of six positions, of which each shares its own with the other.
    for place in (3, 10, 19):
        seen = np.flatnonzero(influence(jnp.int32(place)))
        np.testing.assert_array_equal(seen, np.arange(max(0, place - 10), place + 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A torch model and the folder that transformers wrote for it."""
    folder = tmp_path_factory.mktemp("starcoder2") / "theirs"
    torch_model = tiny_torch(5)
    torch_model.save_pretrained(folder)
    return torch_model, folder


def test_checkpoints_go_both_ways(saved, tmp_path):
    torch_model, folder = saved
    opened = open_checkpoint(folder)
    model = opened.load()
    assert opened.describe().parameters == sum(x.size for x in jax.tree.leaves(model.params))
    tokens = random_tokens(5)
    expected = torch_logits(torch_model, tokens)
    np.testing.assert_allclose(
        flax_logits(model, tokens), expected, atol=2e-4 * np.abs(expected).max()
    )
    save_hf(model, tmp_path / "hf")
    again = Starcoder2ForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens), expected)
    save_orbax(model, tmp_path / "orbax")
    leaves, _ = named_leaves(model.params)
    for name in ("hf", "orbax"):
        back = open_checkpoint(tmp_path / name)
        assert back.config == opened.config
        for path, leaf in named_leaves(back.load().params)[0].items():
            np.testing.assert_array_equal(stored_array(leaf), stored_array(leaves[path]), path)


@pytest.mark.parametrize("method, tolerance", [("int8", 0.03), ("int4", 0.3)])
def test_a_quantised_model_is_near_the_whole_one(saved, method, tolerance):
    model = open_checkpoint(saved[1]).load(quantize=method)
    for path, leaf in named_leaves(model.params)[0].items():
        assert isinstance(leaf, Quantized) == path.endswith("kernel")
    tokens = random_tokens(5)
    expected = torch_logits(saved[0], tokens)
    found = np.abs(flax_logits(model, tokens) - expected).max() / np.abs(expected).max()
    assert 1e-4 < found < tolerance


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_has_one_rule(tied, bias):
    config = dataclasses.replace(
        PRESETS["starcoder2-3b"], num_hidden_layers=2, tie_word_embeddings=tied, use_bias=bias
    )
    leaves, _ = named_leaves(abstract_model(config).params)
    specs, _ = named_leaves(partition_specs(abstract_model(config).params, FAMILY.axes))
    table = hf_tensors(config)
    assert list(specs) == list(leaves)
    assert set(leaves) == set(table)
    for path, leaf in leaves.items():
        shape = table[path].shape[::-1] if table[path].by_outputs else table[path].shape
        spec = getattr(specs[path], "W_OI", specs[path])
        assert (leaf.shape, len(spec)) == (shape, len(shape)), path
    kernels = [path for path in leaves if FAMILY.is_kernel(path)]
    assert len(kernels) == 12
    split = {path.split(".", 2)[2]: FAMILY.splits_outputs(path) for path in kernels}
    assert [target for target, outputs in split.items() if not outputs] == [
        "mlp.c_proj.kernel",
        "self_attn.o_proj.kernel",
    ]


def test_rows_draw_what_the_whole_model_does_under_their_adapters_beyond_the_window():
    config = dataclasses.replace(WINDOWED, initializer_range=0.4)
    model = init_model(config, 2)
    targets = tuple(config.projections())
    adapters = {
        kind: random_adapter(kind, n, config.projections(), 2, rank=2, targets=targets)
        for n, kind in enumerate(("lora", "flora", "ia3"))
    }
    # As for one batch: few shapes of programs, whose compiling is the test's time.
    options = EngineOptions(
        max_num_seqs=4, max_model_len=24, chunk=8, block_size=4, row_buckets=(4,)
    )
    rng = np.random.default_rng(0)
    requests = [
        make_request(
            n, tuple(rng.integers(1, 97, 13).tolist()), name, max_tokens=8, ignore_eos=True
        )
        for n, name in enumerate((None, *adapters))
    ]
    with Engine(model, adapters, options=options, platform=platform().for_one_batch(13)) as engine:
        completions = list(generate(engine, requests))
    for request, completion in zip(requests, completions, strict=True):
        layers = None if request.adapter is None else adapters[request.adapter].layers
        tokens = np.asarray([(*request.prompt_token_ids, *completion.token_ids)])
        scores = flax_logits(model, tokens, layers)[0, len(request.prompt_token_ids) - 1 : -1]
        top = np.sort(scores, axis=-1)
        assert (top[:, -1] - top[:, -2]).min() > 1e-4
        assert scores.argmax(-1).tolist() == list(completion.token_ids)


def test_an_adapter_learns_over_a_frozen_base():
    model = init_model(dataclasses.replace(WINDOWED, initializer_range=0.2), 0)
    adapter = init_adapter(jax.random.key(0), "lora", WINDOWED.projections(), 2, rank=2)
    assert adapter.targets() == ("self_attn.q_proj", "self_attn.v_proj")
    optimizer = optax.sgd(1.0)
    step = make_adapter_step(model.graph, optimizer, lambda _: jnp.float32(1.0), StepOptions())
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(stacked([adapter]), optimizer)
    batch, losses = random_batch(0), []
    for _ in range(6):
        state, measured = step(state, model.params, batch, jax.random.split(jax.random.key(1), 1))
        losses.append(float(measured["loss"][0]))
    assert losses[-1] < losses[0] - 0.02


def test_gradients_are_those_of_torch():
    torch_model = tiny_torch(7)
    model = to_flax(torch_model)
    tokens = random_tokens(7, rows=2, length=12)
    loss = torch_model(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}

    def ours(params, remat):
        merged = nnx.merge(model.graph, params)
        positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
        hidden, _ = merged.hidden(jnp.asarray(tokens), positions, remat=remat)
        scores = jax.nn.log_softmax(merged.logits(hidden[:, :-1]))
        own = jnp.take_along_axis(scores, jnp.asarray(tokens)[:, 1:, None], axis=-1)
        return -jnp.mean(own)

    for remat in ("none", "products", "full"):
        found, _ = named_leaves(jax.jit(jax.grad(ours), static_argnums=1)(model.params, remat))
        for path, tensor in hf_tensors(model.config).items():
            wanted = expected[tensor.name]
            np.testing.assert_allclose(
                stored_array(found[path]),
                wanted,
                atol=1e-4 * max(1e-2, np.abs(wanted).max()),
                err_msg=path,
            )
