"""An adapter of one kind as one of another: the same weights where there are such, else the nearest.

Knows nothing of models: it is given the base's weights and biases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.kind import KINDS, ROUNDING, kind_of
from flora_jax.adapters.model_adapter import ModelAdapter, WeightsOf
from flora_jax.adapters.registry import convertible
from flora_jax.errors import InputError
from flora_jax.peft.format import FORMATS
from flora_jax.terminal import progress
from flora_jax.weights.product import explicit

Module = tuple[int, str]
# Of each projection's inputs the mean squares ``[I]``, float32.
Moments = Mapping[Module, jax.Array]


class Base(NamedTuple):
    """What an adapter stands on: the weight of a layer's target, and its bias ``[O]`` or ``None``."""

    weights: WeightsOf
    biases: Callable[[int, str], Any]


class Difference(NamedTuple):
    """What a conversion left of one projection.

    Args:
        change: ``‖W_from - W‖ / ‖W‖``, how far the adapter moves the weight.
        weight: ``‖W_to - W_from‖ / ‖W_from - W‖``: 0 is the same, 1 no better than no adapter.
        bias: ``‖bias_to - bias_from‖ / ‖bias‖``.

    With input moments ``m`` (see :func:`convert`) all norms of weights are weighted with them: they are
    then those of outputs whose inputs are independent.
    """

    change: float
    weight: float
    bias: float


class Converted(NamedTuple):
    """An adapter as one of another kind.

    Args:
        adapter: what was made.
        differences: what is different, by projection.
        exact: the projections of which nothing is.
        moments: what differences are weighted with; ``None`` where none were asked for or given.
    """

    adapter: ModelAdapter
    differences: Mapping[Module, Difference]
    exact: frozenset[Module]
    moments: Moments | None = None

    @property
    def total(self) -> float:
        """See :func:`total_of`."""
        return total_of(self.differences)


def total_of(differences: Mapping[Module, Difference]) -> float:
    """:attr:`Difference.weight` over all projections: of the squares of changes what is left."""
    squares = [(one.change, one.change * one.weight) for one in differences.values()]
    changed = sum(change**2 for change, _ in squares)
    return math.sqrt(sum(left**2 for _, left in squares) / changed) if changed else 0.0


def convert(
    adapter: ModelAdapter,
    to: str,
    base: Base,
    *,
    rank: int | None = None,
    approximate: bool = False,
    moments: Callable[[], Moments] | None = None,
    seed: int = 0,
    named: str = "approximate",
) -> Converted:
    """``adapter`` as one of kind ``to``.

    Exact, to float32's rounding, where the kind has the same weights: HiRA r as FLoRA r + 1, FLoRA r as
    HiRA r + 1 (r - 1 where a component is ones), LoRA r as DoRA r, IA3 as FLoRA or HiRA r 1 but for an
    output's bias, which IA3 scales. Else, where ``approximate``, the nearest in least squares.

    Args:
        adapter: of another kind, or of the same where its rank is to be smaller.
        to: one of :func:`.registry.convertible`.
        base: what it stands on.
        rank: at most, and no more than a weight's smaller side; ``None`` is what the exact conversion
            has, and the adapter's own elsewhere.
        approximate: whether it may differ.
        moments: gives the moments of the inputs, so that the outputs' error counts; called once, and
            only where something differs.
        seed: of the random starts.
        named: what messages call ``approximate``.

    Raises:
        InputError: another kind, or there is no exact conversion and ``approximate`` is not asked for:
            says why.
    """
    if to not in convertible():
        raise InputError(f"kind {to!r}: expected one of {', '.join(convertible())}")
    wanted = _Wanted(to, base, rank, approximate, seed, named)
    modules = adapter.modules()
    exactly = {module: wanted.exactly(params, module) for module, params in modules.items()}
    exact = frozenset(module for module, own in exactly.items() if own.lacks is None)
    taken = moments() if moments is not None and len(exact) < len(modules) else None
    layers: list[dict[str, Any]] = [{} for _ in adapter.layers]
    differences = {}
    with progress("projections", len(modules)) as bar:
        for module, params in modules.items():
            same = exactly.pop(module).params
            found, differences[module] = wanted.of(params, module, same, taken)
            layer, target = module
            layers[layer][target] = found
            bar.advance()
    kept = {name: adapter.settings[name] for name in FORMATS[to].kept if name in adapter.settings}
    made = ModelAdapter(to, tuple(layers), kept, projections=adapter.projections)
    return Converted(made, differences, exact, taken)


