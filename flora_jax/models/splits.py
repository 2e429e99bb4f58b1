"""A model that the devices of a mesh compute together (tensor parallelism): what is cut, and how.

Projections and attention run on every device's part by themselves, so that a layer has the collectives
that it needs and no other: one all-reduce after attention, one after the MLP, and for multi-query models
one all-gather of the projection that has the one key and value in it. The embedding and the head are cut
by the vocabulary. Which parameter is cut by what are the family's rules (:mod:`.sharding`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.errors import InputError
from flora_jax.mixing.split import Cut, Side, split_hooks
from flora_jax.models.axes import logical_axes
from flora_jax.models.cache import Paging, SplitHeads
from flora_jax.models.family import check_parts, family_of
from flora_jax.models.model import Model
from flora_jax.models.sharding import TENSOR, make_mesh, named_leaves, shardings
from flora_jax.weights.held import Held
from flora_jax.weights.quantized import Method, input_units


@dataclasses.dataclass(frozen=True)
class Splits:
    """How one model lies on a mesh; hashable, static in jitted steps.

    Args:
        mesh: its axis :data:`~.sharding.TENSOR` has several devices.
        heads: attention's.
        targets: every projection's cut.
    """

    mesh: Mesh
    heads: SplitHeads
    targets: tuple[tuple[str, Cut], ...]

    def cuts(self) -> Mapping[str, Cut]:
        """By projection."""
        return dict(self.targets)

    def hooks(self, hooks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The model's ``adapters`` argument, each under its projection's cut."""
        return [*split_hooks(hooks, self.cuts())]

    def paging(self, paging: Paging) -> Paging:
        """The same with attention by every device over its own heads."""
        return dataclasses.replace(paging, heads=self.heads)

    def logits(self, logits_BV: jax.Array) -> jax.Array:
        """The same, all of them on every device; inside a jitted step."""
        if logits_BV.shape[-1] % self.mesh.shape[TENSOR] == 0:
            # Computed in parts: asked for the whole, XLA would gather the head's weight instead.
            parts = NamedSharding(self.mesh, PartitionSpec(None, TENSOR))
            logits_BV = jax.lax.with_sharding_constraint(logits_BV, parts)
        return jax.lax.with_sharding_constraint(logits_BV, self.everywhere)

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same by every device for itself, of arrays that are whole everywhere, to one that is."""
        whole = PartitionSpec()
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=whole, out_specs=whole, check_vma=False
        )

    @property
    def everywhere(self) -> NamedSharding:
        """Of what is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def cache(self) -> NamedSharding:
        """Of the pools of keys and values ``[L, S, G, K]``."""
        return NamedSharding(self.mesh, self.heads.pools)


def splits_of(model: Model) -> Splits | None:
    """How the parameters (arrays, or shapes with a sharding) lie on a mesh; ``None`` on one device.

    Raises:
        InputError: the model has no such parts, or a parameter does not lie where the family's rules say;
            the message names it.
    """
    place = model.embedding.sharding
    if not isinstance(place, NamedSharding) or place.mesh.shape.get(TENSOR, 1) == 1:
        return None
    mesh, config, family = cast(Mesh, place.mesh), model.config, family_of(model.config)
    leaves, wanted = (named_leaves(tree)[0] for tree in (model.params, shardings(model, mesh)))
    check_parts(config, mesh.shape[TENSOR], lambda path, inputs: leaves[path].input_units)
    for path, leaf in leaves.items():
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(wanted[path]), strict=True)
        for array, expected in pairs:
            if not array.sharding.is_equivalent_to(expected, len(array.shape)):
                raise InputError(
                    f"{path} lies as {array.sharding.spec}, expected {expected.spec}: "
                    "load the model with its mesh"
                )
    heads = SplitHeads(mesh, TENSOR, config.kv_heads % mesh.shape[TENSOR] == 0)
    cuts = []
    for target in config.projections():
        path = f"{family.blocks}.0.{target}.kernel"
        assert isinstance(leaves[path], Held)
        outputs = logical_axes(path, 2, family.axes)[1]
        side: Side = "outputs" if family.splits_outputs(path) else "inputs"
        # What has the keys and values in it goes to every device where their heads are not cut.
        cuts.append((target, Cut(mesh, TENSOR, side, outputs == "qkv" and not heads.own)))
    return Splits(mesh, heads, tuple(cuts))


def tensor_mesh(config: Any, size: int, quantize: Method | None = None) -> Mesh | None:
    """The mesh of the first ``size`` devices, for a model that is to be loaded; ``None`` for one device.

    Raises:
        InputError: there are fewer devices, or the model cannot be cut into so many parts; the message
            names the tensor.
    """
    if size < 1:
        raise InputError(f"tensor_parallel_size is {size}, expected at least 1")
    if size == 1:
        return None
    devices = len(jax.devices())
    if size > devices:
        raise InputError(
            f"tensor_parallel_size is {size}, expected at most {devices}, the devices that JAX sees"
        )
    check_parts(config, size, lambda path, inputs: input_units(inputs, quantize))
    return make_mesh(1, size)
