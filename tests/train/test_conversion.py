"""Moments against torch, divergences against their formula, and what distilling reaches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flora_jax.errors import InputError
from flora_jax.models.quantize import quantize_model
from flora_jax.peft.convert import Base, convert
from flora_jax.train.conversion import ConvertOptions, Text, convert_with_text
from flora_jax.train.data.packing import PackedTokens, hold_out
from flora_jax.train.distil import DistilOptions, Judge, Quality, distil
from flora_jax.train.loss import HeadChunks, frozen_head_divergence
from flora_jax.train.moments import input_moments
from tests.helpers.random_adapters import random_adapter
from tests.helpers.tiny_training import VOCABULARY, random_documents, tiny_model
from tests.helpers.torch_models import TINY, tiny_torch_model, to_flax

TARGETS = ("attn.c_attn", "mlp.c_proj")
LENGTHS = np.ones(VOCABULARY, np.int64)


def adapter_on(model, kind, seed=0, rank=1, targets=TARGETS):
    config = model.config
    return random_adapter(kind, seed, config.projections(), config.n_layer, rank, targets)


def torch_squares(torch_model, packed, length):
    """By layer and target the sum of squares of inputs, and the number of tokens that have a target."""
    sums, count, seen = {}, 0, {}
    for layer, block in enumerate(torch_model.transformer.h):
        for target, module in zip(TARGETS, (block.attn.c_attn, block.mlp.c_proj)):
            module.register_forward_pre_hook(
                lambda module, given, key=(layer, target): seen.update({key: given[0][0]})
            )
    for batch in packed.evaluation(length, 1):
        (tokens,), (segments,), (mask,) = batch.tokens, batch.segments, batch.mask
        for segment in set(segments) - {0}:
            own = np.flatnonzero(segments == segment)
            with torch.no_grad():
                torch_model(torch.tensor(tokens[own].astype(np.int64))[None])
            for key, x_TI in seen.items():
                kept_TI = x_TI.numpy().astype(np.float64)[mask[own] > 0]
                sums[key] = sums.get(key, 0.0) + np.square(kept_TI).sum(axis=0)
            count += int(mask[own].sum())
    return sums, count


def test_moments_are_those_of_torch_whatever_the_batches_and_their_padding():
    torch_model = tiny_torch_model(0)
    model = to_flax(torch_model)
    adapter = adapter_on(model, "lora", rank=2)
    packed = random_documents(3, documents=12)
    assert TINY["vocab_size"] > VOCABULARY
    found = [input_moments(model, adapter, packed.evaluation(10, rows)) for rows in (1, 4)]
    for layer, targets in enumerate(adapter.layers):
        block = torch_model.transformer.h[layer]
        for target, module in zip(TARGETS, (block.attn.c_attn, block.mlp.c_proj)):
            own = targets[target]
            change_IO = own.scale * np.asarray(own.down_RI).T @ np.asarray(own.up_RO)
            with torch.no_grad():
                module.weight += torch.tensor(change_IO.T)
    sums, count = torch_squares(torch_model, packed, 10)
    assert set(found[0]) == set(sums)
    for key, expected_I in sums.items():
        for moments in found:
            np.testing.assert_allclose(moments[key], expected_I / count, rtol=2e-4)


@pytest.mark.parametrize("numbers", [1, 2**20])
def test_divergence_and_its_slope_are_those_of_the_formula(numbers):
    rng = np.random.default_rng(0)
    hidden_BTD, teacher_BTD = jnp.asarray(rng.normal(0, 1, (2, 2, 5, 8)), jnp.float32)
    head_DV = jnp.asarray(rng.normal(0, 1, (8, 17)), jnp.float32)
    weights_BT = jnp.asarray(rng.uniform(0, 1, (2, 5)), jnp.float32)

    def plain(hidden_BTD):
        wanted_BTV = jax.nn.log_softmax(teacher_BTD @ head_DV)
        apart_BTV = wanted_BTV - jax.nn.log_softmax(hidden_BTD @ head_DV)
        return jnp.sum(weights_BT * jnp.sum(jnp.exp(wanted_BTV) * apart_BTV, axis=-1))

    def chunked(hidden_BTD):
        found_BT = frozen_head_divergence(hidden_BTD, teacher_BTD, head_DV, HeadChunks(numbers))
        return jnp.sum(weights_BT * found_BT)

    expected, found = (jax.value_and_grad(own)(hidden_BTD) for own in (plain, chunked))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_the_share_that_is_kept_is_of_the_sources_gain():
    assert Quality(0.1, 2.0, 1.5, 1.6, 10).kept == pytest.approx(0.8)
    assert Quality(0.1, 2.0, 1.5, 2.1, 10).kept == pytest.approx(-0.2)
    assert Quality(0.1, 2.0, 2.0, 1.6, 10).kept is None


def perturbed(adapter, seed, spread):
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(
        lambda leaf: leaf + spread * rng.standard_normal(leaf.shape).astype(np.float32),
        adapter.layers,
    )
    return dataclasses.replace(adapter, layers=noisy)


def test_distilling_finds_the_adapter_that_is_exact_and_leaves_the_base():
    model = tiny_model(n_layer=1)
    before = jax.tree.map(np.array, model.params)
    source = adapter_on(model, "hira")
    exact = convert(source, "flora", Base(model.weight, model.bias)).adapter
    start = perturbed(exact, 1, 0.4)
    text = random_documents(5, documents=40)
    options = DistilOptions(steps=100, learning_rate=0.03, rows=4, length=12)
    made = distil(model, source, start, text, options)
    judge = Judge(model, source, random_documents(6), LENGTHS, options)
    first, last = judge.divergence(start), judge.divergence(made)
    assert judge.divergence(exact) < 1e-6
    assert first > 2e-4
    assert last < 0.1 * first
    jax.tree.map(np.testing.assert_array_equal, model.params, before)


def text_of(seed=5):
    return Text(random_documents(seed, documents=40), random_documents(seed + 1), LENGTHS)


def options_of(to, steps):
    own = DistilOptions(steps=steps, learning_rate=0.01, rows=2, length=12)
    return ConvertOptions(to, approximate=True, distil=own)


def test_what_is_exact_is_not_distilled():
    model = tiny_model(n_layer=1)
    source = adapter_on(model, "hira")
    said = []
    taught = convert_with_text(source, model, text_of(), options_of("flora", 3), said.append)
    assert said == []
    assert (taught.steps, taught.windows, taught.fitted) == (0, 0, None)
    assert len(taught.converted.exact) == 2
    assert taught.quality.divergence < 1e-6
    np.testing.assert_allclose(taught.quality.made, taught.quality.source, rtol=1e-5)


def test_projections_that_are_the_same_stay_so_while_others_are_distilled():
    """An IA3 scales the inputs of one projection, and the outputs and the bias of the other.

    On a quantised base, whose weights are those that count.
    """
    model = quantize_model(tiny_model(n_layer=1), "int8")
    source = adapter_on(model, "ia3")
    options = options_of("flora", 20)
    said = []
    taught = convert_with_text(source, model, text_of(), options, said.append)
    assert said == ["distilling will take 20 steps of 2 rows of 12 tokens, after the fit"]
    assert taught.converted.exact == {(0, "mlp.c_proj")}
    assert (taught.steps, taught.windows) == (20, text_of().training.windows(12))
    held = convert(
        source, "flora", Base(model.weight, model.bias), approximate=True
    ).adapter.layers[0]
    made = taught.converted.adapter.layers[0]
    same = jax.tree.map(np.array_equal, made, held)
    assert all(jax.tree.leaves(same["mlp.c_proj"]))
    assert not any(jax.tree.leaves(same["attn.c_attn"]))
    assert taught.quality.divergence < taught.fitted.divergence
    assert taught.converted.differences[0, "attn.c_attn"].weight > 1e-3


@pytest.mark.parametrize("documents", [1, 3, 35])
def test_a_tenth_is_held_out_and_no_token_is_lost(documents):
    rng = np.random.default_rng(documents)
    lengths = rng.integers(3, 30, documents)
    starts = np.cumsum([0, *lengths])[:-1]
    tokens = np.arange(lengths.sum(), dtype=np.uint16)
    packed = PackedTokens(tokens, starts, tuple(map(str, range(documents))), int(tokens.sum()))
    parts = hold_out(packed, np.arange(len(tokens)))
    assert sorted([*parts[0].tokens, *parts[1].tokens]) == [*tokens]
    assert sum(part.text_bytes for part in parts) == packed.text_bytes
    for part in parts:
        assert part.starts[0] == 0
        for name, start in zip(part.names, part.starts, strict=True):
            first = starts[int(name)]
            # A document is whole, or its end is held out.
            assert part.tokens[start] == first or (part is parts[1] and documents < 10)
    names = [set(part.names) for part in parts]
    if documents < 10:
        assert len(parts[1].tokens) == len(tokens) // 10
    else:
        assert names[0] & names[1] == set()
        assert len(names[1]) == documents // 10


def test_text_without_a_whole_document_to_hold_out_is_refused_where_it_is_measured():
    model = tiny_model(n_layer=1)
    empty = PackedTokens(np.zeros(0, np.uint16), np.zeros(0, np.int64), (), 0)
    text = Text(random_documents(5), empty, LENGTHS)
    with pytest.raises(InputError, match="hold nothing to predict"):
        convert_with_text(adapter_on(model, "hira"), model, text, options_of("flora", 1))
