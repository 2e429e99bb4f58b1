"""Held-out files under adapters: what is scored, against explicit weights one window at a time."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.held_out import HeldOut, Windows, compare
from flora_jax.checkpoints import open_checkpoint
from flora_jax.errors import InputError
from flora_jax.models.family import family_of
from flora_jax.peft.read import read_adapter
from flora_jax.shipped import adapter_source
from flora_jax.train.data.tokens import tokenize
from flora_jax.weights.dense import Dense
from flora_jax.weights.product import explicit as as_array
from tests.helpers.oracles import explicit_weight

TEXTS = ("local a = {}\nfor i = 1, 9 do\n  a[i] = i * i\nend\n", "return nil\n", "print(a)\n" * 6)
LENGTH = 16


@pytest.fixture
def corpora(tmp_path):
    with gzip.open(tmp_path / "lua.validation.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in TEXTS)
    return tmp_path


def explicit(model, adapter):
    """The whole model with the adapter's weights written out."""
    # A copy: a module shares its variables with the state that it is made of.
    whole = nnx.merge(model.graph, jax.tree.map(lambda leaf: leaf, model.params))
    for number, layer in enumerate(adapter.layers):
        for target, params in layer.items():
            node = getattr(whole, family_of(model.config).blocks)[number]
            for name in target.split("."):
                node = getattr(node, name)
            W_IO, bias_O = as_array(model.weight(number, target)), node.bias[...]
            weight_IO, bias_O = explicit_weight(params, W_IO, bias_O)
            node.kernel.set_value(Dense(jnp.asarray(weight_IO.T, jnp.float32)))
            node.bias.set_value(jnp.asarray(bias_O, jnp.float32))
    return whole


def one_by_one(whole, packed, lengths):
    """Nats, right guesses, targets and bytes; every document's part of a window a pass of its own."""
    ends = [*packed.starts[1:], len(packed.tokens)]
    nll, hits, targets, size = 0.0, 0, 0, 0
    for first in range(0, len(packed.tokens), LENGTH):
        for start, end in zip(packed.starts, ends):
            part = packed.tokens[max(first, start) : min(first + LENGTH + 1, end)].astype(np.int32)
            if len(part) < 2 or max(first, start) >= first + LENGTH:
                continue
            logits_TV = np.asarray(whole(part[None, :-1]), np.float64)[0]
            own = logits_TV[np.arange(len(part) - 1), part[1:]]
            nll += float(np.sum(np.log(np.exp(logits_TV).sum(axis=-1)) - own))
            hits += int((logits_TV.argmax(axis=-1) == part[1:]).sum())
            targets += len(part) - 1
            size += int(lengths[part[1:]].sum())
    return nll / math.log(2) / size, hits / targets, targets


def test_every_window_is_scored_under_the_adapters_explicit_weights(corpora):
    opened = open_checkpoint("mini")
    model, config = opened.load("float32"), opened.config
    adapter = read_adapter(adapter_source("flora/lua"), config.projections(), config.n_layer)
    held_out = HeldOut(opened, model, corpora, corpora / "tokens")
    found = held_out.change("lua", adapter, length=LENGTH, most=99)

    tokenizer, end_id = opened.text_tokens("text")
    packed, _ = tokenize(corpora / "lua.validation.jsonl.gz", tokenizer, end_id)
    texts = [tokenizer.decode([number]) for number in range(config.vocab_size)]
    lengths = np.asarray([len(text.encode()) for text in texts])
    bits, accuracy, targets = one_by_one(explicit(model, adapter), packed, lengths)
    base_bits, base_accuracy, _ = one_by_one(nnx.merge(model.graph, model.params), packed, lengths)
    assert found["tokens"] == targets
    np.testing.assert_allclose(found["bits_per_byte"], bits, atol=1e-4)
    np.testing.assert_allclose(found["bits_per_byte_change"], bits - base_bits, atol=1e-4)
    np.testing.assert_allclose(found["accuracy"], accuracy, atol=1e-5)
    np.testing.assert_allclose(found["accuracy_change"], accuracy - base_accuracy, atol=1e-5)
    assert bits != base_bits


def test_the_most_windows_are_spread_over_the_file_and_a_file_without_one_is_refused(corpora):
    opened = open_checkpoint("mini")
    model, config = opened.load("float32"), opened.config
    adapter = read_adapter(adapter_source("lora/lua"), config.projections(), config.n_layer)
    held_out = HeldOut(opened, model, corpora, corpora / "tokens")
    assert held_out.change("lua", adapter, length=LENGTH, most=2)["windows"] == 2
    with gzip.open(corpora / "perl.validation.jsonl.gz", "wt") as file:
        file.write('{"content": ""}\n')
    with pytest.raises(
        InputError, match=r"perl\.validation\.jsonl\.gz: 1 tokens of 1 documents hold nothing"
    ):
        held_out.change("perl", adapter, length=LENGTH, most=2)


def test_a_change_is_paired_and_its_interval_that_of_windows():
    rng = np.random.default_rng(0)
    base = Windows(rng.uniform(5, 50, 64), np.full(64, 3.0), np.full(64, 8.0), np.full(64, 20.0))
    # Every window gains the same: the change is certain, however much windows differ.
    better = base._replace(nll=base.nll - 20 * math.log(2) * 0.25)
    found = compare(better, base, draws=200)
    assert found["bits_per_byte_change_95"] == [-0.25, -0.25]
    low, high = found["bits_per_byte_95"]
    assert low < found["bits_per_byte"] < high
    assert found["accuracy_change"] == 0.0
    assert found["accuracy"] == 0.375