def differences(
    source: ModelAdapter, made: ModelAdapter, base: Base, moments: Moments | None = None
) -> dict[Module, Difference]:
    """What ``made``, an adapter on the same projections, has other than ``source``."""
    own = made.modules()
    found = {}
    for module, params in source.modules().items():
        W_IO, bias_O = _wide(base, module)
        wanted = kind_of(params).merge(params, W_IO, bias_O)
        moments_I = None if moments is None else moments[module]
        found[module] = _difference(own[module], wanted, W_IO, bias_O, moments_I)
    return found


class _Exactly(NamedTuple):
    """What a kind has with the same weight as a projection's adapter.

    Args:
        params: factors of that weight; ``None`` where there are none.
        lacks: what is not the same, the bias where there are factors; ``None`` where nothing is.
    """

    params: Any | None
    lacks: str | None = None


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a projection's factors are to become; the arguments of :func:`convert`."""

    to: str
    base: Base
    rank: int | None
    approximate: bool
    seed: int
    named: str

    def exactly(self, params: Any, module: Module) -> _Exactly:
        """What there is of the same weight.

        Raises:
            InputError: something is not the same, and it may not differ.
        """
        found = self._of_components(params, module)
        if found.lacks is not None and not self.approximate:
            layer, target = module
            raise InputError(
                f"layer {layer} {target}: no {self.to} is the same: {found.lacks}; "
                f"the nearest can be asked for ({self.named})"
            )
        return found

    def _of_components(self, params: Any, module: Module) -> _Exactly:
        kind = KINDS[self.to]
        assert kind.of_components is not None
        weight = partial(self.base.weights, *module)
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
        inputs, outputs = weight().shape
        components = kind_of(params).components(wide, inputs, outputs, weight)
        try:
            found = kind.of_components(components, weight)
        except ValueError as error:
            return _Exactly(None, str(error))
        if self.rank is not None and kind.rank(found) > self.rank:
            rank = kind.rank(found)
            return _Exactly(None, f"that has rank {rank}, at most {self.rank} is asked for")
        has_bias = self.base.biases(*module) is not None
        if has_bias and components.bias_scale_O is not None and not kind.traits.scales_bias:
            return _Exactly(found, f"it scales the bias, and a {self.to} leaves it")
        return _Exactly(found)

    def of(
        self, params: Any, module: Module, same: Any | None, moments: Moments | None
    ) -> tuple[Any, Difference]:
        """``same``, or the nearest where there are no such factors, and what then is different."""
        W_IO, bias_O = _wide(self.base, module)
        wanted = kind_of(params).merge(params, W_IO, bias_O)
        moments_I = None if moments is None else moments[module]
        made = same
        if made is None:
            kind = KINDS[self.to]
            assert kind.nearest is not None
            rank = min(self.rank or kind_of(params).rank(params), *W_IO.shape)
            key = jax.random.fold_in(jax.random.key(self.seed), module[0])
            weights_I = jnp.ones(len(W_IO)) if moments_I is None else moments_I
            made = kind.nearest(W_IO, wanted[0], rank, weights_I, key)
        return made, _difference(made, wanted, W_IO, bias_O, moments_I)


def _wide(base: Base, module: Module) -> tuple[jax.Array, jax.Array | None]:
    """The base's weight and bias in float32."""
    bias_O = base.biases(*module)
    return (
        explicit(base.weights(*module), jnp.float32),
        None if bias_O is None else jnp.asarray(bias_O, jnp.float32),
    )


def _difference(
    made: Any,
    wanted: tuple[jax.Array, jax.Array | None],
    W_IO: jax.Array,
    bias_O: jax.Array | None,
    moments_I: jax.Array | None,
) -> Difference:
    """Of factors from the weight and bias that were wanted, all float32."""
    (from_IO, from_O), (to_IO, to_O) = wanted, kind_of(made).merge(made, W_IO, bias_O)
    root_I1 = jnp.ones((len(W_IO), 1)) if moments_I is None else jnp.sqrt(moments_I)[:, None]

    def share(part: jax.Array, whole: jax.Array, rounding: float = 0.0) -> float:
        size = float(jnp.linalg.norm(whole))
        left = float(jnp.linalg.norm(part))
        return left / size if size > rounding else float(left > rounding)

    moved_IO, base_IO = root_I1 * (from_IO - W_IO), root_I1 * W_IO
    bias = 0.0
    if bias_O is not None and from_O is not None and to_O is not None:
        bias = share(to_O - from_O, bias_O)
    # An adapter that moves nothing is met by whatever rounds as the weight does.
    rounding = ROUNDING * float(jnp.linalg.norm(base_IO))
    left = share(root_I1 * (to_IO - from_IO), moved_IO, rounding)
    return Difference(share(moved_IO, base_IO), left, bias)
