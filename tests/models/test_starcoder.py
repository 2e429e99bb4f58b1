"""The Flax model against transformers' torch model, and against itself in other orders of work."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flora_jax.models.attention import attend
from flora_jax.models.cache import NOWHERE, contiguous, init_cache
from flora_jax.models.config_fields import ACTIVATIONS
from flora_jax.models.model import abstract_model, init_model
from flora_jax.models.starcoder.config import PRESETS, StarCoderConfig
from flora_jax.models.starcoder.names import hf_tensors
from tests.helpers.random_adapters import random_adapter
from tests.helpers.torch_models import (
    flax_logits,
    random_tokens,
    tiny_torch_model,
    to_flax,
    torch_logits,
)

TINY = StarCoderConfig(
    vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=48, initializer_range=0.2
)


def random_overrides(seed):
    """A random configuration of every field that changes the logits."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 4]))
    return dict(
        n_embd=heads * int(rng.choice([4, 8, 16])),
        n_head=heads,
        n_layer=int(rng.integers(1, 4)),
        n_inner=[None, 24, 64][rng.integers(3)],
        multi_query=bool(seed % 3),
        activation_function=ACTIVATIONS[seed % len(ACTIVATIONS)],
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-3, 1e-6])),
        scale_attn_weights=bool(rng.integers(2)),
        attention_softmax_in_fp32=bool(rng.integers(2)),
        scale_attention_softmax_in_fp32=bool(rng.integers(2)),
        tie_word_embeddings=bool(rng.integers(2)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_logits_equal_those_of_torch(seed):
    torch_model = tiny_torch_model(seed, **random_overrides(seed))
    tokens = random_tokens(seed, rows=3, length=17)
    expected = torch_logits(torch_model, tokens)
    found = flax_logits(to_flax(torch_model), tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_decoding_one_token_at_a_time_equals_the_full_pass(seed, multi_query):
    config = dataclasses.replace(TINY, multi_query=multi_query)
    model = init_model(config, seed)
    tokens = jnp.asarray(random_tokens(seed, 3, 12, 61), jnp.int32)
    adapters = random_adapter(
        "flora", seed, config.projections(), 2, rank=3, targets=("attn.c_attn", "mlp.c_fc")
    ).layers
    expected = flax_logits(model, tokens, adapters)

    @jax.jit
    def step(params, token_B1, position_B1, cache):
        merged = nnx.merge(model.graph, params)
        hidden, cache = merged.hidden(
            token_B1, position_B1, cache=cache, paging=contiguous(3, 16, 4), adapters=adapters
        )
        return merged.logits(hidden[:, 0]), cache

    cache = init_cache(config, 12, 4, jnp.float32)
    for place in range(12):
        position = jnp.full((3, 1), place)
        logits, cache = step(model.params, tokens[:, place, None], position, cache)
        np.testing.assert_allclose(logits, expected[:, place], atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side):
    model = init_model(TINY, 3)
    forward = jax.jit(lambda p, t, s: nnx.merge(model.graph, p)(t, segments_BT=s))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        length = int(rng.integers(1, 12))
        tokens = random_tokens(seed, 1, length, 61)
        padded = np.asarray(random_tokens(seed + 50, 1, 20, 61))
        segments = np.zeros((1, 20), np.int32)
        own = slice(20 - length, None) if side == "left" else slice(length)
        padded[:, own], segments[:, own] = tokens, 1
        found = forward(model.params, jnp.asarray(padded, jnp.int32), jnp.asarray(segments))
        expected = flax_logits(model, tokens)
        np.testing.assert_allclose(found[:, own], expected, atol=1e-4 * np.abs(expected).max())


def test_padding_in_a_cached_pass_changes_nothing():
    model = nnx.merge(*init_model(TINY, 3)[1:])
    tokens = jnp.asarray(random_tokens(0, 1, 8, 61), jnp.int32)

    @jax.jit
    def last(tokens, positions):
        empty = init_cache(TINY, 2, 8, jnp.float32)
        hidden, cache = model.hidden(tokens, positions, cache=empty, paging=contiguous(1, 16, 8))
        return hidden, cache[1].k_LSGK.reshape(1, 16, 1, -1)

    positions = jnp.arange(8)[None]
    full, cached = last(tokens, positions)
    for absent in (16, NOWHERE):
        noisy = tokens.at[:, 5:].set(7)
        found, kept = last(noisy, jnp.where(positions < 5, positions, absent))
        np.testing.assert_array_equal(found[:, :5], full[:, :5])
        np.testing.assert_array_equal(kept[:, :5], cached[:, :5])
        assert not np.any(kept[:, 5:])


def test_no_token_sees_a_later_one_or_another_segment():
    model = init_model(TINY, 1)
    merged = nnx.merge(model.graph, model.params)
    table = merged.wte.embedding[...]
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2]])

    @jax.jit
    def influence(place):
        def output(embedding):
            params = jax.tree.map(lambda x: x, model.params)
            params["wte"]["embedding"] = params["wte"]["embedding"].replace(embedding)
            hidden, _ = nnx.merge(model.graph, params).hidden(
                tokens, positions, segments_BT=segments
            )
            return jnp.sum(jnp.sin(hidden[0, place]))

        return jnp.abs(jax.grad(output)(table)).sum(axis=1)[:10]

    for place in range(10):
        seen = np.flatnonzero(influence(jnp.int32(place)))
        first = 0 if place < 4 else 4
        np.testing.assert_array_equal(seen, np.arange(first, place + 1))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 4e-2), (jnp.float16, 6e-3)])
