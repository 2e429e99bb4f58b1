"""Which axis of which parameter is split over which axis of a device mesh.

A table of the family gives every parameter logical axes ("embed", "mlp" …), another gives a logical axis
its mesh axis. Knows nothing of files or of the arithmetic: XLA inserts the collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flora_jax.models.axes import MESH_AXES, Rules, logical_axes
from flora_jax.models.family import family_of
from flora_jax.models.model import Model
from flora_jax.weights.held import Held

# The mesh axis of :data:`~flora_jax.models.axes.MESH_AXES`.
TENSOR = "tensor"


def make_mesh(data: int, tensor: int) -> Mesh:
    """A mesh of ``data * tensor`` devices with the axes "data" and "tensor".

    The axes are ``Auto`` (jax.make_mesh alone gives ``Explicit`` ones, under which the model's
    products would have to name the sharding of their results).
    """
    return jax.make_mesh((data, tensor), ("data", TENSOR), axis_types=(AxisType.Auto,) * 2)


def named_leaves(params: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by dotted path (``h.0.mlp.up.kernel``, say), in order, and the tree's structure.

    A weight is one leaf however it is held. ``jax.tree.unflatten(structure, values)`` takes values in the
    same order.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, Held)
    )
    return {_dotted(path): leaf for path, leaf in flat}, structure


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))


def partition_specs(
    params: Any, rules: Rules, mesh_axes: Mapping[str, str | None] = MESH_AXES
) -> Any:
    """A tree like ``params`` (arrays or shapes) with a ``PartitionSpec`` at every leaf.

    Raises:
        ValueError: a parameter matches no rule or several, or a logical axis has no mesh axis; the
            message has the parameter's path.
    """
    leaves, structure = named_leaves(params)
    specs: list[Any] = []
    for name, leaf in leaves.items():
        axes = logical_axes(name, len(leaf.shape), rules)
        unknown = [axis for axis in axes if axis not in mesh_axes]
        if unknown:
            raise ValueError(f"sharding: {name} has the logical axis {unknown[0]!r}, unknown here")
        spec = PartitionSpec(*(mesh_axes[axis] for axis in axes))
        specs.append(leaf.specs(spec) if isinstance(leaf, Held) else spec)
    return jax.tree.unflatten(structure, specs)


def shardings(
    model: Model,
    mesh: Mesh,
    rules: Rules | None = None,
    mesh_axes: Mapping[str, str | None] = MESH_AXES,
) -> Any:
    """A tree like ``model.params`` (abstract or not) with a ``NamedSharding`` at every leaf.

    ``rules`` are the model's family's unless others are given.

    A dimension whose mesh axis is absent from ``mesh``, or does not divide it evenly, is replicated:
    results stay right, and only that parameter's memory is not saved.

    Raises:
        ValueError: see :func:`partition_specs`; or a mesh axis in use is not ``Auto``.
    """
    for axis, kind in zip(mesh.axis_names, mesh.axis_types):
        if axis in mesh_axes.values() and kind != AxisType.Auto:
            raise ValueError(f"sharding: mesh axis {axis!r} is {kind.name}, expected Auto")

    def fit(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        fitted = [
            axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(leaf.shape, spec)
        ]
        return NamedSharding(mesh, PartitionSpec(*fitted))

    rules = family_of(model.config).axes if rules is None else rules
    return jax.tree.map(fit, model.params, partition_specs(model.params, rules, mesh_axes))


def place_abstract(model: Model, mesh: Mesh) -> Model:
    """A model of shapes and dtypes, each with the sharding that it has on a mesh."""
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        model.params,
        shardings(model, mesh),
    )
    return model._replace(params=placed)
