"""adapter_config.json: every field by name, read, kept, without effect, or refused.

Knows nothing of tensors, of the model's widths or of its number of layers. A field of unknown
effect is an error: an adapter is never applied as something that it is not.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from flora_jax.errors import InputError
from flora_jax.peft.format import Format, format_of, peft_types
from flora_jax.peft.no_adapter import no_adapter

CONFIG_FILE = "adapter_config.json"

# Of every kind. fan_in_fan_out speaks of the base layer's storage; PEFT resets it on nn.Linear,
# which all are here.
_SHARED = "peft_type target_modules exclude_modules auto_mapping peft_version inference_mode"
_SHARED += " fan_in_fan_out"
_REFUSED = {
    "modules_to_save": "fully trained modules are not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "adapters on bare parameters are not supported",
}


Default = TypeVar("Default", None, tuple[str, ...])


class AdapterError(InputError):
    """An adapter folder that cannot be read, does not fit its base, or cannot be written."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, checked field by field.

    ``targets``, ``excluded`` and ``feedforward`` are suffixes of module paths (a tuple) or one
    regular expression over the whole path (a string); where the file has none, ``None`` for targets and
    feedforward are PEFT's own for the base model's family. Patterns keep the file's order. ``own`` are
    the values that only this kind has, see its :class:`~flora_jax.peft.format.Format`.
    """

    path: Path
    kind: str
    targets: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] = ()
    feedforward: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank: int = 1
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_config(directory: Path) -> AdapterConfig:
    """Reads ``adapter_config.json`` of an adapter folder.

    Raises:
        AdapterError: the file is missing or not JSON, another ``peft_type``, a refused or unknown
            field, a value of the wrong type; all fields at fault are listed in the one message.
    """
    path = directory / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(no_adapter(directory)) from None
    except (ValueError, RecursionError, OSError) as error:  # Huge integers, deep nesting.
        raise AdapterError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: found a JSON {type(raw).__name__}, expected an object")
    found = format_of(raw)
    if found is None:
        raise AdapterError(
            f"{path}: peft_type is {raw.get('peft_type')!r}, "
            f"expected one of {', '.join(map(repr, peft_types()))}"
        )
    kind = found.kind
    problems = _unsupported(raw, found)
    fields = Fields(raw, problems)
    values: dict[str, Any] = dict(
        targets=fields.names("target_modules", None),
        excluded=fields.names("exclude_modules", ()),
        settings={k: raw[k] for k in found.kept if raw.get(k) is not None},
    )
    if found.placed_by is not None:
        values["feedforward"] = fields.names(found.placed_by, None)
    if found.has_rank:
        values["rank"] = fields.number("r", int)
        values["rank_pattern"] = fields.pattern("rank_pattern", int)
        values["layers"] = fields.layers("layers_to_transform")
        values["layers_pattern"] = _several(fields.names("layers_pattern", ()))
    values["own"] = found.read(fields)
    if isinstance(values["targets"], str) and (
        values.get("layers") or values.get("layers_pattern")
    ):
        problems.append("layers_to_transform and layers_pattern need a list of target_modules")
    if problems:
        raise AdapterError("\n  ".join([f"{path}: the adapter cannot be read:", *problems]))
    return AdapterConfig(path, kind, **values)


def _unsupported(raw: Mapping[str, Any], found: Format) -> list[str]:
    known = {*_SHARED.split(), *found.known}
    refused = {**_REFUSED, **found.refused}
    problems = [
        f"{name} is {raw[name]!r}, expected {json.dumps(value)}"
        for name, value in found.marks.items()
        if raw[name] is not value
    ]
    for name, value in raw.items():
        if name in known or value is None or value is False or value in ([], {}):
            continue
        problems.append(f"{name} is {value!r}: {refused.get(name, 'a field of unknown effect')}")
    return problems


class Fields:
    """Typed access to the JSON object; what does not fit goes on the list of problems."""

    def __init__(self, raw: Mapping[str, Any], problems: list[str]):
        self.raw, self.problems = raw, problems

    def _wrong(self, name: str, expected: str) -> None:
        found = repr(self.raw[name]) if name in self.raw else "absent"
        self.problems.append(f"{name} is {found}, expected {expected}")

    def number(self, name: str, kind: type, minimum: int = 1, default: Any = None) -> Any:
        value = self.raw.get(name, default)
        if not _is_number(value, kind) or (kind is int and value < minimum):
            words = f"an integer of at least {minimum}" if kind is int else "a number"
            self._wrong(name, words)
        return value

    def flag(self, name: str) -> None:
        if not isinstance(self.raw.get(name) or False, bool):
            self._wrong(name, "true or false")

    def names(self, name: str, default: Default) -> str | tuple[str, ...] | Default:
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, str):
            self._check_expression(name, value)
            return value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            for item in value if name == "layers_pattern" else ():
                self._check_expression(name, item)
            return tuple(value)
        self._wrong(name, "a string or a list of strings")
        return default

    def pattern(self, name: str, kind: type) -> dict[str, Any]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict) or not all(
            _is_number(item, kind) and (kind is float or item > 0) for item in value.values()
        ):
            words = "positive integers" if kind is int else "numbers"
            self._wrong(name, f"an object of module patterns and {words}")
            return {}
        for key in value:
            self._check_expression(name, key)
        return dict(value)

    def layers(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        value = [] if value is None else [value] if isinstance(value, int) else value
        if isinstance(value, list) and all(_is_number(item, int) for item in value):
            return tuple(value)
        self._wrong(name, "an integer or a list of integers")
        return ()

    def _check_expression(self, name: str, expression: str) -> None:
        try:
            re.compile(f"({expression})")
        except re.error as error:
            self.problems.append(f"{name}: {expression!r} is not a regular expression: {error}")


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(names, str):
        return (names,) if names else ()
    return names


def _is_number(value: Any, kind: type) -> bool:
    """JSON has one type of numbers, and Python's true is an integer."""
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int)
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
