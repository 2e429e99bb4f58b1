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

from flora_jax.adapters import IA3, FLoRA, HiRA, LoRA, kind_of, lora
from flora_jax.adapters.model_adapter import rank_of
from flora_jax.weights import product
from flora_jax.weights.quantized import Quantized, columns, join_columns, slices

# Below so many tokens for an adapter, building its explicit weight costs more than it saves.
_MERGE_TOKENS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped:
    """The hook of ``N`` adapters of one kind and shape on one projection.

    ``params`` are their factors with a leading axis ``N``; ``keys [N]`` the dropout keys of this
    projection, or ``None``. ``dropout`` is the probability with which an input of LoRA's branch is
    dropped (the others are scaled up), as in PEFT. ``rounded``: products of LoRA and of explicit weights
    multiply the activations' dtype and give it at once, which a GPU does without float32 arrays between.
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
        ValueError: dropout for a kind other than LoRA.
    """
    hooks: list[dict[str, Grouped]] = []
    for number, layer in enumerate(layers):
        hooks.append({})
        for place, (target, params) in enumerate(sorted(layer.items())):
            if keys_N is None or not dropout:
                hooks[-1][target] = Grouped(params, rounded=rounded)
                continue
            if not isinstance(params, LoRA):
                raise ValueError(f"dropout is LoRA's, found {type(params).__name__}")
            fold = jax.vmap(lambda key, n=64 * number + place: jax.random.fold_in(key, n))
            hooks[-1][target] = Grouped(params, fold(keys_N), dropout, rounded)
    return hooks


def builds_weight(params: Any, tokens: int) -> bool:
    """Whether an adapter's explicit ``W_i`` is used for ``tokens`` tokens.

    With gradients the explicit form costs 6 · tokens · I · O operations whatever the rank (one
    product forward, two backward), the factored one 4 for each multiplicative component.
    """
    if isinstance(params, LoRA | IA3) or tokens < _MERGE_TOKENS:
        return False
    return rank_of(params) + isinstance(params, HiRA) >= 2


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
        flat_XI = x_bTI.reshape(-1, inputs)
        if merged:
            y_XO = _explicit(params, flat_XI, W_IO, bias_O, adapter.rounded)
        elif adapter.rounded and isinstance(params, LoRA):
            y_XO = _rounded_lora(params, flat_XI, W_IO, bias_O, key, adapter.dropout)
        elif key is not None:
            y_XO = _dropped(params, flat_XI, W_IO, bias_O, key, adapter.dropout)
        else:
            y_XO = kind_of(params).apply_one(params, flat_XI, W_IO, bias_O)
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
    params: FLoRA | HiRA,
    x_XI: jax.Array,
    W_IO: product.Weight,
    bias_O: jax.Array | None,
    rounded: bool,
) -> jax.Array:
    """``x @ W_i``; of a quantised weight a slice of the outputs after another.

    Checkpointed: the explicit weights of all layers would otherwise live until the backward pass. On a
    CPU they do all the same, as XLA shares what both passes compute; a loop over slices, forward and
    backward, it leaves alone.
    """
    merge = kind_of(params).merge

    @jax.checkpoint
    def whole(params: Any, x_XI: jax.Array) -> jax.Array:
        multiply = product.rounded if rounded else product.product
        return multiply(x_XI, merge(params, W_IO)[0])

    @jax.checkpoint
    def part(params: Any, x_XI: jax.Array, number: jax.Array) -> jax.Array:
        some = dataclasses.replace(params, **_outputs_of(params, number, count))
        return product.product(x_XI, merge(some, columns(W_IO, number, count))[0])

    if not isinstance(W_IO, Quantized):
        return product.finish(whole(params, x_XI), bias_O, x_XI.dtype)
    count = slices(W_IO)
    y_SXo = jax.lax.map(lambda number: part(params, x_XI, number), jnp.arange(count))
    return product.finish(join_columns(y_SXo), bias_O, x_XI.dtype)


def _outputs_of(params: FLoRA | HiRA, number: jax.Array, count: int) -> dict[str, jax.Array]:
    name = "A_RO" if isinstance(params, FLoRA) else "up_RO"
    return {name: columns(getattr(params, name), number, count)}


def _dropped(
    params: LoRA,
    x_XI: jax.Array,
    W_IO: product.Weight,
    bias_O: jax.Array | None,
    key: jax.Array,
    dropout: float,
) -> jax.Array:
    kept_XI = jax.random.bernoulli(key, 1.0 - dropout, x_XI.shape)
    wide_XI = jnp.where(kept_XI, x_XI.astype(jnp.float32) / (1.0 - dropout), 0.0)
    y_XO = product.product(x_XI, W_IO) + lora.branch(params, wide_XI)
    return product.finish(y_XO, bias_O, x_XI.dtype)


def _rounded_lora(
    params: LoRA,
    x_XI: jax.Array,
    W_IO: product.Weight,
    bias_O: jax.Array | None,
    key: jax.Array | None,
    dropout: float,
) -> jax.Array:
    """LoRA of which every product is one of the activations' dtype."""
    dtype, own_XI = x_XI.dtype, x_XI
    if key is not None:
        kept_XI = jax.random.bernoulli(key, 1.0 - dropout, x_XI.shape)
        own_XI = jnp.where(kept_XI, x_XI.astype(jnp.float32) / (1.0 - dropout), 0.0).astype(dtype)
    h_XR = jnp.matmul(own_XI, params.down_RI.astype(dtype).T)
    delta_XO = jnp.matmul(h_XR, (params.scale * params.up_RO.astype(jnp.float32)).astype(dtype))
    return product.finish(product.rounded(x_XI, W_IO) + delta_XO, bias_O, dtype)
