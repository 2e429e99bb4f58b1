"""The interface of an adapter kind, and what every kind reduces to: rank-1 components.

Factors are leaves of a frozen dataclass. Without a leading axis, as ``[R, I]``, they belong to one
adapter; with one, as ``[B, R, I]``, row ``b`` of a batch uses adapter ``b``. Kinds with a low-rank
product call its input side ``down [R, I]`` and its output side ``up [R, O]``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.registry import TRAITS, Traits
from flora_jax.weights import product
from flora_jax.weights.product import Weight

Side = Literal["output", "input"]
# What float32 makes of a sum that is one.
ROUNDING = 1e-6
# Gives the base weight of the projection that an adapter is on, as it is held.
WeightOf = Callable[[], Weight]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Components:
    """One adapter on one projection as pairs of float32 vectors on the host, its scale already in
    ``post`` and ``up``.

    ``W_i = W ∘ Σ_r pre_r post_rᵀ + Σ_r down_r up_rᵀ`` and
    ``bias_i = bias + bias_scale ∘ bias``; ``bias_scale`` is ``None`` where the bias stays.
    """

    pre_RI: np.ndarray
    post_RO: np.ndarray
    down_RI: np.ndarray
    up_RO: np.ndarray
    bias_scale_O: np.ndarray | None = None


def constant_part(components: Components) -> tuple[float, np.ndarray, np.ndarray]:
    """The sum of the multiplicative pairs that are constant, and ``pre`` and ``post`` of the others."""
    pre_RI, post_RO = components.pre_RI, components.post_RO
    same_R = (np.ptp(pre_RI, axis=1) == 0) & (np.ptp(post_RO, axis=1) == 0)
    constant = float(np.sum(pre_RI[same_R, 0] * post_RO[same_R, 0]))
    return constant, pre_RI[~same_R], post_RO[~same_R]


def adds(components: Components) -> bool:
    """Whether some additive pair is not zero."""
    return bool(components.up_RO[components.down_RI.any(axis=1)].any())


def additive_part(components: Components) -> tuple[np.ndarray, np.ndarray]:
    """``down`` and ``up`` of the additive pairs: one of zeros where there is none, as no rank is 0."""
    down_RI, up_RO = components.down_RI, components.up_RO
    if len(down_RI):
        return down_RI, up_RO
    return zeros(1, down_RI.shape[1]), zeros(1, up_RO.shape[1])


def rank_of_up(params: Any) -> int:
    """``R`` of ``up [R, O]``, batched or not."""
    return int(params.up_RO.shape[-2])


def widths_of_sides(params: Any) -> list[tuple[Side, int]]:
    """``I`` and ``O`` of ``down [R, I]`` and ``up [R, O]``, batched or not."""
    return [("input", params.down_RI.shape[-1]), ("output", params.up_RO.shape[-1])]


def is_up_batched(params: Any) -> bool:
    return params.up_RO.ndim == 3


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """A kind of adapter as pure functions over its parameter dataclass ``type``.

    Arithmetic, with ``y = x @ W + bias`` in the dtype of ``x`` (see the design's table of kinds):

    - ``init(key, inputs, outputs, rank, *, weight, …) -> params``, the identity; further keywords are
      the kind's options (``Traits.options``) and what ``placed`` gives;
    - ``apply(params_B, x_BTI, W_IO, bias_O) -> y_BTO`` with one adapter per row, by einsum;
    - ``apply_one(params, x_TI, W_IO, bias_O) -> y_TO``, the same for one example, for ``jax.vmap``;
    - ``merge(params, W_IO, bias_O) -> (W_IO, bias_O)``, the explicit weight of one adapter;
    - ``components(params, inputs, outputs, weight) -> Components``, of factors on the host or a device;
    - ``redraw(params, draw, spread) -> params``, other factors of the same shapes, ``spread`` away
      from the identity; ``draw(leaf, centre, deviation)`` gives normal numbers of a leaf's shape.

    ``weight`` is a function that gives the base weight where a kind asks for it, or ``None``; only a
    kind that ``needs_weight`` does, and raises ``ValueError`` without one.

    What it is made of:

    - ``rank(params)``; ``widths(params)``, pairs of side and width; ``is_batched(params)``, whether there
      is a leading axis;
    - ``freeze(updates) -> updates``: gradients or updates of ``params``' own structure with zeros for
      what is not trained;
    - ``placed(on_inputs) -> options`` of ``init`` on a projection whose inputs or outputs are scaled.

    Training, where a kind differs:

    - ``train_one(params, x_XI, W_IO, bias_O, own_XI, rounded) -> y_XO``: :attr:`apply_one` with
      ``own``, inputs of which some were dropped, float32, for the adapter's own part, or ``None`` for
      ``x`` itself; with ``rounded`` every product is one of the activations' dtype and gives it. A kind
      without this has no dropout;
    - ``apply_narrow``: :attr:`apply` of factors in the dtype of ``x``, as the paper's code has them,
      where its sums are rounded between products.

    Conversion, of a kind that others can become:

    - ``of_components(components, weight) -> params``, the same adapted weight; ``ValueError`` says why
      there is none of this kind. The bias is not its affair;
    - ``nearest(W_IO, wanted_IO, rank, moments_I, key) -> params``, of this rank with the least
      ``Σ_io moments_i (W_i - wanted)²`` that is found, all float32.

    Serving, of a kind that ``needs_weight``: ``rehearse(W_IO, rank)`` runs what ``components`` runs on a
    device for a weight of this shape and any rank up to ``rank``, so that it is compiled.
    """

    name: str
    type: type
    init: Callable[..., Any]
    apply: Callable[..., jax.Array]
    apply_one: Callable[..., jax.Array]
    merge: Callable[..., tuple[jax.Array, jax.Array | None]]
    components: Callable[[Any, int, int, WeightOf | None], Components]
    redraw: Callable[[Any, Callable[[Any, float, float], Any], float], Any]
    rank: Callable[[Any], int] = rank_of_up
    widths: Callable[[Any], Sequence[tuple[Side, int]]] = widths_of_sides
    is_batched: Callable[[Any], bool] = is_up_batched
    freeze: Callable[[Any], Any] = lambda updates: updates
    placed: Callable[[bool], Mapping[str, Any]] = lambda on_inputs: {}
    train_one: Callable[..., jax.Array] | None = None
    apply_narrow: Callable[..., jax.Array] | None = None
    of_components: Callable[[Components, WeightOf], Any] | None = None
    nearest: Callable[..., Any] | None = None
    rehearse: Callable[[Weight, int], None] | None = None

    def __post_init__(self) -> None:
        _KIND_OF[self.type] = self
        product.apply.register(self.type, _apply_uniform)

    @property
    def traits(self) -> Traits:
        """What is known of the kind without JAX."""
        return TRAITS[self.name]

    @property
    def needs_weight(self) -> bool:
        """Whether ``init`` and ``components`` ask for the base weight."""
        return self.rehearse is not None


_KIND_OF: dict[type, Kind] = {}


class _Kinds(Mapping[str, Kind]):
    """The kinds of the registry by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> Kind:
        if name not in TRAITS:
            raise KeyError(name)
        kind: Kind = importlib.import_module(f"flora_jax.adapters.{name}").KIND
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(TRAITS)

    def __len__(self) -> int:
        return len(TRAITS)


KINDS: Mapping[str, Kind] = _Kinds()


def kind_of(params: Any) -> Kind:
    """The kind that a parameter dataclass belongs to; ``KeyError`` for another type."""
    return _KIND_OF[type(params)]


def is_factors(node: Any) -> bool:
    """Whether a node of a pytree is a kind's parameter dataclass, such as :func:`kind_of` takes."""
    return type(node) in _KIND_OF


def _apply_uniform(
    params: Any, x_BTI: jax.Array, W_IO: Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """Factors without a batch axis are one adapter's, shared by every row."""
    kind = kind_of(params)
    if kind.is_batched(params):
        return kind.apply(params, x_BTI, W_IO, bias_O)
    flat_XI = x_BTI.reshape(-1, x_BTI.shape[-1])
    y_XO = kind.apply_one(params, flat_XI, W_IO, bias_O)
    return y_XO.reshape(*x_BTI.shape[:-1], W_IO.shape[1])


def apply_vmap(
    kind: Kind, params: Any, x_BTI: jax.Array, W_IO: Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    """``kind.apply`` written as ``jax.vmap`` of ``kind.apply_one``: ``[B, T, O]``."""
    return jax.vmap(kind.apply_one, in_axes=(0, 0, None, None))(params, x_BTI, W_IO, bias_O)


def stack(adapters: Sequence[Any]) -> Any:
    """Adapters of one kind, rank and configuration as one with a leading axis, for a batch.

    Raises:
        ValueError: they differ in kind, configuration or shape.
    """
    first = jax.tree.structure(adapters[0]), [leaf.shape for leaf in jax.tree.leaves(adapters[0])]
    for number, adapter in enumerate(adapters):
        found = jax.tree.structure(adapter), [leaf.shape for leaf in jax.tree.leaves(adapter)]
        if found != first:
            raise ValueError(
                f"adapter {number} is {found[0]} with shapes {found[1]}, "
                f"expected {first[0]} with {first[1]}; mix kinds and ranks in a ragged batch instead"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def ones(rank: int, features: int) -> np.ndarray:
    return np.ones((rank, features), np.float32)


def zeros(rank: int, features: int) -> np.ndarray:
    return np.zeros((rank, features), np.float32)


def uniform_fan_in(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Uniform within ``±1/sqrt(I)``, float32 ``[R, I]``: PEFT's start of LoRA's and HiRA's input side."""
    bound = shape[1] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
