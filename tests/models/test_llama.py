"""The Llama family against transformers' torch models, model type by model type; its checkpoints."""

import copy
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flora_jax.adapters.model_adapter import init_adapter
from flora_jax.adapters.projections import match_targets
from flora_jax.checkpoints import CheckpointError, open_checkpoint
from flora_jax.checkpoints.checkpoint import save_hf, save_orbax
from flora_jax.errors import InputError
from flora_jax.models.cache import contiguous, init_cache
from flora_jax.models.family import (
    family_of,
    parameters,
    presets,
    read_family_config,
    with_positions,
)
from flora_jax.models.llama import FAMILY
from flora_jax.models.llama.config import PRESETS, VARIANTS, LlamaConfig
from flora_jax.models.llama.names import hf_tensors
from flora_jax.models.model import abstract_model, init_model
from flora_jax.models.sharding import named_leaves, partition_specs
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.train.step import StepOptions, init_adapter_state, make_adapter_step
from flora_jax.weights.held import stored_array
from flora_jax.weights.product import explicit
from flora_jax.weights.quantized import Quantized
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
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    eos_token_id=0, bos_token_id=0, pad_token_id=None,
)  # fmt: skip
_COMMON = dict(
    hidden_act="silu", attention_dropout=0.0, use_cache=True, torch_dtype="bfloat16",
    initializer_range=0.02, transformers_version="4.40.1",
)  # fmt: skip
_LLAMA = _COMMON | dict(
    model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, pretraining_tp=1,
    rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False,
)  # fmt: skip
_LLAMA3 = _LLAMA | dict(
    bos_token_id=128000, eos_token_id=128001, intermediate_size=14336, hidden_size=4096,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rope_theta=500000.0,
    vocab_size=128256,
)  # fmt: skip
_SMOL = _LLAMA | dict(
    bos_token_id=0, eos_token_id=0, max_position_embeddings=8192, rope_theta=100000,
    tie_word_embeddings=True, vocab_size=49152, is_llama_config=True, rope_interleaved=False,
)  # fmt: skip
_GRANITE = _LLAMA | dict(
    attention_bias=True, attention_dropout=0.1, mlp_bias=True, bos_token_id=0, eos_token_id=0,
    pad_token_id=0, num_attention_heads=32, rope_theta=10000, tie_word_embeddings=True,
    vocab_size=49152,
)  # fmt: skip
_MISTRAL = _COMMON | dict(
    model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2,
    hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05,
    tie_word_embeddings=False,
)  # fmt: skip
_QWEN2 = _COMMON | dict(
    model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=151643,
    eos_token_id=151643, rms_norm_eps=1e-06, rope_theta=1000000.0, use_sliding_window=False,
    hidden_size=3584, intermediate_size=18944, max_position_embeddings=131072,
    max_window_layers=28, num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
    sliding_window=131072, tie_word_embeddings=False, vocab_size=152064,
)  # fmt: skip
_QWEN3 = _COMMON | dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False,
    bos_token_id=151643, eos_token_id=151645, head_dim=128, max_position_embeddings=40960,
    num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
    sliding_window=None, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
