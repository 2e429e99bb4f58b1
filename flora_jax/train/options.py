"""The options of a fine-tuning run: defaults, a file of options, their checks. No arrays here."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flora_jax.adapters.registry import TRAITS, options, owners
from flora_jax.errors import InputError

# What a run writes beside the adapters' directories.
RESERVED = ("checkpoints", "metrics.jsonl", "config.json", "data.json", "curve.png")

AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class TrainOptions(BaseModel):
    """What decides the result of a run, and how often it is looked at.

    The defaults are the paper's recipe: 1,500 steps of 8 rows, AdamW, the rate by kind. ``data`` and
    ``validation`` map an adapter's name to a file, a directory or a hub data set; the other fields
    are described by ``flora-jax train --help``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    kind: str
    data: dict[str, str]
    validation: dict[str, str] = {}
    rank: AtLeastOne = 1
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    init: str | None = None
    reduction: str | None = None
    alpha: Positive | None = None
    dropout: Share = 0.0
    steps: AtLeastOne = 1500
    batch_size: AtLeastOne = 8
    seq_len: AtLeastOne = 512
    accumulate: AtLeastOne = 1
    learning_rate: Positive | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    weight_decay: NotNegative = 0.0
    clip: Positive = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Literal["none", "int8", "int4"] = "none"
    remat: Literal["none", "products", "full"] = "none"
    mesh: str | None = None
    text_column: str | None = None
    max_corrupt: Share = 0.01
    eval_every: AtLeastOne = 250
    eval_windows: AtLeastOne | None = None
    save_every: AtLeastOne = 100
    keep: AtLeastOne = 2

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        own = self.learning_rate
        return TRAITS[self.kind].learning_rate if own is None else own

    @property
    def warmup(self) -> int:
        return min(100, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def rows(self) -> int:
        """Rows of a batch that belong to one adapter."""
        return self.batch_size // len(self.data)

    def effective(self, backend: str) -> Self:
        """The same with every value that a default left open, as it is on this JAX backend."""
        own = {
            option.name: getattr(self, option.name) or option.default(self.rank)
            for option in TRAITS[self.kind].options
        }
        dtype = self.dtype or ("float32" if backend == "cpu" else "bfloat16")
        filled = {"learning_rate": self.rate, "warmup_steps": self.warmup, "dtype": dtype} | own
        return self.model_copy(update=filled)

    def devices(self) -> tuple[int, int]:
        """The sizes of the mesh's axes "data" and "tensor"."""
        sizes = {"data": 1, "tensor": 1}
        parts = [] if self.mesh is None else [part.partition("=") for part in self.mesh.split(",")]
        axes = [axis for axis, _, _ in parts]
        for axis, _, size in parts:
            if axis not in sizes or axes.count(axis) > 1 or not size.isdecimal() or int(size) < 1:
                raise InputError(
                    f"mesh is {self.mesh!r}, expected data=N,tensor=M, both at least 1"
                )
            sizes[axis] = int(size)
        return sizes["data"], sizes["tensor"]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if not self.data:
            raise InputError("data is missing, expected at least one NAME=PATH")
        for name in self.data:
            if name in ("", ".", "..", *RESERVED) or "/" in name:
                raise InputError(f"data {name!r}: expected a name that its directory can have")
        for name in self.validation.keys() - self.data.keys():
            raise InputError(f"validation {name!r}: expected one of data's, {', '.join(self.data)}")
        return self

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind not in TRAITS:
            raise InputError(f"kind is {self.kind!r}, expected one of {', '.join(TRAITS)}")
        for name, option in options().items():
            value, kinds = getattr(self, name), owners(name)
            if not value:
                continue
            if self.kind not in kinds:
                raise InputError(f"{name} belongs to {' and '.join(kinds)}, found {self.kind}")
            if option.choices and value not in option.choices:
                expected = ", ".join(option.choices)
                raise InputError(f"{name} is {value!r}, expected one of {expected}")
            if self.rank < (least := option.least_rank.get(value, 1)):
                raise InputError(
                    f"rank is {self.rank}, expected {least} or more with {name} {value}"
                )
        if (problem := TRAITS[self.kind].rank_problem(self.rank)) is not None:
            raise InputError(f"rank is {self.rank}, expected {problem} for {self.kind}")
        return self

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.batch_size % len(self.data):
            raise InputError(
                f"batch_size is {self.batch_size}, expected a multiple of the {len(self.data)} "
                "adapters"
            )
        if self.rows % self.accumulate:
            raise InputError(
                f"accumulate is {self.accumulate}, expected a divisor of the {self.rows} rows that "
                "an adapter has in a batch"
            )
        part, data = self.rows // self.accumulate, self.devices()[0]
        if part % data:
            raise InputError(
                f"mesh splits rows over {data} devices, but an adapter has {part} rows in a pass"
            )
        return self


def read_file(path: Path) -> dict[str, Any]:
    """The options of a ``.toml`` or ``.json`` file, named as the fields or as on the command line.

    Raises:
        InputError: the file is damaged or of another type.
    """
    if path.suffix not in (".toml", ".json"):
        raise InputError(f"{path}: expected a .toml or a .json file")
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: found a {type(found).__name__}, expected a table of options")
    return {name.replace("-", "_"): value for name, value in found.items()}


def make_options(values: Mapping[str, Any]) -> TrainOptions:
    """The checked options; ``targets`` may also be one comma-separated string.

    Raises:
        InputError: one is missing, unknown, of another type or out of range; all are named.
    """
    values = dict(values)
    if isinstance(values.get("targets"), str):
        values["targets"] = [name.strip() for name in values["targets"].split(",")]
    try:
        return TrainOptions(**values)
    except ValidationError as error:
        problems = []
        for found in error.errors():
            name = ".".join(map(str, found["loc"])) or "options"
            said = str(found["ctx"]["error"]) if found["type"] == "value_error" else ""
            value = "" if found["type"] == "missing" else f" (found {found['input']!r})"
            problems.append(said or f"{name}: {found['msg']}{value}")
        raise InputError("; ".join(problems)) from None
