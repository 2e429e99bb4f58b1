"""A tiny model with random weights, and batches of random documents, for the training tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.models.model import Model, abstract_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.train.data.packing import PackedTokens
from flora_jax.train.step import GroupedBatch

VOCABULARY = 61
CONFIG = StarCoderConfig(
    vocab_size=VOCABULARY, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=40
)


def tiny_model(seed=0, dtype="float32", **overrides) -> Model:
    """Every parameter is random: biases that start at zero would hide one left out."""
    model = abstract_model(dataclasses.replace(CONFIG, **overrides), dtype)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        spread = leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 0.3
        return jnp.asarray(spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return model._replace(params=jax.tree.map(draw, model.params))


def random_documents(seed, documents=30, longest=14) -> PackedTokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, documents)
    starts = np.cumsum([0, *lengths])[:-1]
    tokens = rng.integers(0, VOCABULARY, lengths.sum()).astype(np.uint16)
    return PackedTokens(tokens, starts, tuple(map(str, range(documents))), int(lengths.sum()))


def grouped(batches) -> GroupedBatch:
    """A batch of each adapter → one of all."""
    return GroupedBatch(*(jnp.asarray(np.stack(parts, axis=1)) for parts in zip(*batches)))


def random_batch(seed, many=1, rows=4, length=12, step=0) -> GroupedBatch:
    """Windows with several documents each; each adapter has documents of its own."""
    sources = [random_documents([seed, n]) for n in range(many)]
    return grouped([source.batch(step, rows, length, seed) for source in sources])


def only(batch, adapter) -> GroupedBatch:
    """One adapter's rows, as a group of one."""
    return jax.tree.map(lambda leaf: leaf[:, adapter : adapter + 1], batch)


def stacked(adapters: list[ModelAdapter]):
    """Their layers with a leading axis, in arrays of their own: a step donates them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.layers for one in adapters))
