"""A projection that the devices of a mesh compute together, each with its part of the weight and of the
adapters' vectors.

As in Megatron, the first projection of a pair is cut by its outputs: every device's results are its own,
and nothing is sent. The second is cut by its inputs, and the partial results are added up by one
all-reduce. All that adapters add is linear in the inputs, so it is part of the same sum: no kind and no
rank needs a collective more. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.mixing.ragged import TargetBank
from flora_jax.weights import product
from flora_jax.weights.held import Held

Side = Literal["inputs", "outputs"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a projection lies on a mesh: cut along ``axis`` by its inputs or by its outputs.

    With ``whole`` every device gets all results of a projection that is cut by its outputs.
    """

    mesh: Mesh
    axis: str
    side: Side
    whole: bool = False

    @property
    def features(self) -> tuple[str | None, str | None]:
        """The mesh axes of the inputs and of the outputs."""
        return (self.axis, None) if self.side == "inputs" else (None, self.axis)

    def place(self, *axes: str | None) -> NamedSharding:
        """A sharding over these mesh axes."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """The hook: another one, or ``None`` for the base, under a cut."""

    inner: Any
    cut: Cut = dataclasses.field(metadata=dict(static=True))


def split_hooks(
    hooks: Sequence[Mapping[str, Any]], cuts: Mapping[str, Cut]
) -> list[dict[str, Split]]:
    """The hooks of every layer, and the base's where there is none, each under its projection's cut."""
    return [{target: Split(own.get(target), cut) for target, cut in cuts.items()} for own in hooks]


def bank_specs(bank: TargetBank, cut: Cut) -> TargetBank:
    """The bank with a ``PartitionSpec`` in each array's place: vectors lie beside what they multiply."""
    inputs, outputs = (PartitionSpec(None, axis) for axis in cut.features)
    bias = None if bank.bias_scale_NO is None else outputs
    return TargetBank(inputs, outputs, inputs, outputs, bias)  # type: ignore[arg-type]


def place_bank(bank: TargetBank, cut: Cut) -> TargetBank:
    """The bank with a sharding in each array's place."""
    placed: TargetBank = jax.tree.map(lambda spec: cut.place(*spec), bank_specs(bank, cut))
    return placed


@product.apply.register
def _apply_split(
    adapter: Split, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    cut = adapter.cut
    assert isinstance(W_IO, Held)
    inputs, outputs = cut.features

    def part(
        inner: Any, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None
    ) -> jax.Array:
        if cut.side == "outputs":
            return product.apply(inner, x_BTI, W_IO, bias_O)
        if bias_O is not None:
            # Added once: by the first device.
            bias_O = jnp.where(jax.lax.axis_index(cut.axis) == 0, bias_O, jnp.zeros_like(bias_O))
        return jax.lax.psum(product.apply(inner, x_BTI, W_IO, bias_O), cut.axis)

    whole = PartitionSpec()
    inner = jax.tree.map(
        lambda leaf: bank_specs(leaf, cut) if isinstance(leaf, TargetBank) else whole,
        adapter.inner,
        is_leaf=lambda leaf: isinstance(leaf, TargetBank),
    )
    y_BTO = jax.shard_map(
        part,
        mesh=cut.mesh,
        in_specs=(
            inner,
            PartitionSpec(None, None, inputs),
            W_IO.specs(PartitionSpec(inputs, outputs)),
            None if bias_O is None else PartitionSpec(outputs),
        ),
        out_specs=PartitionSpec(None, None, outputs),
        check_vma=False,  # It knows no rule for a branch by platform.
    )(adapter.inner, x_BTI, W_IO, bias_O)
    if cut.whole:
        y_BTO = jax.lax.with_sharding_constraint(y_BTO, cut.place())
    return y_BTO
