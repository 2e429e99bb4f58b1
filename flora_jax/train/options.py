"""The options of a fine-tuning run: defaults, a file of options, their checks. No arrays here."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flora_jax.adapters.registry import TRAITS, options, owners
from flora_jax.errors import InputError
from flora_jax.files import LOCK

# What a run writes beside the adapters' directories.
CHECKPOINTS, METRICS, CONFIG, DATA, CURVE = (
    "checkpoints", "metrics.jsonl", "config.json", "data.json", "curve.png"
)  # fmt: skip
RESERVED = (CHECKPOINTS, METRICS, CONFIG, DATA, CURVE, LOCK)
# A file system's names have 255 bytes; while a folder is written, its name is longer by 14.
NAME_BYTES = 240
# Steps are counted in int32 on the device.
MOST_STEPS = 1_000_000_000
# More than any model's projection is wide; the model at hand has its own limit.
MOST_RANK = 65_536

Count = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Rows = Annotated[int, Field(ge=1, le=1_000_000)]
# The limits are those of float32, in which a step computes.
NotNegative = Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)]
_LEAST_RATE, _MOST_RATE = 1e-37, 1e38
Positive = Annotated[float, Field(ge=_LEAST_RATE, le=_MOST_RATE, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class TrainOptions(BaseModel):
    """What decides the result of a run, and how often it is looked at.

    The defaults are the paper's recipe: 1,500 steps of 8 rows, AdamW, the rate by kind and start.
    ``data`` and ``validation`` map an adapter's name to a file, a directory or a hub data set; the
    other fields are described by ``flora-jax train --help``.
    """

    # Strict: true is no integer, and "8" is none either.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    kind: str
    data: dict[str, str]
    validation: dict[str, str] = {}
    rank: Annotated[int, Field(ge=1, le=MOST_RANK)] = 1
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    init: str | None = None
    reduction: str | None = None
    alpha: Positive | None = None
    dropout: Share = 0.0
    steps: Count = 1500
    batch_size: Rows = 8
    seq_len: Rows = 512
    accumulate: Rows = 1
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
    eval_every: Count = 250
    eval_windows: Count | None = None
    save_every: Count = 100
    keep: Count = 2

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        own = self.learning_rate
        return TRAITS[self.kind].rate(partial(getattr, self)) if own is None else own

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
            raise InputError(f"data is missing, expected {_MISSING['data']}")
        for name in self.data:
            if why := _no_directory(name):
                shown = f"data {_shown(name)}"
                raise InputError(f"{shown}: expected a name that its directory can have, {why}")
        for name in sorted(self.validation.keys() - self.data.keys()):
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
    def _check_warmup(self) -> Self:
        if self.warmup > self.steps:
            raise InputError(
                f"warmup_steps is {self.warmup}, expected at most the {self.steps} steps of the run"
            )
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


def _no_directory(name: str) -> str | None:
    """Why no directory of a run can have the name of an adapter; ``None`` where one can."""
    if name in ("", ".", ".."):
        return "not an empty one and not one of dots"
    if name in RESERVED:
        return f"not {name}: the run itself writes that"
    if "/" in name or "\\" in name:
        return "without separators"
    if not name.isprintable():
        return "of printable characters"
    if name.endswith(".part"):
        return "not ending in .part, which is how half-written output is called"
    if (size := len(name.encode("utf-8", "surrogatepass"))) > NAME_BYTES:
        return f"of at most {NAME_BYTES} bytes, found {size}"
    return None


def read_file(path: Path) -> dict[str, Any]:
    """The options of a ``.toml`` or ``.json`` file, named as the fields or as on the command line.

    Raises:
        InputError: there is no such file, it cannot be read, is damaged or of another type, or names an
            option twice.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory, expected a .toml or a .json file")
    if path.suffix not in (".toml", ".json"):
        raise InputError(f"{path}: expected a .toml or a .json file")
    try:
        text = path.read_text(encoding="utf-8")
        found = (
            tomllib.loads(text)
            if path.suffix == ".toml"
            else json.loads(text, object_pairs_hook=_pairs)
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    except ValueError as error:  # TOML, JSON, UTF-8, or a key that is there twice.
        raise InputError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: found a {type(found).__name__}, expected a table of options")
    try:
        return _pairs([(name.replace("-", "_"), value) for name, value in found.items()])
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def make_options(
    values: Mapping[str, Any], origins: Mapping[str, Path] | None = None
) -> TrainOptions:
    """The checked options; ``targets`` may also be a list or one comma-separated string.

    Args:
        values: by the names of the fields.
        origins: the files that values come from, by option; a message about one starts with its file.

    Raises:
        InputError: one is missing, unknown, of another type or out of range; all are named.
    """
    try:
        return TrainOptions(**as_fields(values))
    except ValidationError as error:
        problems = [_problem(found) for found in error.errors()]
    where = origins or {}
    # Every message starts with the name of its option.
    files = [where.get(text.replace(".", " ").split()[0]) for text in problems]
    listed = [text if file is None else f"{file}: {text}" for file, text in zip(files, problems)]
    raise InputError("; ".join(listed))


def as_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with ``targets`` as the field has them."""
    targets = values.get("targets")
    if isinstance(targets, str):
        targets = [name.strip() for name in targets.split(",")]
    return dict(values) | ({"targets": tuple(targets)} if isinstance(targets, list) else {})


def parse_rates(text: str) -> tuple[float, ...]:
    """Learning rates in one comma-separated string, as ``1e-3,3e-3``; see :func:`check_rates`.

    Raises:
        InputError: one is no number, or not what is expected of them.
    """
    rates = []
    for word in text.split(","):
        try:
            rates.append(float(word))
        except ValueError:
            raise InputError(f"rates is {_shown(text)}: {_shown(word)} is no number") from None
    return check_rates(rates)


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Learning rates to compare, rising.

    Raises:
        InputError: there are fewer than two, one is there twice, or is none of float32's above 0.
    """
    rates = [float(rate) for rate in rates]
    for rate in rates:
        # Not the other way round: NaN is neither more nor less.
        if not _LEAST_RATE <= rate <= _MOST_RATE:
            raise InputError(
                f"rates has {rate:g}, expected numbers from {_LEAST_RATE:g} to {_MOST_RATE:g}"
            )
        if rates.count(rate) > 1:
            raise InputError(f"rates has {rate:g} twice, expected each once")
    if len(rates) < 2:
        raise InputError(f"rates has {len(rates)}, expected two or more to compare")
    return tuple(sorted(rates))


def rates_around(rate: float) -> tuple[float, ...]:
    """Seven rates, each 4 times the one before: two below ``rate`` and four above it.

    The kinds' own rates are the paper's for models of billions of parameters; others want up to hundreds
    of times as much, most of all those that were hardly trained
    (``experiments/results/finetune_mini.md``).
    """
    return check_rates([rate * 4.0**power for power in range(-2, 5)])


# What a value should have been, by pydantic's name of the error.
_EXPECTED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than_equal": lambda ctx: f"{ctx['ge']:,} or more",
    "less_than_equal": lambda ctx: f"at most {ctx['le']:,}",
    "greater_than": lambda ctx: f"more than {ctx['gt']:,}",
    "less_than": lambda ctx: f"less than {ctx['lt']:,}",
    "literal_error": lambda ctx: str(ctx["expected"]),
    "finite_number": lambda ctx: "a finite number",
    "int_type": lambda ctx: "an integer",
    "int_from_float": lambda ctx: "an integer",
    "float_type": lambda ctx: "a number",
    "string_type": lambda ctx: "a string",
    "dict_type": lambda ctx: "a table of NAME = PATH",
    "tuple_type": lambda ctx: "a list of names",
    "too_short": lambda ctx: f"{ctx['min_length']} or more",
}


# What a run cannot do without.
_MISSING = {
    "model": "a checkpoint's directory or name, as mini",
    "kind": f"one of {', '.join(TRAITS)}",
    "data": "at least one NAME=PATH",
}


def _problem(found: Mapping[str, Any]) -> str:
    """One error of pydantic in the project's words, starting with the option's name."""
    name, kind = ".".join(map(str, found["loc"])), found["type"]
    if kind == "value_error":
        return str(found["ctx"]["error"])
    if kind == "missing":
        return f"{name} is missing, expected {_MISSING[name]}"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, TrainOptions.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name} (found {_shown(found['input'])}) is no option{hint}"
    expected = _EXPECTED.get(kind)
    said = expected(found.get("ctx", {})) if expected else found["msg"].lower()
    return f"{name} is {_shown(found['input'])}, expected {said}"


def _shown(value: object) -> str:
    """A value in a message, in one line that is not too long."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:70]}... of {len(shown)} characters"
