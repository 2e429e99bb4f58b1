"""Logits under an adapter equal PEFT's, for folders that PEFT wrote and for folders that we wrote."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flora_jax.adapters import HiRA
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import list_pairs
from flora_jax.mixing.ragged import ragged_hooks
from flora_jax.models.quantize import quantize_model
from flora_jax.models.starcoder.config import NAMES, StarCoderConfig
from flora_jax.peft.config import AdapterConfig
from flora_jax.peft.read import AdapterError, write_adapter
from flora_jax.peft.targets import adapted_modules, pattern_value
from flora_jax.weights.product import explicit
from tests.helpers.peft_folders import assert_logits_equal, assert_same, read_for, some_adapter
from tests.helpers.torch_models import (
    flax_logits,
    random_peft,
    random_tokens,
    tiny_torch_model,
    to_flax,
    torch_logits,
)

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5 by a name that is on its way out.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora-default": ("LoraConfig", dict(r=8, lora_alpha=12, task_type="CAUSAL_LM")),
    "lora-rank-1": ("LoraConfig", dict(r=1, lora_alpha=3, target_modules=["c_proj"])),
    "lora-rslora-all-linear": (
        "LoraConfig",
        dict(r=6, lora_alpha=2.7, use_rslora=True, target_modules="all-linear"),
    ),
    "lora-regex": (
        "LoraConfig",
        dict(r=16, lora_alpha=8, target_modules=r".*\.h\.(\d+)\.(attn\.c_attn|mlp\.c_(fc|proj))"),
    ),
    "lora-patterns": (
        "LoraConfig",
        dict(
            r=4,
            lora_alpha=4,
            target_modules=["attn.c_attn", "c_fc", "mlp.c_proj"],
            # PEFT saves keys sorted, and the first that matches counts.
            rank_pattern={"c_attn": 3, "c_fc": 2, r"h\.1\..*": 5},
            alpha_pattern={"^transformer.h.0.attn.c_attn": 9, "attn.c_.*": 7, "c_attn": 5},
        ),
    ),
    "lora-one-layer": (
        "LoraConfig",
        dict(
            r=2,
            target_modules=["c_attn", "c_proj"],
            exclude_modules=["attn.c_proj"],
            layers_to_transform=[1],
            layers_pattern="h",
        ),
    ),
    "lora-layer-and-excluded-regex": (
        "LoraConfig",
        dict(
            r=2,
            target_modules=["c_fc", "transformer.h.0.attn.c_attn"],
            exclude_modules=r".*\.h\.0\.mlp.*",
            layers_to_transform=1,
        ),
    ),
    "dora-rslora-all-linear": (
        "LoraConfig",
        dict(r=6, lora_alpha=2.7, use_rslora=True, target_modules="all-linear", use_dora=True),
    ),
    "dora-patterns": (
        "LoraConfig",
        dict(
            r=4,
            lora_alpha=4,
            target_modules=["attn.c_attn", "c_fc", "mlp.c_proj"],
            rank_pattern={"c_attn": 3, "c_fc": 2, r"h\.1\..*": 5},
            alpha_pattern={"^transformer.h.0.attn.c_attn": 9, "attn.c_.*": 7},
            use_dora=True,
        ),
    ),
    "ia3-default": ("IA3Config", dict()),
    "ia3-c_attn-alone": ("IA3Config", dict(target_modules=["c_attn"], feedforward_modules=[])),
    "ia3-suffix-without-dot": (
        "IA3Config",
        dict(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
    ),
    "ia3-regex": (
        "IA3Config",
        dict(target_modules=r".*\.c_(fc|attn)", feedforward_modules=r".*h\.1\.mlp\.c_fc"),
    ),
    "hira-default": ("HiraConfig", dict(r=4)),
    "hira-rank-1": ("HiraConfig", dict(r=1, target_modules=["c_proj", "c_fc"])),
    "hira-rank-16": ("HiraConfig", dict(r=16, target_modules="all-linear")),
    "hira-one-layer": ("HiraConfig", dict(r=3, target_modules=["c_fc"], layers_to_transform=[0])),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pefts_for_its_folders_and_for_ours(case, seed, tmp_path):
    config_name, options = CASES[case]
    base = dict(multi_query=seed % 2 == 0)
    model = to_flax(tiny_torch_model(seed, **base))
    tokens = random_tokens(seed)
    config = getattr(peft, config_name)(**options)
    wrapped = random_peft(tiny_torch_model(seed, **base), config, seed=seed + 10)
    wrapped.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(wrapped, tokens)
    assert np.abs(expected - flax_logits(model, tokens)).max() > 0.05

    adapter = read_for(model, tmp_path / "theirs")
    assert_logits_equal(flax_logits(model, tokens, adapter.layers), expected)

    write_adapter(adapter, tmp_path / "ours", "some/base")
    again = peft.PeftModel.from_pretrained(tiny_torch_model(seed, **base), tmp_path / "ours")
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens), expected)

    settings = {**adapter.settings, "base_model_name_or_path": "some/base"}
    assert_same(read_for(model, tmp_path / "ours"), dataclasses.replace(adapter, settings=settings))


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_dora_over_a_quantised_base_is_pefts_over_the_dequantised_weights(method, tmp_path):
    torch_model = tiny_torch_model(4)
    quantised = quantize_model(to_flax(torch_model), method)
    linears = dict(torch_model.named_modules())
    with torch.no_grad():
        for layer in range(2):
            for target in quantised.config.projections():
                wide_IO = np.asarray(explicit(quantised.weight(layer, target)))
                linears[NAMES.path(layer, target)].weight.copy_(torch.tensor(wide_IO.T))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True)
    wrapped = random_peft(torch_model, config, seed=5)
    wrapped.save_pretrained(tmp_path / "theirs")
    tokens = random_tokens(4)
    adapter = read_for(quantised, tmp_path / "theirs")
    expected = torch_logits(wrapped, tokens)
    # Components too: the norm that serving uses is that of the weights as they are held.
    for layers in (adapter.layers, _served(quantised, adapter, len(tokens))):
        assert_logits_equal(flax_logits(quantised, tokens, layers), expected)


def _served(model, adapter, rows):
    projections, layers = model.config.projections(), model.config.n_layer
    bank = build_bank({"a": adapter}, projections, layers, model.weight)
    return ragged_hooks(bank.layers, list_pairs(bank, ["a"] * rows))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "hira"])
def test_peft_loads_adapters_of_uneven_layers(kind, tmp_path):
    model = to_flax(tiny_torch_model(3))
    adapter = some_adapter(kind, model, 5)
    write_adapter(adapter, tmp_path / "a")
    assert_same(read_for(model, tmp_path / "a"), adapter)
    wrapped = peft.PeftModel.from_pretrained(tiny_torch_model(3), tmp_path / "a").eval()
    tokens = random_tokens(3)
    assert_logits_equal(flax_logits(model, tokens, adapter.layers), torch_logits(wrapped, tokens))


def test_a_hira_of_uneven_ranks_reads_back(tmp_path):
    model = to_flax(tiny_torch_model(0))
    uneven = some_adapter("lora", model, 2)
    layers = tuple(
        {t: HiRA(p.down_RI, p.up_RO) for t, p in layer.items()} for layer in uneven.layers
    )
    adapter = ModelAdapter("hira", layers, projections=model.config.projections())
    write_adapter(adapter, tmp_path / "a")
    assert_same(read_for(model, tmp_path / "a"), adapter)


def test_a_hira_whose_rank_pattern_peft_ignored_is_read_at_its_tensors_rank(tmp_path):
    model = to_flax(tiny_torch_model(0))
    config = peft.HiraConfig(r=3, rank_pattern={"c_attn": 5})
    wrapped = random_peft(tiny_torch_model(0), config, seed=1)
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = read_for(model, tmp_path / "theirs")
    tokens = random_tokens(0)
    assert_logits_equal(flax_logits(model, tokens, adapter.layers), torch_logits(wrapped, tokens))


def test_absent_targets_are_pefts_defaults(tmp_path):
    model = to_flax(tiny_torch_model(0))
    for kind, config in {"lora": "LoraConfig", "ia3": "IA3Config", "hira": "HiraConfig"}.items():
        wrapped = random_peft(tiny_torch_model(0), getattr(peft, config)())
        wrapped.save_pretrained(tmp_path / kind)
        path = tmp_path / kind / "adapter_config.json"
        raw = json.loads(path.read_text())
        for name in ("target_modules", "feedforward_modules"):
            raw.pop(name, None)
        path.write_text(json.dumps(raw))
        adapter = read_for(model, tmp_path / kind)
        expected = ("attn.c_attn", "mlp.c_proj") if kind == "ia3" else ("attn.c_attn",)
        assert adapter.targets() == expected


def test_targets_and_patterns_match_as_pefts_own_functions_do():
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    names = ["c_attn", "c_proj", "attn.c_proj", "c_fc", "proj", "h.1.attn.c_attn", "mlp.c_proj"]
    names += [
        "transformer.h.11.mlp.c_fc",
        "1.mlp.c_fc",
        r".*\.h\.1.?\.attn\.c_.*",
        r"h\.(1|2)\.mlp.*",
    ]
    paths = [
        NAMES.path(n, t)
        for n in range(12)
        for t in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    rng = random.Random(0)
    compared = 0
    for _ in range(300):
        several = tuple(rng.sample(names[:9], rng.randint(1, 3)))
        targets = rng.choice([several, r".*\.c_(attn|fc)", r"transformer\.h\.\d\.mlp\.c_.*"])
        excluded = rng.choice([(), tuple(rng.sample(names[:9], 1)), r".*\.h\.(3|11)\..*"])
        lists = not isinstance(targets, str)
        layers = tuple(rng.sample(range(12), 3)) if lists and rng.random() < 0.5 else ()
        parents = rng.choice([(), ("h",), ("layers", "transformer.h")]) if layers else ()
        theirs = peft.LoraConfig(
            target_modules=list(targets) if lists else targets,
            exclude_modules=excluded if isinstance(excluded, str) else list(excluded),
            layers_to_transform=list(layers) or None,
            layers_pattern=list(parents) or None,
        )
        ours = AdapterConfig(
            Path("x"), "lora", targets, excluded, layers=layers, layers_pattern=parents
        )
        # An object that says "excluded" is true to Python, but no match.
        expected = [p for p in paths if (m := check_target_module_exists(theirs, p)) and _match(m)]
        try:
            found = [
                NAMES.path(*m) for m in adapted_modules(ours, StarCoderConfig().projections(), 12)
            ]
        except AdapterError:
            assert "proj" in targets or not expected
            continue
        assert found == expected
        compared += len(found) > 0
        pattern = {name: rng.randint(2, 99) for name in rng.sample(names, 4)}
        for path in paths:
            theirs_value = pattern.get(get_pattern_key(pattern.keys(), path), 1)
            assert pattern_value(pattern, path, 1) == theirs_value
    assert compared > 100


def _match(result: Any) -> bool:
    return type(result).__name__ != "_ExcludedModule"