_LLAMA31 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
# By name config.json as published, and the number of parameters.
PUBLISHED = {
    "llama-2-7b": (
        _LLAMA
        | dict(
            bos_token_id=1, eos_token_id=2, hidden_size=4096, intermediate_size=11008,
            max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32,
            num_key_value_heads=32, vocab_size=32000, torch_dtype="float16",
        ),
        6_738_415_616,
    ),
    "llama-3-8b": (_LLAMA3 | dict(max_position_embeddings=8192), 8_030_261_248),
    "llama-3.1-8b-instruct": (
        _LLAMA3
        | dict(
            max_position_embeddings=131072, mlp_bias=False, rope_scaling=_LLAMA31,
            eos_token_id=[128001, 128008, 128009],
        ),
        8_030_261_248,
    ),
    "llama-3.2-1b": (
        _LLAMA3
        | dict(
            head_dim=64, hidden_size=2048, intermediate_size=8192, mlp_bias=False,
            max_position_embeddings=131072, num_hidden_layers=16, tie_word_embeddings=True,
            rope_scaling=_LLAMA31 | {"factor": 32.0},
        ),
        1_235_814_400,
    ),
    "smollm2-135m": (
        _SMOL
        | dict(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, initializer_range=0.041666666666666664,
            **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        ),
        134_515_008,
    ),
    "smollm2-360m": (
        _SMOL
        | dict(
            hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
            num_key_value_heads=5,
        ),
        361_821_120,
    ),
    "smollm2-1.7b": (
        _SMOL
        | dict(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
            num_key_value_heads=32, rope_theta=130000,
        ),
        1_711_376_384,
    ),
    "granite-3b-code-base-2k": (
        _GRANITE
        | dict(
            hidden_size=2560, intermediate_size=10240, max_position_embeddings=2048,
            num_hidden_layers=32, num_key_value_heads=32,
        ),
        3_482_503_680,
    ),
    "granite-8b-code-base-4k": (
        _GRANITE
        | dict(
            hidden_size=4096, intermediate_size=14336, max_position_embeddings=4096,
            num_hidden_layers=36, num_key_value_heads=8,
        ),
        8_054_910_976,
    ),
    "mistral-7b": (
        _MISTRAL | dict(rope_theta=10000.0, sliding_window=4096, vocab_size=32000),
        7_241_732_096,
    ),
    "mistral-7b-v0.3": (
        _MISTRAL | dict(rope_theta=1000000.0, sliding_window=None, vocab_size=32768),
        7_248_023_552,
    ),
    "qwen2-7b": (_QWEN2, 7_615_616_512),
    "qwen2.5-7b": (_QWEN2 | dict(use_mrope=False), 7_615_616_512),
    "qwen2.5-0.5b": (
        _QWEN2
        | dict(
            hidden_size=896, intermediate_size=4864, max_position_embeddings=32768,
            max_window_layers=24, num_attention_heads=14, num_hidden_layers=24,
            num_key_value_heads=2, sliding_window=32768, tie_word_embeddings=True,
            use_mrope=False, vocab_size=151936,
        ),
        494_032_768,
    ),
    "qwen2.5-coder-7b": (_QWEN2 | dict(max_position_embeddings=32768), 7_615_616_512),
    "qwen3-0.6b": (
        _QWEN3
        | dict(
            hidden_size=1024, intermediate_size=3072, max_window_layers=28, num_attention_heads=16,
            num_hidden_layers=28, tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "qwen3-8b": (
        _QWEN3
        | dict(
            hidden_size=4096, intermediate_size=12288, max_window_layers=36, num_attention_heads=32,
            num_hidden_layers=36, tie_word_embeddings=False,
        ),
        8_190_735_360,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_as_transformers_reads_it(name):
    raw, size = PUBLISHED[name]
    config = read_family_config(raw, "config.json")
    assert family_of(config) is FAMILY
    assert parameters(config) == size
    assert config.n_positions == raw["max_position_embeddings"]
    assert set(config.windows) == {4096 if name == "mistral-7b" else None}
    theirs = AutoConfig.for_model(**raw)
    assert read_family_config(theirs.to_dict(), "config.json") == config
    assert read_family_config(config.to_dict(), "config.json") == config
    if name in PRESETS:
        own = dict(dtype="bfloat16", eos_token_ids=config.eos_token_ids)
        assert dataclasses.replace(presets()[name], **own) == config


def test_every_preset_is_a_published_model():
    assert set(PRESETS) <= set(PUBLISHED)
    assert set(VARIANTS) == {raw["model_type"] for raw, _ in PUBLISHED.values()}


def tiny_raw(model_type, **changes):
    return {"model_type": model_type, **TINY, **changes}


@pytest.mark.parametrize(
    "model_type, change, message",
    [
        ("llama", {"sliding_window": 4}, "fields of unknown effect: sliding_window=4"),
        ("mistral", {"attention_bias": True}, "attention_bias is True, only False is supported"),
        ("mistral", {"mlp_bias": True}, "mlp_bias is True, only False is supported"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias is True, only False is supported"),
        ("qwen2", {"attention_bias": False}, "fields of unknown effect: attention_bias=False"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias is True, only False is supported"),
        ("llama", {"hidden_dropout": 0.1}, "hidden_dropout is 0.1, only 0.0 is supported"),
        ("mistral", {"layer_types": ["full_attention"]}, "fields of unknown effect: layer_types"),
        ("qwen2", {"qk_norm": True}, "fields of unknown effect: qk_norm=True"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True, only False is supported"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True, only False is supported"),
        ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish', expected one of gelu_pytorch_tanh"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, "hidden_size 32 is not a multiple"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0, expected"),
        ("llama", {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, expected int"),
        ("llama", {"head_dim": 7}, "head_dim is 7, expected an even number"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0, expected above 0"),
        ("llama", {"mlp_bias": 1}, "mlp_bias is 1, expected bool"),
        ("llama", {"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type is 'su', expected one of"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings is 0, expected a positive"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected 2"),
        ("qwen3", {"layer_types": ["full_attention", "ring"]}, "layer_types has 'ring', expected"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
            "layer_types has 'sliding_attention', but sliding_window is null or use_sliding_window",
        ),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, only"),
    ],
)  # fmt: skip
def test_an_unsupported_configuration_is_refused_by_name(model_type, change, message):
    with pytest.raises(InputError) as found:
        read_family_config(tiny_raw(model_type, **change), "x.json")
    assert str(found.value).startswith("x.json: ")
    assert message in str(found.value)


@pytest.mark.parametrize(
    "model_type, fields",
    [
        ("llama", ("attention_bias", "mlp_bias")),
        ("mistral", ("attention_bias", "mlp_bias")),
        ("qwen2", ("mlp_bias",)),
        ("qwen3", ("attention_bias", "mlp_bias")),
    ],
)
def test_a_bias_that_a_file_says_is_not_there_changes_nothing(model_type, fields):
    plain = read_family_config(tiny_raw(model_type), "x.json")
    for value in (False, None) if model_type == "mistral" else (False,):
        said = tiny_raw(model_type, **dict.fromkeys(fields, value))
        assert read_family_config(said, "x.json") == plain


def test_a_configuration_made_by_hand_is_checked_too():
    with pytest.raises(InputError, match="windows are for 1 layers, num_hidden_layers is 32"):
        LlamaConfig(windows=(4,))
    with pytest.raises(InputError, match="model_type is 'mixtral', expected one of llama, mistral"):
        LlamaConfig(model_type="mixtral")


def test_windows_are_those_of_the_model_type():
    layers = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert read_family_config(tiny_raw("qwen2", **layers), "x").windows == (None, 4)
    assert read_family_config(tiny_raw("qwen3", sliding_window=4), "x").windows == (None, None)
    # A file of Mistral's that names none has transformers' default.
    assert read_family_config(tiny_raw("mistral"), "x").windows == (4096, 4096)


def test_a_dynamic_base_is_plain_within_its_context_and_refused_beyond_with_the_reason():
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    config = read_family_config(tiny_raw("llama", **scaled), "x")
    assert config.n_positions == 64
    with pytest.raises(
        InputError, match=r"is 65, the model has 64 positions \(rope_type is dynamic"
    ):
        Engine(init_model(config), {}, options=EngineOptions(max_model_len=65))
    # Where a file says that the context was stretched, it is the first one that counts.
    scaled["rope_scaling"]["original_max_position_embeddings"] = 16
    assert read_family_config(tiny_raw("llama", **scaled), "x").n_positions == 16
    assert with_positions(read_family_config(tiny_raw("llama"), "x"), 80).n_positions == 80


SCALINGS = (
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 1e3, **_LLAMA31, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
)


def random_raw(seed):
    """A random configuration of every field that changes the logits, of each model type in turn."""
    rng = np.random.default_rng(seed)
    model_type = tuple(VARIANTS)[seed % 4]
    flag = bool(rng.integers(2))
    layered = [
        {"layer_types": ["sliding_attention", "full_attention"], "max_window_layers": 0},
        {"max_window_layers": 1},
    ]
    own = {
        "llama": {"attention_bias": seed > 3, "mlp_bias": flag},
        "mistral": {"sliding_window": (5, None, 100)[seed % 3]},
        "qwen2": {"use_sliding_window": True, "sliding_window": 6} | layered[seed // 4 % 2],
        "qwen3": {
            "attention_bias": flag, "use_sliding_window": seed > 4, "sliding_window": 3,
            "max_window_layers": 1,
        },
    }[model_type]  # fmt: skip
    groups = int(rng.choice([1, 2, 4]))
    heads = groups * int(rng.choice([1, 2]))
    return tiny_raw(
        model_type,
        hidden_size=heads * 8,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        # Apart from the width of a model divided by its heads, or that.
        head_dim=[8, 8, 12, 6][int(rng.integers(4))],
        intermediate_size=int(rng.choice([24, 40])),
        hidden_act=("silu", "gelu", "gelu_pytorch_tanh")[seed % 3],
        rms_norm_eps=float(rng.choice([1e-5, 1e-3])),
        tie_word_embeddings=bool(rng.integers(2)),
        rope_parameters=SCALINGS[seed % 5],
        **own,
    )


def tiny_torch(seed, raw):
    config = AutoConfig.for_model(**raw)
    return redrawn(
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), seed
    )


@pytest.mark.parametrize("seed", range(12))
def test_logits_equal_those_of_torch_beyond_windows_and_original_contexts(seed):
    torch_model = tiny_torch(seed, random_raw(seed))
    tokens = random_tokens(seed, rows=3, length=23)
    expected = torch_logits(torch_model, tokens)
    found = flax_logits(to_flax(torch_model), tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


def test_random_configurations_take_every_option():
    configs = [read_family_config(random_raw(seed), "x") for seed in range(12)]
    for field in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"):
        assert {getattr(config, field) for config in configs} == {True, False}, field
    assert {config.model_type for config in configs} == set(VARIANTS)
    assert {config.rotary.scaling.rope_type for config in configs} == {
        scaling["rope_type"] for scaling in SCALINGS
    }
    assert {len(set(config.windows)) for config in configs} == {1, 2}
    assert any(config.hidden_size != config.n_head * config.head_dim for config in configs)


@pytest.fixture(scope="module")
def both():
    """A torch model with norms of heads, a window in its second layer and yarn, and ours."""
    raw = tiny_raw(
        "qwen3", use_sliding_window=True, sliding_window=6, max_window_layers=1,
        attention_bias=True, rope_parameters=SCALINGS[3], tie_word_embeddings=True,
    )  # fmt: skip
    torch_model = tiny_torch(20, raw)
    return torch_model, to_flax(torch_model)


@pytest.mark.parametrize("attention", ["loop", "gather"])
def test_decoding_over_the_cache_equals_the_full_pass(both, attention):
    torch_model, model = both
    tokens = random_tokens(0, 3, 21)
    expected = torch_logits(torch_model, tokens)
    paging = dataclasses.replace(contiguous(3, 24, 4), attention=attention)

    @jax.jit
    def step(params, tokens_BT, positions_BT, cache):
        merged = nnx.merge(model.graph, params)
        hidden, cache = merged.hidden(tokens_BT, positions_BT, cache=cache, paging=paging)
        return merged.logits(hidden), cache

    cache = init_cache(model.config, 18, 4, jnp.float32)
    # A prompt longer than the window and the original context in two chunks, then token by token.
    found, at = [], 0
    for length in (8, 8, *(1,) * 5):
        positions = jnp.broadcast_to(at + jnp.arange(length), (3, length))
        own = jnp.asarray(tokens[:, at : at + length], jnp.int32)
        logits, cache = step(model.params, own, positions, cache)
        found.append(np.asarray(logits))
        at += length
    np.testing.assert_allclose(
        np.concatenate(found, 1), expected, rtol=0, atol=2e-4 * np.abs(expected).max()
    )


def test_gradients_are_those_of_torch(both):
    torch_model, model = both
    tokens = random_tokens(7, rows=2, length=12)
    torch_model.zero_grad()
    torch_model(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    expected = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}

    @jax.jit
    @jax.grad
    def slopes(params):
        merged = nnx.merge(model.graph, params)
        positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
        hidden, _ = merged.hidden(jnp.asarray(tokens), positions, remat="full")
        scores = jax.nn.log_softmax(merged.logits(hidden[:, :-1]))
        own = jnp.take_along_axis(scores, jnp.asarray(tokens)[:, 1:, None], axis=-1)
        return -jnp.mean(own)

    found, _ = named_leaves(slopes(model.params))
    for path, tensor in hf_tensors(model.config).items():
        wanted = expected[tensor.name]
        atol = 1e-4 * max(1e-2, np.abs(wanted).max())
        np.testing.assert_allclose(
            stored_array(found[path]), wanted, rtol=0, atol=atol, err_msg=path
        )


@pytest.mark.parametrize("kind", ["flora", "dora", "ia3"])
def test_an_adapter_learns_over_a_frozen_base(both, kind):
    _, model = both
    config = model.config
    projections = config.projections()
    targets = match_targets(projections.names.default_targets(kind), projections)
    fresh = init_adapter(
        jax.random.key(0), kind, projections, config.n_layer,
        rank=1 if kind == "ia3" else 2, targets=targets, weights=model.weight,
    )  # fmt: skip
    assert [target.split(".")[1] for target in fresh.targets()] == list(
        ("q_proj", "v_proj", "down_proj") if kind == "ia3" else ("q_proj", "v_proj")
    )
    optimizer = optax.sgd(1.0)
    step = make_adapter_step(model.graph, optimizer, lambda _: jnp.float32(1.0), StepOptions())
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(stacked([fresh]), optimizer)
    batch, losses = random_batch(0), []
    for _ in range(6):
        state, measured = step(state, model.params, batch, jax.random.split(jax.random.key(1), 1))
        losses.append(float(measured["loss"][0]))
    assert losses[-1] < losses[0] - 0.01


@pytest.fixture(scope="module")
def folder(both, tmp_path_factory):
    """What transformers wrote of the torch model."""
    place = tmp_path_factory.mktemp("llama") / "theirs"
    both[0].save_pretrained(place)
    return place


def test_checkpoints_go_both_ways(both, folder, tmp_path):
    torch_model, model = both
    opened = open_checkpoint(folder)
    assert opened.config == model.config
    loaded, _ = named_leaves(opened.load().params)
    for path, leaf in named_leaves(model.params)[0].items():
        np.testing.assert_array_equal(stored_array(loaded[path]), stored_array(leaf), path)
    save_hf(model, tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    tokens = random_tokens(5)
    expected = torch_logits(torch_model, tokens)
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens), expected)
    save_orbax(model, tmp_path / "orbax")
    back = open_checkpoint(tmp_path / "orbax")
    assert back.config == opened.config
    kept, _ = named_leaves(back.load().params)
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(stored_array(kept[path]), stored_array(leaf), path)


def test_frequencies_in_a_file_are_known_to_be_redundant(folder, tmp_path):
    """Files of the first Llamas have them in every layer; what is not theirs is named."""
    for name, tensor, said in (
        ("model.layers.1.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32), None),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", np.ones(5, np.float32), r"has shape \(5,\)"),
        ("model.layers.2.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32), "is unexpected"),
        ("model.layers.1.self_attn.q_proj.scale", np.ones(4, np.float32), "is unexpected"),
    ):  # fmt: skip
        place = tmp_path / f"{said is None}-{name}-{tensor.size}"
        shutil.copytree(folder, place)
        tensors = load_file(place / "model.safetensors") | {name: tensor}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        if said is None:
            open_checkpoint(place).load()
        else:
            with pytest.raises(CheckpointError, match=f"{name} in model.safetensors {said}"):
                open_checkpoint(place).load()


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_quantised_model_is_the_torch_model_over_its_dequantised_weights(both, folder, method):
    model = open_checkpoint(folder).load(quantize=method)
    for path, leaf in named_leaves(model.params)[0].items():
        assert isinstance(leaf, Quantized) == path.endswith("kernel")
    rounded = copy.deepcopy(both[0])
    linears, projections = dict(rounded.named_modules()), model.config.projections()
    with torch.no_grad():
        for layer in range(model.config.n_layer):
            for target in projections:
                wide_IO = np.asarray(explicit(model.weight(layer, target), jnp.float32))
                linears[projections.names.path(layer, target)].weight.copy_(torch.tensor(wide_IO.T))
    tokens = random_tokens(5)
    expected, whole = torch_logits(rounded, tokens), torch_logits(both[0], tokens)
    found = flax_logits(model, tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    assert np.abs(found - whole).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("model_type", VARIANTS)
def test_every_parameter_has_a_name_in_the_files_and_one_rule(model_type):
    raw = tiny_raw(model_type, num_hidden_layers=1, tie_word_embeddings=model_type == "qwen2")
    biased = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    config = read_family_config(raw | biased, "x")
    leaves, _ = named_leaves(abstract_model(config).params)
    specs, _ = named_leaves(partition_specs(abstract_model(config).params, FAMILY.axes))
    table = hf_tensors(config)
    assert set(leaves) == set(specs) == set(table)
    for path, leaf in leaves.items():
        shape = table[path].shape[::-1] if table[path].by_outputs else table[path].shape
        spec = getattr(specs[path], "W_OI", specs[path])
        assert (leaf.shape, len(spec)) == (shape, len(shape)), path
    kernels = [path for path in leaves if FAMILY.is_kernel(path)]
    whole = {path for path in kernels if not FAMILY.splits_outputs(path)}
    assert {path.removeprefix("layers.0.") for path in whole} == {
        "self_attn.o_proj.kernel",
        "mlp.down_proj.kernel",
    }
