"""What ``flora-jax bench layer`` measures: one projection, its shapes, kinds, forms and ranks."""

from __future__ import annotations

import dataclasses
from typing import get_args

from flora_jax.adapters.projections import match_targets
from flora_jax.adapters.registry import TRAITS
from flora_jax.errors import InputError
from flora_jax.models.family import presets
from flora_jax.weights.quantized import Method

BASE = "base"
PLAIN = "plain"
FORMS = ("einsum", "vmap", "batched", "ragged", "merged")
LAYOUTS = ("auto", "inputs", "outputs")
DTYPES = ("float32", "bfloat16", "float16")
ALL_KINDS = (BASE, *TRAITS)
# Kind, form and rank; the base has no rank.
Case = tuple[str, str, int | None]
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """A projection ``[inputs, outputs]`` over ``batch`` rows of ``length`` tokens, an adapter per row.

    ``kinds`` are of :data:`ALL_KINDS`, ``forms`` of :data:`FORMS`; the base has the form "plain" whatever
    is asked for, and IA3 its one rank. ``quantize`` is the base weight's, "none", "int8" or
    "int4"; ``layout`` how it is held where it is not quantised: "inputs" first (``[I, O]``), "outputs"
    first, or "auto", as models have it: by outputs. ``memory_gib`` bounds what one measurement
    may hold; ``None`` is half of what the device has free. ``measure_limits`` also measures the machine's
    bandwidth and best product rate.

    Raises:
        InputError: a value out of its range, with the option's name.
    """

    inputs: int
    outputs: int
    batch: int = 16
    length: int = 1
    ranks: tuple[int, ...] = RANKS
    kinds: tuple[str, ...] = ALL_KINDS
    forms: tuple[str, ...] = FORMS
    dtype: str = "float32"
    quantize: str = "none"
    layout: str = "auto"
    repeats: int = 7
    memory_gib: float | None = None
    measure_limits: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "batch", "length", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise InputError(
                f"--ranks is {_listed(self.ranks)}, expected different ranks from 1 up"
            )
        _check_names("kinds", self.kinds, ALL_KINDS)
        _check_names("forms", self.forms, FORMS)
        _check_names("dtype", (self.dtype,), DTYPES)
        _check_names("quantize", (self.quantize,), ("none", *get_args(Method)))
        _check_names("layout", (self.layout,), LAYOUTS)
        if self.layout == "outputs" and self.quantize != "none":
            raise InputError("--layout is outputs, expected auto or inputs with --quantize")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}, expected 0 to 2^32 - 1")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise InputError(f"--memory-limit is {self.memory_gib}, expected GiB above 0")

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def cases(self) -> list[Case]:
        """Kind, form and rank of everything to measure, small ranks first."""
        found: list[Case] = []
        if BASE in self.kinds:
            found.append((BASE, PLAIN, None))
        kinds = [kind for kind in self.kinds if kind != BASE]
        fixed = {kind: TRAITS[kind].fixed_rank for kind in kinds if TRAITS[kind].fixed_rank}
        kinds = [kind for kind in kinds if kind not in fixed]
        found += [(kind, form, rank) for kind, rank in fixed.items() for form in self.forms]
        return found + [(k, f, r) for r in sorted(self.ranks) for k in kinds for f in self.forms]


def _listed(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values)) or "empty"


def _check_names(option: str, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if not found or set(found) - set(expected) or len(set(found)) < len(found):
        raise InputError(f"--{option} is {_listed(found)}, expected of {', '.join(expected)}")


def parse_ranks(text: str) -> tuple[int, ...]:
    """``"1,2,4"`` as numbers.

    Raises:
        InputError: something else than numbers between commas.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"--ranks is {text!r}, expected numbers as in 1,2,4,8") from None


def projection_of(preset: str, target: str | None) -> tuple[int, int]:
    """Inputs and outputs of a preset's projection, named by the end of its path as in PEFT; the block's
    first where there is no name.

    Raises:
        InputError: no such preset, or not exactly one projection of that name.
    """
    known = presets()
    if preset not in known:
        raise InputError(f"--preset is {preset!r}, expected one of {', '.join(known)}")
    projections = known[preset].projections()
    targets = tuple(projections)[:1] if target is None else match_targets([target], projections)
    if len(targets) > 1:
        raise InputError(f"--target is {target!r}, expected one of {' and '.join(targets)}")
    return projections[targets[0]]
