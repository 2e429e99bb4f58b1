"""How an adapter folder of one kind looks: its config's fields and its tensors, a record for each kind.

A record stands in ``formats/<name>.py`` under the kind's name; a folder is told by its ``peft_type`` and,
where two kinds share one, by ``marks``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flora_jax.adapters.registry import TRAITS

if TYPE_CHECKING:
    from flora_jax.peft.config import AdapterConfig, Fields

# By (layer, target) one projection's factors.
Modules = Mapping[tuple[int, str], Any]
# Gives the commonest of the modules' values, and the pattern of what differs from it.
Pattern = Callable[[Mapping[tuple[int, str], Any]], tuple[Any, dict[str, Any]]]


class Leaf(NamedTuple):
    """A tensor of each adapted module: ``I`` inputs, ``O`` outputs, ``R`` the rank, ``1`` one.

    ``on_inputs`` are its axes where the module's inputs are scaled, of a kind that scales either.
    """

    name: str
    axes: str
    on_inputs: str | None = None

    def shape(self, inputs: int, outputs: int, rank: int, on_inputs: bool) -> tuple[int, ...]:
        sizes = {"I": inputs, "O": outputs, "R": rank, "1": 1}
        axes = self.on_inputs if on_inputs and self.on_inputs else self.axes
        return tuple(sizes[axis] for axis in axes)

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int] | None:
        """What a shape tells: sizes by axis; ``None`` where this tensor cannot have the shape."""
        for axes in filter(None, (self.on_inputs, self.axes)):
            ones = [size for axis, size in zip(axes, shape) if axis == "1"]
            if len(axes) == len(shape) and set(ones) <= {1}:
                return dict(zip(axes, shape))
        return None


class Module(NamedTuple):
    """One adapted projection of a folder that is read."""

    path: str
    rank: int
    on_inputs: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Format:
    """The folder of a kind.

    Args:
        kind: its name.
        peft_type: the config's ``peft_type``.
        leaves: the tensors of a module, input side first.
        from_tensors: ``(config, module, arrays) -> params``, of float32 arrays in this order.
        to_tensors: ``params -> arrays``, the reverse.
        fields: names of the config's fields that ``read`` takes, separated by spaces.
        read: what they say, for :attr:`AdapterConfig.own`; problems go on the list of ``Fields``.
        write: ``(modules, settings, pattern) -> fields``, the reverse; ``ValueError`` says what no config
            can say.
        settings: further fields that are kept with the adapter and written back.
        without_effect: fields that are passed over.
        refused: why a field cannot be honoured, by name.
        marks: values of fields by which folders of this kind are told from others of one ``peft_type``.
        has_rank: whether the config has ``r``, ``rank_pattern`` and a choice of layers.
        rank: ``(rank of the config's patterns, the config's r, first tensor's shape or None) -> rank``.
        placed_by: the field that names the modules whose inputs are scaled, of a kind that scales either.
        on_inputs: whether ``params`` scale inputs.
    """

    kind: str
    peft_type: str
    leaves: tuple[Leaf, ...]
    from_tensors: Callable[[AdapterConfig, Module, Sequence[Any]], Any]
    to_tensors: Callable[[Any], tuple[np.ndarray, ...]]
    fields: str = ""
    read: Callable[[Fields], dict[str, Any]] = lambda fields: {}
    write: Callable[[Modules, Mapping[str, Any], Pattern], dict[str, Any]] = (
        lambda modules, settings, pattern: {}
    )
    settings: str = ""
    without_effect: str = ""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    marks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_rank: bool = True
    rank: Callable[[int, int, tuple[int, ...] | None], int] = lambda patterns, r, first: patterns
    placed_by: str | None = None
    on_inputs: Callable[[Any], bool] = lambda params: False

    @property
    def kept(self) -> tuple[str, ...]:
        """All fields that are kept with an adapter and written back."""
        return ("base_model_name_or_path", "revision", "task_type", *self.settings.split())

    @property
    def known(self) -> set[str]:
        """All fields that a config of this kind may have, beside those that every config has."""
        ranked = "r rank_pattern layers_to_transform layers_pattern" if self.has_rank else ""
        placed = self.placed_by or ""
        names = f"{ranked} {placed} {self.fields} {self.without_effect}".split()
        return {*names, *self.kept, *self.marks}


class _Formats(Mapping[str, Format]):
    """By kind, each imported when it is asked for."""

    def __getitem__(self, kind: str) -> Format:
        if kind not in TRAITS:
            raise KeyError(kind)
        found: Format = importlib.import_module(f"flora_jax.peft.formats.{kind}").FORMAT
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(TRAITS)

    def __len__(self) -> int:
        return len(TRAITS)


FORMATS: Mapping[str, Format] = _Formats()


def peft_types() -> tuple[str, ...]:
    """Every ``peft_type`` that is read."""
    return tuple(dict.fromkeys(found.peft_type for found in FORMATS.values()))


def format_of(raw: Mapping[str, Any]) -> Format | None:
    """The format of a config's JSON object; of two that fit, the one with more marks."""
    fitting = [
        found
        for found in FORMATS.values()
        if raw.get("peft_type") == found.peft_type and all(map(raw.get, found.marks))
    ]
    return max(fitting, key=lambda found: len(found.marks), default=None)


def wide(factor: Any) -> np.ndarray:
    """A factor in float32 on the host."""
    return np.asarray(factor).astype(np.float32)
