"""Where the engine's arrays lie, and the results of its programs: beside the parameters.

On one device nothing is said, or what the parameters are committed to. On a mesh the cache is cut by the
heads of keys and values, the bank as the weights beside which its vectors stand, and all else is whole on
every device. All of it is committed once: a program finds its arguments where it wants them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.mixing.bank import write
from flora_jax.mixing.ragged import TargetBank
from flora_jax.mixing.split import place_bank
from flora_jax.models.cache import LayerCache
from flora_jax.models.model import Model
from flora_jax.models.splits import Splits, splits_of

# What a program returns: the cache, or what every device has all of.
Result = Literal["cache", "whole"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Hashable; what is placed may be arrays or their shapes.

    Args:
        everywhere: a sharding of what is whole on every device; ``None`` leaves it to JAX.
        splits: how the devices of a mesh share the model; ``None`` on one device.
        allocate: without it everything has shapes in place of arrays.
    """

    everywhere: Any = None
    splits: Splits | None = None
    allocate: bool = True

    def make(self, function: Callable[[], Any]) -> Any:
        """What ``function`` makes, the cache of it in its place and the rest everywhere."""
        if self.allocate and self.splits is None:
            return self.put(function())
        shapes = jax.eval_shape(function)
        places = jax.tree.map(self._place, shapes, is_leaf=_is_cache)
        if not self.allocate:
            return _placed_shapes(shapes, places)
        # Made where it lies: no device could hold the whole cache.
        return jax.jit(function, out_shardings=places)()

    def put(self, tree: Any) -> Any:
        """Small arrays, or their shapes, whole on every device."""
        if self.everywhere is None:
            return tree
        leaves = jax.tree.leaves(tree)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return _placed_shapes(tree, jax.tree.map(lambda _: self.everywhere, tree))
        return jax.device_put(tree, self.everywhere)

    def empty_bank(self, make: Callable[..., Any]) -> Any:
        """The bank of ``make(put=…)``, :func:`flora_jax.mixing.bank.empty_layers`."""
        if self.allocate:
            return make(put=self._bank)
        layers = jax.eval_shape(make)
        return tuple(
            {target: self._bank(target, own) for target, own in one.items()} for one in layers
        )

    def _bank(self, target: str, bank: TargetBank) -> TargetBank:
        """One projection's bank of a layer, in its place."""
        places = self._bank_places(target, bank)
        if places is None:
            return bank
        found: TargetBank = (jax.device_put if self.allocate else _placed_shapes)(bank, places)
        return found

    def writing(self, layers: Any) -> Callable[..., Any]:
        """:func:`flora_jax.mixing.bank.write` for such a bank."""
        if self.splits is None:
            return write
        leaves, structure = jax.tree.flatten(
            tuple(
                {target: self._bank_places(target, bank) for target, bank in layer.items()}
                for layer in layers
            )
        )
        return _writing(structure, tuple(leaves))

    def results(self, roles: tuple[Result, ...]) -> Any:
        """The shardings of a program's results; ``None`` where XLA has no choice."""
        if self.splits is None:
            return None
        places = {"cache": self.splits.cache, "whole": self.everywhere}
        found = tuple(places[role] for role in roles)
        return found if len(found) > 1 else found[0]

    def _place(self, leaf: Any) -> Any:
        if not _is_cache(leaf):
            return self.everywhere
        place = self.everywhere if self.splits is None else self.splits.cache
        return jax.tree.map(lambda _: place, leaf)

    def _bank_places(self, target: str, bank: TargetBank) -> Any:
        if self.splits is not None:
            return place_bank(bank, self.splits.cuts()[target])
        if self.everywhere is None:
            return None
        return jax.tree.map(lambda _: self.everywhere, bank)


# Where JAX puts what nothing is said of.
ANYWHERE = Placement()


def placement_of(model: Model, *, allocate: bool = True) -> Placement:
    """Beside the model's parameters, arrays or shapes.

    Raises:
        InputError: see :func:`flora_jax.models.splits.splits_of`.
    """
    splits, leaf = splits_of(model), model.embedding
    if splits is not None:
        return Placement(splits.everywhere, splits, allocate)
    if not allocate or not leaf.committed:
        return Placement(None, None, allocate)
    if isinstance(leaf.sharding, NamedSharding):
        return Placement(NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    return Placement(leaf.sharding)


@cache
def _writing(structure: Any, places: tuple[Any, ...]) -> Callable[..., Any]:
    function: Any = write
    written = jax.tree.unflatten(structure, places)
    return jax.jit(function.__wrapped__, donate_argnames="layers", out_shardings=written)


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, LayerCache)


def _placed_shapes(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
