"""Rotary positions: their settings, read from config.json, and the frequencies that follow from them.

A scaling is one class with its own frequencies and a line in :data:`SCALINGS`. Knows nothing of JAX's
arrays: the rotation itself is in :mod:`flora_jax.models.self_attention`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from flora_jax.errors import InputError

# The fields of config.json that :func:`read_rotary` takes care of.
ROTARY_FIELDS = frozenset(
    (
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    )
)


def plain_frequencies(base: float, dim: int) -> np.ndarray:
    """``base ** (-2i/dim)``, float32 ``[dim/2]``, rounded where PyTorch rounds."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.power(base, exponents.astype(np.float64)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How positions are turned: plainly, or changed for longer contexts. This one is plain.

    The fields of a scaling are those of transformers' ``rope_parameters``. Among them
    ``original_max_position_embeddings`` is the context that the model was first trained with.
    """

    rope_type: ClassVar[str] = "default"
    # Whether the factor is the ratio of the two contexts where none is given.
    factor_follows: ClassVar[bool] = False

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        """Radians per position, float32 ``[dim/2]``."""
        return plain_frequencies(base, dim)

    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        return 1.0

    def longest(self, positions: int) -> int:
        """The longest sequence of a model whose ``max_position_embeddings`` is ``positions``."""
        return positions


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """Positions divided by ``factor``."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        """See :class:`Scaling`."""
        return plain_frequencies(base, dim) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Dynamic(Scaling):
    """Plain rotation within the original context, and no further.

    Beyond it the base grows with the longest row of a batch: what a row gives would depend on its
    neighbours, and keys in the cache would have been turned by another base than the queries.
    """

    rope_type: ClassVar[str] = "dynamic"
    factor: float
    original_max_position_embeddings: int

    def longest(self, positions: int) -> int:
        """See :class:`Scaling`: within the original context."""
        return min(positions, self.original_max_position_embeddings)


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Slow frequencies divided by ``factor``, fast ones kept, those between interpolated."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not self.high_freq_factor > self.low_freq_factor:
            raise InputError(
                f"high_freq_factor is {self.high_freq_factor}, expected more than low_freq_factor, "
                f"{self.low_freq_factor}"
            )

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        """See :class:`Scaling`."""
        plain = plain_frequencies(base, dim)
        turns = np.float32(self.original_max_position_embeddings) / (np.float32(2 * np.pi) / plain)
        share = (turns - np.float32(self.low_freq_factor)) / np.float32(
            self.high_freq_factor - self.low_freq_factor
        )
        kept = np.clip(share, np.float32(0), np.float32(1))
        return (np.float32(1) - kept) * plain / np.float32(self.factor) + kept * plain


@dataclasses.dataclass(frozen=True)
class Yarn(Scaling):
    """Frequencies below ``beta_slow`` turns in the original context divided by ``factor``, those above
    ``beta_fast`` kept, a ramp between; cosine and sine grow with the logarithm of the factor.
    """

    rope_type: ClassVar[str] = "yarn"
    factor_follows: ClassVar[bool] = True
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        """See :class:`Scaling`."""
        first, last = (self._pair(turns, base, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        width = (last - first) or 0.001
        ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
        kept = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
        plain = plain_frequencies(base, dim)
        return plain / np.float32(self.factor) * (np.float32(1) - kept) + plain * kept

    def _pair(self, turns: float, base: float, dim: int) -> float:
        """Which pair of numbers makes so many turns in the original context."""
        wave = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wave) / (2 * math.log(base))

    def amplitude(self) -> float:
        """See :class:`Scaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    def _grown(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def longest(self, positions: int) -> int:
        """See :class:`Scaling`: as far as the factor carries the original context."""
        return max(positions, math.floor(self.factor * self.original_max_position_embeddings))


SCALINGS: Mapping[str, type[Scaling]] = {
    kind.rope_type: kind for kind in (Scaling, Linear, Dynamic, Llama3, Yarn)
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of a model: ``base`` of the frequencies and how they are scaled."""

    base: float = 10000.0
    scaling: Scaling = Scaling()

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of a head of ``dim`` numbers, float32 ``[dim/2]``."""
        return self.scaling.frequencies(self.base, dim)

    def to_dict(self) -> dict[str, Any]:
        """The fields of config.json, as transformers 5 reads them and as 4 did."""
        values = {
            name: value
            for name, value in dataclasses.asdict(self.scaling).items()
            if value is not None
        }
        scaling = {"rope_type": self.scaling.rope_type, **values}
        return {
            "rope_parameters": {"rope_theta": self.base, **scaling},
            "rope_theta": self.base,
            "rope_scaling": scaling if values else None,
        }


def read_rotary(raw: Mapping[str, Any], positions: int, base: float = 10000.0) -> Rotary:
    """The rotary positions of config.json's object, by transformers' rules.

    They stand in ``rope_parameters``, or in ``rope_scaling`` (its kind as ``rope_type`` or ``type``)
    beside ``rope_theta``.

    Args:
        raw: config.json's object.
        positions: its ``max_position_embeddings``.
        base: of the frequencies where nothing names one.

    Raises:
        InputError: a kind or a field that is unknown, a value that cannot be, two that contradict one
            another, or a rotation of a part of the head only.
    """
    given, where = _given(raw)
    theta = _one_of(
        {"rope_theta": raw.get("rope_theta"), f"{where}.rope_theta": given.pop("rope_theta", None)}
    )
    base = _number("rope_theta", base if theta is None else theta)
    part = _one_of(
        {
            name: fields.get("partial_rotary_factor")
            for name, fields in (("config", raw), (where, given))
        }
    )
    given.pop("partial_rotary_factor", None)
    if part not in (None, 1.0):
        raise InputError(f"partial_rotary_factor is {part!r}, only 1.0 is supported")
    kind = _one_of(
        {
            f"{where}.rope_type": given.pop("rope_type", None),
            f"{where}.type": given.pop("type", None),
        }
    )
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise InputError(f"{where}.rope_type is {kind!r}, expected one of {', '.join(SCALINGS)}")
    return Rotary(base, _scaling(SCALINGS[kind], given, raw, positions, where))


def _given(raw: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The fields of the scaling with the name of the field that has them; both may be there, if equal."""
    found = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}
    for name, fields in found.items():
        if not isinstance(fields, Mapping):
            raise InputError(f"{name} is {fields!r}, expected an object")
    if len(found) == 2:
        new, old = ({k: v for k, v in found[name].items() if v is not None} for name in found)
        for fields in (new, old):
            fields["rope_type"] = fields.pop("type", None) or fields.get("rope_type")
        for name in sorted({*new, *old} - {"rope_theta"}):
            if new.get(name) != old.get(name):
                raise InputError(
                    f"rope_scaling.{name} is {old.get(name)!r}, but rope_parameters has "
                    f"{new.get(name)!r}"
                )
    name = next(iter(found), "rope_parameters")
    return dict(found.get(name, {})), name


def _scaling(
    kind: type[Scaling], given: dict[str, Any], raw: Mapping[str, Any], positions: int, where: str
) -> Scaling:
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [f"{k}={v!r}" for k, v in given.items() if k not in known and v is not None]
    if unknown:
        raise InputError(
            f"{where}: fields of unknown effect under {kind.rope_type}: {', '.join(sorted(unknown))}"
        )
    name = "original_max_position_embeddings"
    if name in known:
        stated = _one_of({name: raw.get(name), f"{where}.{name}": given.get(name)})
        given[name] = positions if stated is None else stated
        if given.get("factor") is None and kind.factor_follows:
            given["factor"] = positions / _count(f"{where}.{name}", given[name])
    values = {k: v for k, v in given.items() if v is not None}
    for field in known.values():
        label = f"{where}.{field.name}"
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise InputError(f"{label} is missing, expected for {kind.rope_type}")
            continue
        values[field.name] = _CHECKS[str(field.type)](label, values[field.name])
    return kind(**values)


def _one_of(stated: Mapping[str, Any]) -> Any:
    """The value that one of several places states, or all that do; ``None`` where none does."""
    found = {name: value for name, value in stated.items() if value is not None}
    values = list(found.values())
    if values and any(value != values[0] for value in values):
        said = " but ".join(f"{name} is {value!r}" for name, value in found.items())
        raise InputError(f"{said}, expected the same")
    return values[0] if values else None


def _number(name: str, value: Any) -> float:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fine or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}, expected a number above 0")
    return float(value)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}, expected a positive integer")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}, expected true or false")
    return value


# By the annotation of a scaling's field.
_CHECKS = {"float": _number, "float | None": _number, "int": _count, "bool": _flag}
