"""Training several adapters in one batch: the hook in which each adapter owns an equal share of rows.

Row ``j · N + n`` of a batch belongs to adapter ``n``, so that a batch split over devices in
contiguous pieces gives every device rows of every adapter. Knows nothing of losses or optimizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters.kind import kind_of
from flora_jax.adapters.registry import owners
from flora_jax.weights import product
from flora_jax.weights.slices import columns, join_columns

# Below so many tokens for an adapter, building its explicit weight costs more than it saves.
_MERGE_TOKENS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped:
    """The hook of ``N`` adapters of one kind and shape on one projection.

    ``params`` are their factors with a leading axis ``N``; ``keys [N]`` the dropout keys of this
    projection, or ``None``. ``dropout`` is the probability with which an input of the adapter's own part
    (LoRA's branch) is dropped (the others are scaled up), as in PEFT. ``rounded``: products with explicit
    weights, and of a kind with a ``train_one``, take the activations' dtype and give it at once, which a
    GPU does without float32 arrays between.
    """

    params: Any
    keys: jax.Array | None = None
    dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))
    rounded: bool = dataclasses.field(default=False, metadata=dict(static=True))


def grouped_hooks(
    layers: Sequence[Mapping[str, Any]],
    keys_N: jax.Array | None = None,
    dropout: float = 0.0,
    *,
    rounded: bool = False,
) -> list[dict[str, Grouped]]:
    """The model's ``adapters`` argument for training; call it inside a jitted step.

    Args:
        layers: ``layers[n][target]`` are stacked factors, leading axis ``N``.
        keys_N: one PRNG key an adapter; without them nothing is dropped.
        dropout: see :class:`Grouped`.
        rounded: see :class:`Grouped`.

    Raises:
        ValueError: dropout for a kind that has none.
    """
    hooks: list[dict[str, Grouped]] = []
    for number, layer in enumerate(layers):
        hooks.append({})
        for place, (target, params) in enumerate(sorted(layer.items())):
            if keys_N is None or not dropout:
                hooks[-1][target] = Grouped(params, rounded=rounded)
                continue
            if kind_of(params).train_one is None:
                kinds = " and ".join(owners("dropout"))
                raise ValueError(f"dropout belongs to {kinds}, found {type(params).__name__}")
            fold = jax.vmap(lambda key, n=64 * number + place: jax.random.fold_in(key, n))
            hooks[-1][target] = Grouped(params, fold(keys_N), dropout, rounded)
    return hooks


def builds_weight(params: Any, tokens: int) -> bool:
    """Whether an adapter's explicit ``W_i`` is used for ``tokens`` tokens.

    With gradients the explicit form costs 6 · tokens · I · O operations whatever the rank (one
    product forward, two backward), the factored one 4 for each multiplicative component.
    """
    kind = kind_of(params)
    multiplicative, _ = kind.traits.pairs(kind.rank(params))
    return multiplicative >= 2 and tokens >= _MERGE_TOKENS


@product.apply.register
def _apply_grouped(
    adapter: Grouped, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    many = jax.tree.leaves(adapter.params)[0].shape[0]
    rows, tokens, inputs = x_BTI.shape
    if rows % many:
        raise ValueError(f"{rows} rows cannot be split evenly over {many} adapters")
    merged = builds_weight(
        jax.tree.map(lambda leaf: leaf[0], adapter.params), rows // many * tokens
    )

    def one(params: Any, x_bTI: jax.Array, key: jax.Array | None) -> jax.Array:
        flat_XI, kind = x_bTI.reshape(-1, inputs), kind_of(params)
        if merged:
            y_XO = _explicit(params, flat_XI, W_IO, bias_O, adapter.rounded)
        elif kind.train_one is not None:
            own_XI = None if key is None else _dropped(flat_XI, key, adapter.dropout)
            y_XO = kind.train_one(params, flat_XI, W_IO, bias_O, own_XI, adapter.rounded)
        else:
            y_XO = kind.apply_one(params, flat_XI, W_IO, bias_O)
        return y_XO.reshape(*x_bTI.shape[:-1], W_IO.shape[1])

    # A group of one needs no batched product.
    if many == 1:
        first, key = jax.tree.map(lambda leaf: leaf[0], (adapter.params, adapter.keys))
        return one(first, x_BTI, key)
    x_bNTI = x_BTI.reshape(rows // many, many, tokens, inputs)
    keys_axis = None if adapter.keys is None else 0
    y_bNTO = jax.vmap(one, (0, 1, keys_axis), 1)(adapter.params, x_bNTI, adapter.keys)
    return y_bNTO.reshape(rows, tokens, -1)


def _explicit(
    params: Any,
    x_XI: jax.Array,
    W_IO: product.Weight,
    bias_O: jax.Array | None,
    rounded: bool,
) -> jax.Array:
    """``x @ W_i`` of a kind with ``up [R, O]``; of a quantised weight by slices of the outputs.

    Checkpointed: the explicit weights of all layers would otherwise live until the backward pass. On a
    CPU they do all the same, as XLA shares what both passes compute; a loop over slices, forward and
    backward, it leaves alone.
    """
    merge, weight = kind_of(params).merge, product.as_weight(W_IO)
    count = weight.slices_to_merge

    @jax.checkpoint
    def whole(params: Any, x_XI: jax.Array) -> jax.Array:
        multiply = product.rounded if rounded else product.product
        return multiply(x_XI, merge(params, weight)[0])

    @jax.checkpoint
    def part(params: Any, x_XI: jax.Array, number: jax.Array) -> jax.Array:
        some = dataclasses.replace(params, up_RO=columns(params.up_RO, number, count))
        return product.product(x_XI, merge(some, weight.columns(number, count))[0])

    if count == 1:
        return product.finish(whole(params, x_XI), bias_O, x_XI.dtype)
    y_SXo = jax.lax.map(lambda number: part(params, x_XI, number), jnp.arange(count))
    return product.finish(join_columns(y_SXo), bias_O, x_XI.dtype)


def _dropped(x_XI: jax.Array, key: jax.Array, dropout: float) -> jax.Array:
    """Float32 ``x`` with zeros for the inputs that are dropped, the others scaled up."""
    kept_XI = jax.random.bernoulli(key, 1.0 - dropout, x_XI.shape)
    return jnp.where(kept_XI, x_XI.astype(jnp.float32) / (1.0 - dropout), 0.0)
