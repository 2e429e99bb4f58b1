"""LoRA's folder, PEFT's ``LORA``: ``lora_A [R, I]``, ``lora_B [O, R]``, scales as alphas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flora_jax.adapters.lora import LoRA
from flora_jax.peft.config import AdapterConfig, Fields
from flora_jax.peft.format import Format, Leaf, Module, Modules, Pattern, wide
from flora_jax.peft.targets import pattern_value

_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def scale_of(config: AdapterConfig, module: Module) -> float:
    """``alpha/r``, or ``alpha/sqrt(r)`` for rsLoRA, of one module."""
    alpha = pattern_value(config.own["alpha_pattern"], module.path, config.own["alpha"])
    return float(
        alpha / (math.sqrt(module.rank) if config.settings.get("use_rslora") else module.rank)
    )


def from_tensors(config: AdapterConfig, module: Module, found: Sequence[Any]) -> LoRA:
    down_RI, up_OR = found
    return LoRA(down_RI, up_OR.T, scale_of(config, module))


def to_tensors(params: Any) -> tuple[np.ndarray, ...]:
    return wide(params.down_RI), wide(params.up_RO).swapaxes(-1, -2)


def read(fields: Fields) -> dict[str, Any]:
    raw = fields.raw
    if raw.get("bias", "none") != "none":
        fields.problems.append(
            f"bias is {raw['bias']!r}, expected 'none': trained biases not supported"
        )
    init = str(raw.get("init_lora_weights")).lower()
    if init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        fields.problems.append(
            f"init_lora_weights is {raw['init_lora_weights']!r}, which changed the base weights: "
            "save with path_initial_model_for_weight_conversion to get an ordinary LoRA"
        )
    fields.flag("use_rslora")
    return {
        "alpha": fields.number("lora_alpha", float),
        "alpha_pattern": fields.pattern("alpha_pattern", float),
    }


def write(modules: Modules, settings: Mapping[str, Any], pattern: Pattern) -> dict[str, Any]:
    for (layer, target), params in modules.items():
        if not math.isfinite(params.scale):
            raise ValueError(f"layer {layer} {target}: scale is {params.scale}")
    root = math.sqrt if settings.get("use_rslora") else float
    alphas = {m: _alpha(p.scale, root(p.up_RO.shape[-2])) for m, p in modules.items()}
    common, differing = pattern(alphas)
    return {"lora_alpha": common, "alpha_pattern": differing, "bias": "none"}


def _alpha(scale: float, divisor: float) -> float:
    """The alpha with ``alpha / divisor == scale``; whole where it can be."""
    near = scale * divisor
    for alpha in (
        float(round(near)),
        near,
        math.nextafter(near, math.inf),
        math.nextafter(near, 0),
    ):
        if alpha / divisor == scale:
            return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha
    return near


FORMAT = Format(
    "lora",
    "LORA",
    (Leaf("lora_A.weight", "RI"), Leaf("lora_B.weight", "OR")),
    from_tensors,
    to_tensors,
    fields="lora_alpha alpha_pattern bias",
    read=read,
    write=write,
    # Of these only use_rslora changes what the numbers mean.
    settings="lora_dropout init_lora_weights use_rslora",
    # The *_config fields configure an initialisation; those that change the base are refused by name.
    without_effect="megatron_core qalora_group_size ensure_weight_tying loftq_config eva_config "
    "corda_config lora_ga_config",
    refused={
        "lora_bias": "biases of the factors are not supported",
        "layer_replication": "replicated layers are not supported",
        "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
        "use_qalora": "QALoRA is not supported",
        "velora_config": "VeLoRA is not supported",
        "monteclora_config": "MonteCLoRA is not supported",
        "use_bdlora": "BD-LoRA is not supported",
        "arrow_config": "Arrow routing is not supported",
        "kasa_config": "KaSA is not supported",
        "megatron_config": "Megatron layers are not supported",
    },
)
