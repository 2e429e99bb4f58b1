"""adapter_config.json: every field by name, read, kept, without effect, or refused.

Knows nothing of tensors, of the model's widths or of its number of layers. A field of unknown
effect is an error: an adapter is never applied as something that it is not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from flora_jax.adapters.flora import Reduction
from flora_jax.errors import InputError

CONFIG_FILE = "adapter_config.json"
PEFT_TYPES = {"LORA": "lora", "FLORA": "flora", "IA3": "ia3", "HIRA": "hira"}

_RANKED = "r rank_pattern layers_to_transform layers_pattern"
_READ = {
    "lora": f"{_RANKED} lora_alpha alpha_pattern bias",
    "hira": _RANKED,
    "flora": f"{_RANKED} reduction frozen_components",
    "ia3": "feedforward_modules",
}
# Kept with the adapter and written back; only use_rslora changes what the numbers mean.
SETTINGS = {
    kind: ("base_model_name_or_path", "revision", "task_type", *names.split())
    for kind, names in {
        "lora": "lora_dropout init_lora_weights use_rslora",
        "hira": "hira_dropout init_weights",
        "flora": "init",
        "ia3": "init_ia3_weights",
    }.items()
}
# fan_in_fan_out speaks of the base layer's storage; PEFT resets it on nn.Linear, which all are here.
# The *_config fields configure an initialisation; those that change the base are refused by name.
_WITHOUT_EFFECT = {
    "lora": "megatron_core qalora_group_size ensure_weight_tying loftq_config eva_config "
    "corda_config lora_ga_config",
}
_REFUSED = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "biases of the factors are not supported",
    "modules_to_save": "fully trained modules are not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "adapters on bare parameters are not supported",
    "layer_replication": "replicated layers are not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "use_qalora": "QALoRA is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "use_bdlora": "BD-LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA is not supported",
    "megatron_config": "Megatron layers are not supported",
}
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


Default = TypeVar("Default", None, tuple[str, ...])


class AdapterError(InputError):
    """An adapter folder that cannot be read, does not fit its base, or cannot be written."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, checked field by field.

    ``targets``, ``excluded`` and ``feedforward`` are suffixes of module paths (a tuple) or one
    regular expression over the whole path (a string); where the file has none, ``None`` for targets and
    feedforward are PEFT's own for the base model's family. Patterns keep the file's order.
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
    alpha: float = 1.0
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reduction: Reduction = "mean"
    frozen: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def scale(self, alpha: float, rank: int) -> float:
        """LoRA's scale: ``alpha/r``, or ``alpha/sqrt(r)`` for rsLoRA."""
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


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
    except (ValueError, RecursionError, OSError) as error:  # Huge integers, deep nesting.
        raise AdapterError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: found a JSON {type(raw).__name__}, expected an object")
    kind = PEFT_TYPES.get(str(raw.get("peft_type")))
    if kind is None:
        raise AdapterError(
            f"{path}: peft_type is {raw.get('peft_type')!r}, "
            f"expected one of {', '.join(map(repr, PEFT_TYPES))}"
        )
    problems = _unsupported(raw, kind)
    fields = _Fields(raw, problems)
    values: dict[str, Any] = dict(
        targets=fields.names("target_modules", None),
        excluded=fields.names("exclude_modules", ()),
        settings={k: raw[k] for k in SETTINGS[kind] if raw.get(k) is not None},
    )
    if kind == "ia3":
        values["feedforward"] = fields.names("feedforward_modules", None)
    else:
        values["rank"] = fields.number("r", int)
        values["rank_pattern"] = fields.pattern("rank_pattern", int)
        values["layers"] = fields.layers("layers_to_transform")
        values["layers_pattern"] = _several(fields.names("layers_pattern", ()))
    if kind == "lora":
        values["alpha"] = fields.number("lora_alpha", float)
        values["alpha_pattern"] = fields.pattern("alpha_pattern", float)
        if not isinstance(raw.get("use_rslora") or False, bool):
            problems.append(f"use_rslora is {raw['use_rslora']!r}, expected true or false")
    if kind == "flora":
        values["reduction"] = raw.get("reduction")
        if values["reduction"] not in get_args(Reduction):
            problems.append(f"reduction is {raw.get('reduction')!r}, expected 'mean' or 'sum'")
        values["frozen"] = fields.number("frozen_components", int, minimum=0, default=0)
    if isinstance(values["targets"], str) and (
        values.get("layers") or values.get("layers_pattern")
    ):
        problems.append("layers_to_transform and layers_pattern need a list of target_modules")
    if problems:
        raise AdapterError("\n  ".join([f"{path}: the adapter cannot be read:", *problems]))
    return AdapterConfig(path, kind, **values)


def _unsupported(raw: Mapping[str, Any], kind: str) -> list[str]:
    common = (
        "peft_type target_modules exclude_modules auto_mapping peft_version inference_mode "
        "fan_in_fan_out"
    )
    known = {*f"{common} {_READ[kind]} {_WITHOUT_EFFECT.get(kind, '')}".split(), *SETTINGS[kind]}
    problems = []
    for name, value in raw.items():
        if name in known or value is None or value is False or value in ([], {}):
            continue
        reason = _REFUSED.get(name, "a field of unknown effect")
        problems.append(f"{name} is {value!r}: {reason}")
    if raw.get("bias", "none") != "none" and kind == "lora":
        problems.append(f"bias is {raw['bias']!r}, expected 'none': trained biases not supported")
    init = str(raw.get("init_lora_weights")).lower()
    if kind == "lora" and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        problems.append(
            f"init_lora_weights is {raw['init_lora_weights']!r}, which changed the base weights: "
            "save with path_initial_model_for_weight_conversion to get an ordinary LoRA"
        )
    return problems


class _Fields:
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
