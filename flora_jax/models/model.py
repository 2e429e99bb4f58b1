"""A model of any family as steps take it: its structure, hashed once, and its parameters as a pytree.

Knows nothing of a family's modules; of files or adapters' arithmetic neither.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.cache import Cache, Paging
from flora_jax.models.family import ModelConfig, family_of
from flora_jax.weights.product import Weight

if TYPE_CHECKING:
    from flora_jax.models.splits import Splits

LayerAdapters = Mapping[str, Any]
Adapters = Sequence[LayerAdapters]
# What of a block the backward pass computes anew: nothing, all but its projections' results, or all.
Remat = Literal["none", "products", "full"]


class LanguageModel(Protocol):
    """What the rooms above call on a merged model; a ``flax.nnx.Module`` of its family.

    ``adapters[layer][target]`` is anything that ``flora_jax.weights.product.apply`` takes.
    """

    @property
    def config(self) -> Any:
        """The model's :class:`~flora_jax.models.family.ModelConfig`."""

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        *,
        cache: Cache | None = None,
        paging: Paging | None = None,
        segments_BT: jax.Array | None = None,
        adapters: Adapters | None = None,
        remat: Remat = "none",
        attention: str = "einsum",
    ) -> tuple[jax.Array, Cache | None]:
        """The final normalised activations ``[B, T, D]`` and the cache with these tokens in it.

        Without a cache a token sees the earlier positions of its own segment; segment 0 is padding.
        With one, whose blocks ``paging`` gives to the rows, it sees every cached position up to its own;
        padding stands at :data:`flora_jax.models.cache.NOWHERE`: its keys are dropped, and its own
        output means nothing.

        ``remat`` trades time for memory in the backward pass: "products" keeps the results of the
        projections alone, "full" only what enters each block. ``attention`` is that without a cache, of
        :data:`flora_jax.models.attention.IMPLEMENTATIONS`; with one ``paging`` says it.
        """

    def head(self) -> jax.Array:
        """The output projection ``[D, V]``, tied to the embedding or its own."""

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """Scores over the vocabulary ``[..., V]`` in float32."""

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        adapters: Adapters | None = None,
    ) -> jax.Array:
        """Logits ``[B, T, V]`` of a full forward pass, positions counted inside each row's tokens.

        ``segments_BT`` is 1 on tokens and 0 on padding, on either side.
        """


class Model(NamedTuple):
    """A model split once: ``nnx.merge(graph, params)`` inside a jitted step gives it back.

    ``graph`` is hashable and static; ``params`` is the pytree that steps take.
    """

    config: ModelConfig
    graph: nnx.GraphDef
    params: nnx.State

    def weight(self, layer: int, target: str) -> Weight:
        """The weight ``[I, O]`` of one projection, as it is held."""
        node: Any = self.params[family_of(self.config).blocks][layer]
        for name in (*target.split("."), "kernel"):
            node = node[name]
        weight: Weight = node[...]
        return weight

    def bias(self, layer: int, target: str) -> jax.Array | None:
        """The bias ``[O]`` of one projection, where it has one."""
        node: Any = self.params[family_of(self.config).blocks][layer]
        for name in target.split("."):
            node = node[name]
        if "bias" not in node:
            return None
        bias: jax.Array = node["bias"][...]
        return bias

    @property
    def embedding(self) -> jax.Array:
        """The token embedding ``[V, D]``; its dtype is the activations', its place the parameters'."""
        node: Any = self.params
        for part in family_of(self.config).embedding.split("."):
            node = node[part]
        (leaf,) = jax.tree.leaves(node)
        return leaf


class Definition:
    """What steps take of a model as a static argument: its structure, hashed and compared once.

    A ``nnx.GraphDef`` hashes all that is in it at every call, 4.5 ms at 40 layers, and an ``nnx.State``
    is flattened by Python code. There is one object for all models of one structure: see
    :func:`definition_of`. ``splits``: how devices share it;
    ``None`` on one.
    """

    __slots__ = ("__weakref__", "_graph", "_structure", "splits")

    def __init__(self, graph: nnx.GraphDef, structure: Any, splits: Splits | None = None):
        self._graph, self._structure, self.splits = graph, structure, splits

    def merge(self, leaves: Sequence[jax.Array]) -> LanguageModel:
        """The model with the parameters of :func:`leaves_of`; inside a jitted step."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))


_DEFINITIONS: weakref.WeakValueDictionary[Any, Definition] = weakref.WeakValueDictionary()


def definition_of(model: Model, splits: Splits | None = None) -> Definition:
    """The model's definition, the same object for every model of an equal structure that is split so."""
    key = model.graph, jax.tree.structure(model.params), splits
    return _DEFINITIONS.setdefault(key, Definition(*key))


def leaves_of(model: Model) -> tuple[jax.Array, ...]:
    """The parameters as steps take them, in the order that :class:`Definition` knows."""
    return tuple(jax.tree.leaves(model.params))


def init_model(config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> Model:
    """Random weights, as the family draws them."""
    graph, params = nnx.split(family_of(config).build(config, dtype, seed))
    return Model(config, graph, params)


def abstract_model(config: ModelConfig, dtype: Any = jnp.float32) -> Model:
    """The same with shapes and dtypes in place of arrays: nothing is allocated."""
    model = nnx.eval_shape(partial(family_of(config).build, config, dtype, 0))
    graph, params = nnx.split(model)
    return Model(config, graph, params)