@pytest.mark.parametrize("in_fp32", [True, False])
def test_16_bit_logits_are_near_those_of_32(dtype, tolerance, in_fp32):
    config = dataclasses.replace(TINY, attention_softmax_in_fp32=in_fp32, initializer_range=0.1)
    model = init_model(config, 0)
    tokens = random_tokens(0, 2, 16, 61)
    expected = flax_logits(model, tokens)
    narrow = jax.tree.map(lambda p: p.astype(dtype), model.params)
    found = flax_logits(model._replace(params=narrow), tokens)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_the_softmax_runs_in_the_dtype_asked_for():
    q = jnp.ones((1, 2, 4, 8), jnp.bfloat16)
    kv = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    mask = jnp.ones((1, 2, 2), bool)
    for in_fp32, expected in [(True, "f32"), (False, "bf16")]:
        config = dataclasses.replace(TINY, attention_softmax_in_fp32=in_fp32)
        program = jax.jit(lambda q, k: attend(q, k, k, mask, config)).lower(q, kv).as_text()  # noqa: B023
        exponentials = [line for line in program.splitlines() if "stablehlo.exponential" in line]
        assert exponentials
        assert all(f"x{expected}>" in line for line in exponentials)


def test_rematerialised_gradients_equal_plain_ones():
    model = init_model(TINY, 0)
    tokens = jnp.asarray(random_tokens(0, 2, 8, 61), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))

    def loss(params, remat):
        hidden, _ = nnx.merge(model.graph, params).hidden(tokens, positions, remat=remat)
        return jnp.sum(jnp.sin(hidden))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(model.params, "none")
    for remat in ("products", "full"):
        again = gradient(model.params, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_presets_have_the_published_sizes():
    sizes = {
        name: sum(math.prod(tensor.shape) for tensor in hf_tensors(config).values())
        for name, config in PRESETS.items()
    }
    assert sizes == {
        "mini": 6_375_168,
        "164m": 164_144_128,
        "1b": 1_137_207_296,
        "3b": 3_043_311_104,
        "15b": 15_517_456_384,
    }
    for name in ("mini", "164m"):
        params = abstract_model(PRESETS[name]).params
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sizes[name]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'gpt_bigcode'"),
        ({"activation_function": "mish"}, "activation_function is 'mish'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"rope_theta": 1e4}, "fields of unknown effect: rope_theta=10000.0"),
        ({"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ({"n_layer": "2"}, "n_layer is '2', expected int"),
        ({"multi_query": 1}, "multi_query is 1, expected bool"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_name(change, message):
    raw = TINY.to_dict()
    assert StarCoderConfig.from_dict(raw) == TINY
    with pytest.raises(ValueError, match=message):
        StarCoderConfig.from_dict(raw | change)
