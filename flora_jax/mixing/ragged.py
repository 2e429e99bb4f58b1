"""Kinds and ranks mixed in one batch: lists of (row, component) pairs over a bank of components.

Every row has exactly one *first* multiplicative pair, which stands in the row's own place (a base or
LoRA row has ones there), so a batch without higher ranks costs one plain product. Further pairs are
appended to the product's rows: it has ``Σ rank`` of them, whatever the largest rank is. Their results
come back by a gather of each row's own pairs: unlike a scatter it adds in one order on every device,
and unlike a 0/1 product it lets nothing of a row, not even a NaN, into another. Additive components
come in the same way, in groups: a row's first ones in its own place, groups of further ones appended.

Knows nothing of adapters' names or files: ``bank`` fills the bank and lists the pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters import multiplicative
from flora_jax.adapters.multiplicative import scale_inputs
from flora_jax.shapes import check_shapes
from flora_jax.weights import product

# Filled on the host; arrays of JAX inside a jitted step.
HostOrDevice = Any
# Slots every bank starts with.
NOTHING = 0  # zeros in all four arrays: what padding points to
IDENTITY = 1  # ones in pre and post: the base weight
# Additive components that are added in one pass.
GROUP = 8
# Rows whose explicit weights a GPU holds at once.
_MOST_AT_ONCE = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetBank:
    """The components of all resident adapters on one projection of one layer, float32 but where said.

    Multiplicative ``pre [C, I]``, ``post [C, O]``; additive ``down [C', I]``, ``up [C', O]``, in 16 bits
    or float32, widened before they are multiplied; ``bias_scale [N, O]``, whose row 0 is zero, or
    ``None`` where no adapter touches the bias.
    """

    pre_CI: jax.Array
    post_CO: jax.Array
    down_CI: jax.Array
    up_CO: jax.Array
    bias_scale_NO: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """The components of each row of a batch on one target, int32; the same in every layer.

    ``first [B]``: slot of the row's first multiplicative component. ``row [P]``, ``slot [P]``: the
    further ones. ``mine [B, J]``: which of the ``P`` are the row's own, ``P`` where there are fewer.
    ``add_slot [B, J]``: the row's first additive components, at most :data:`GROUP`, padded with
    ``NOTHING``. ``more_row [A]``, ``more_slot [A, J]``: groups of the further ones. ``more_mine [B, N]``:
    which groups are the row's own. ``bias [B]``: the row's entry of ``bias_scale``. Lengths are static,
    so they come from buckets.
    """

    first_B: HostOrDevice
    row_P: HostOrDevice
    slot_P: HostOrDevice
    mine_BJ: HostOrDevice
    add_slot_BJ: HostOrDevice
    more_row_A: HostOrDevice
    more_slot_AJ: HostOrDevice
    more_mine_BN: HostOrDevice
    bias_B: HostOrDevice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged:
    """The hook for a mixed batch: a bank and the batch's pairs.

    With ``per_token`` the pairs' rows are the ``B·T`` tokens of the batch in order, so that an
    adapter may change inside an example (the paper's section 3.2).
    """

    bank: TargetBank
    pairs: Pairs
    per_token: bool = dataclasses.field(default=False, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowComponents:
    """Every row's components on one target for a prompt's pass, int32, padded with ``NOTHING``:
    ``slot [B, J]``, ``add_slot [B, J']``, ``bias [B]``. All rows are in one form.

    With ``merged`` each row's explicit weight ``W_i`` is built first, which is cheaper as soon as there
    are a few tokens for every component; without, every token is multiplied ``J`` times (Eq. 6).
    """

    slot_BJ: HostOrDevice
    add_slot_BJ: HostOrDevice
    bias_B: HostOrDevice
    merged: bool = dataclasses.field(default=False, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowWise:
    """The hook for rows of many tokens each: what a row computes follows from its own components."""

    bank: TargetBank
    own: RowComponents


BankLayers = Sequence[Mapping[str, TargetBank]]


def ragged_hooks(
    layers: BankLayers, pairs: Mapping[str, Pairs], *, per_token: bool = False
) -> list[dict[str, Ragged]]:
    """The model's ``adapters`` argument for a mixed batch; call it inside a jitted step."""
    return [{t: Ragged(bank, pairs[t], per_token) for t, bank in layer.items()} for layer in layers]


def row_wise_hooks(
    layers: BankLayers, own: Mapping[str, RowComponents]
) -> list[dict[str, RowWise]]:
    """The model's ``adapters`` argument for rows of many tokens; call it inside a jitted step."""
    return [{t: RowWise(bank, own[t]) for t, bank in layer.items()} for layer in layers]


def _add_own(y_BTO: jax.Array, values_PTO: jax.Array, mine_BJ: jax.Array) -> jax.Array:
    """``y`` and the sum over each row's own entries; an index of ``P`` adds nothing.

    Entry by entry, so that the gathers are part of one pass and nothing of ``[B, J, T, O]`` is kept;
    many entries in a loop over groups, which bounds the program.
    """

    def add(y_BTO: jax.Array, own_BJ: jax.Array) -> jax.Array:
        for number in range(own_BJ.shape[1]):
            y_BTO = y_BTO + values_PTO.at[own_BJ[:, number]].get(mode="fill", fill_value=0)
        return y_BTO

    rest = mine_BJ.shape[1] % GROUP
    y_BTO = add(y_BTO, mine_BJ[:, :rest])
    groups = mine_BJ.shape[1] // GROUP
    if groups <= 1:
        return add(y_BTO, mine_BJ[:, rest:])
    split_NBJ = mine_BJ[:, rest:].reshape(-1, groups, GROUP).transpose(1, 0, 2)
    return jax.lax.fori_loop(0, groups, lambda n, y: add(y, split_NBJ[n]), y_BTO)


def _add_components(
    y_BTO: jax.Array, x_BTI: jax.Array, bank: TargetBank, slot_BJ: jax.Array
) -> jax.Array:
    """``y + Σ_j (x · down_j) up_j``, component by component in one pass over ``y``.

    A product with the gathered ``up [B, J, O]`` costs a CPU's decoding three times as much.
    """
    down_BJI = bank.down_CI[slot_BJ].astype(jnp.float32)
    h_BTJ = jnp.einsum("bti,bji->btj", x_BTI.astype(jnp.float32), down_BJI)
    for number in range(slot_BJ.shape[1]):
        up_BO = bank.up_CO[slot_BJ[:, number]].astype(jnp.float32)
        y_BTO = y_BTO + h_BTJ[:, :, number, None] * up_BO[:, None]
    return y_BTO


def _bias_change(
    bank: TargetBank, chosen_B: jax.Array, bias_O: jax.Array | None
) -> jax.Array | None:
    if bank.bias_scale_NO is None or bias_O is None:
        return None
    return bank.bias_scale_NO[chosen_B] * bias_O.astype(jnp.float32)[None]


@product.apply.register
def _apply_ragged(
    adapter: Ragged, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    bank, pairs = adapter.bank, adapter.pairs
    batch, tokens, _ = x_BTI.shape
    if adapter.per_token:
        x_BTI = x_BTI.reshape(batch * tokens, 1, -1)
    check_shapes(
        "ragged", x_BTI=x_BTI, W_IO=W_IO, first_B=pairs.first_B,
        pre_CI=bank.pre_CI, post_CO=bank.post_CO,
    )  # fmt: skip
    rows = x_BTI.shape[0]
    slot = jnp.concatenate([pairs.first_B, pairs.slot_P])
    x_PTI = jnp.concatenate([x_BTI, x_BTI[pairs.row_P]])
    y_PTO = product.product(scale_inputs(x_PTI, bank.pre_CI[slot][:, None]), W_IO)
    y_PTO = y_PTO * bank.post_CO[slot][:, None]
    y_BTO = y_PTO[:rows]
    if pairs.mine_BJ.shape[1]:
        y_BTO = _add_own(y_BTO, y_PTO[rows:], pairs.mine_BJ)
    if pairs.add_slot_BJ.shape[1]:
        y_BTO = _add_components(y_BTO, x_BTI, bank, pairs.add_slot_BJ)
    if pairs.more_mine_BN.shape[1]:
        none_ATO = jnp.zeros((pairs.more_row_A.shape[0], *y_BTO.shape[1:]))
        own_ATI = x_BTI[pairs.more_row_A]
        more_ATO = _add_components(none_ATO, own_ATI, bank, pairs.more_slot_AJ)
        y_BTO = _add_own(y_BTO, more_ATO, pairs.more_mine_BN)
    change_BO = _bias_change(bank, pairs.bias_B, bias_O)
    if change_BO is not None:
        y_BTO = y_BTO + change_BO[:, None]
    y_BTO = product.finish(y_BTO, bias_O, x_BTI.dtype)
    return y_BTO.reshape(batch, tokens, -1)


def _under_own_weights(
    x_BTI: jax.Array, pre_BJI: jax.Array, post_BJO: jax.Array, W_IO: product.Weight
) -> jax.Array:
    """Every row times its own ``W_i``: float32 ``[B, T, O]``.

    One after another on a CPU, so that one ``W_i`` at a time is in memory. On a GPU a few rows are one
    batched product, whose weights are made in one pass over ``W``.
    """

    def one(x_TI: jax.Array, pre_JI: jax.Array, post_JO: jax.Array) -> jax.Array:
        return product.product(x_TI, multiplicative.merge_as_held(pre_JI, post_JO, W_IO))

    def looped(*rows: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: one(*row), rows)

    def at_once(*rows: jax.Array) -> jax.Array:
        # Once the activations are there, and no earlier: nothing else keeps XLA from making the weights
        # of all layers first, 12.7 GB of them at 15B.
        return jax.vmap(one)(*jax.lax.optimization_barrier(rows))

    if len(x_BTI) > _MOST_AT_ONCE:
        return looped(x_BTI, pre_BJI, post_BJO)
    return jax.lax.platform_dependent(x_BTI, pre_BJI, post_BJO, cpu=looped, default=at_once)


@product.apply.register
def _apply_row_wise(
    adapter: RowWise, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    bank, own = adapter.bank, adapter.own
    check_shapes(
        "row-wise", x_BTI=x_BTI, W_IO=W_IO, slot_BJ=own.slot_BJ, bias_B=own.bias_B,
        pre_CI=bank.pre_CI, post_CO=bank.post_CO,
    )  # fmt: skip
    pre_BJI, post_BJO = bank.pre_CI[own.slot_BJ], bank.post_CO[own.slot_BJ]
    if own.merged:
        y_BTO = _under_own_weights(x_BTI, pre_BJI, post_BJO, W_IO)
    elif own.slot_BJ.shape[1] == 1:
        y_BTO = product.product(scale_inputs(x_BTI, pre_BJI), W_IO) * post_BJO
    else:
        y_BTO = multiplicative.apply_batch(pre_BJI, post_BJO, x_BTI, W_IO)
    if own.add_slot_BJ.shape[1]:
        down_BJI, up_BJO = (
            pool[own.add_slot_BJ].astype(jnp.float32) for pool in (bank.down_CI, bank.up_CO)
        )
        h_BTJ = jnp.einsum("bti,bji->btj", x_BTI.astype(jnp.float32), down_BJI)
        y_BTO = y_BTO + jnp.einsum("btj,bjo->bto", h_BTJ, up_BJO)
    change_BO = _bias_change(bank, own.bias_B, bias_O)
    if change_BO is not None:
        y_BTO = y_BTO + change_BO[:, None]
    return product.finish(y_BTO, bias_O, x_BTI.dtype)
