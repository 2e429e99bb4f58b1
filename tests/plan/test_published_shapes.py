"""Published models of families that are there, by their configurations: shapes, and what fits a card."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from flora_jax.models.family import family_of, parameters, presets, read_family_config
from flora_jax.models.model import abstract_model
from flora_jax.models.quantize import quantize_abstract
from flora_jax.models.sharding import named_leaves
from flora_jax.plan import memory
from flora_jax.plan.cards import CARDS
from flora_jax.plan.setting import Setting

# Granite code 20B and 34B are GPTBigCode, their files have no head.
GRANITE = dict(
    model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"], activation_function="gelu",
    attention_softmax_in_fp32=True, attn_pdrop=0.1, bos_token_id=0, embd_pdrop=0.1, eos_token_id=0,
    initializer_range=0.02, layer_norm_epsilon=1e-05, multi_query=True, n_embd=6144, n_head=48,
    n_inner=24576, n_positions=8192, pad_token_id=0, resid_pdrop=0.1,
    scale_attention_softmax_in_fp32=True, scale_attn_weights=True, summary_activation=None,
    summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
    summary_use_proj=True, torch_dtype="bfloat16", transformers_version="4.39.3", use_cache=True,
)  # fmt: skip


def granite(layers, vocabulary=49152, activation="gelu"):
    raw = GRANITE | dict(n_layer=layers, vocab_size=vocabulary, activation_function=activation)
    return read_family_config(raw, "config.json")


def plan_of(config, **changes):
    values = {"dtype": "bfloat16", "max_num_seqs": 16, "max_model_len": 4096} | changes
    return Setting("granite", config, CARDS["h100"], **values)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("vocabulary", [49152, 49153])
@pytest.mark.parametrize("layers, size", [(52, 20_066_993_152), (88, 33_715_603_456)])
def test_granite_codes_are_known(layers, size, vocabulary, activation):
    config = granite(layers, vocabulary, activation)
    assert parameters(config) == size + (vocabulary - 49152) * 6144
    assert (config.kv_heads, config.head_dim, config.n_positions) == (1, 128, 8192)
    table = family_of(config).tensors(config)
    assert "lm_head" not in table
    shallow = dataclasses.replace(config, n_layer=2)
    leaves, _ = named_leaves(abstract_model(shallow, jnp.bfloat16).params)
    assert leaves["wte.embedding"].shape == (vocabulary, 6144)
    assert math.prod(leaves["h.1.attn.c_attn.kernel"].shape) == 6144 * (6144 + 2 * 128)
    assert math.prod(leaves["h.1.mlp.c_fc.kernel"].shape) == 6144 * 24576
    blocks = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("h.1."))
    rest = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if not path.startswith("h."))
    assert rest + layers * blocks == parameters(config)


def test_a_granite_code_of_20b_fits_a_card_and_one_of_34b_does_quantised():
    small, large = granite(52, 49153), granite(88, 49153)
    assert memory.weights_bytes(plan_of(small)) == 2 * parameters(small)
    adapted = dict(kind="lora", rank=16, resident_adapters=32)
    assert memory.fits(plan_of(small, **adapted))
    assert memory.fits(plan_of(small, quantize="int8", max_model_len=8192, **adapted))
    assert not memory.fits(plan_of(large, max_model_len=8192, max_num_seqs=64, **adapted))
    for method in ("int8", "int4"):
        assert memory.fits(plan_of(large, quantize=method, max_model_len=8192, **adapted))
    # An odd vocabulary is whole on each of two devices, an even one is split.
    even, odd = (plan_of(granite(52, vocabulary), devices=2) for vocabulary in (49152, 49153))
    assert memory.weights_bytes(odd) - memory.weights_bytes(even) == 2 * (49153 - 49152 // 2) * 6144


@pytest.mark.parametrize("name", ["starcoder2-3b", "starcoder2-7b", "starcoder2-15b"])
def test_starcoder2_fits_a_card_with_many_adapters(name):
    config = presets()[name]
    own = Setting(name, config, CARDS["h100"], dtype="bfloat16", max_num_seqs=16,
                  max_model_len=16384, kind="lora", rank=16, resident_adapters=32)  # fmt: skip
    assert own.adapted == ("self_attn.q_proj", "self_attn.v_proj")
    assert memory.weights_bytes(own) == 2 * parameters(config)
    assert memory.fits(own)
    token = 2 * 2 * config.n_layer * config.kv_heads * 128
    assert memory.cache_bytes_per_position(own) == token
    shallow = dataclasses.replace(config, num_hidden_layers=2)
    for quantize in ("none", "int8", "int4"):
        held = dataclasses.replace(own, config=shallow, quantize=quantize)
        assert memory.weights_bytes(held) == _bytes_of(shallow, quantize)


def _bytes_of(config, quantize):
    model = abstract_model(config, jnp.bfloat16)
    model = model if quantize == "none" else quantize_abstract(model, quantize)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(model.params))
