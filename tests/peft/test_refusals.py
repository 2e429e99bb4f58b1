"""What adapter_config.json says and this project does not honour is refused by name."""

from pathlib import Path

import pytest

from flora_jax.peft.read import (
    AdapterError,
    describe_adapter,
    read_adapter,
    write_adapter,
)
from tests.helpers.broken_folders import PROJECTIONS, edit, error_of, make


@pytest.fixture
def lora(tmp_path) -> Path:
    return write_adapter(make("lora"), tmp_path / "lora")


REFUSED = {
    "use_dora": ("yes", "expected true"),
    "bias": ("lora_only", "expected 'none'"),
    "lora_bias": (True, "biases"),
    "modules_to_save": (["lm_head"], "fully trained modules"),
    "trainable_token_indices": ([1, 2], "token embeddings"),
    "target_parameters": (["x"], "bare parameters"),
    "layer_replication": ([[0, 1]], "replicated layers"),
    "alora_invocation_tokens": ([5], "aLoRA"),
    "use_qalora": (True, "QALoRA"),
    "velora_config": ({"num_groups": 4}, "VeLoRA"),
    "monteclora_config": ({"num_samples": 8}, "MonteCLoRA"),
    "use_bdlora": ({"nblocks": 2}, "BD-LoRA"),
    "arrow_config": ({"top_k": 3}, "Arrow"),
    "kasa_config": ({"beta": 1e-4}, "KaSA"),
    "megatron_config": ({"x": 1}, "Megatron"),
    "init_lora_weights": ("pissa_niter_4", "changed the base weights"),
    "a_new_field": (1, "unknown effect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_feature_that_is_not_honoured_is_refused_by_name(name, lora):
    value, reason = REFUSED[name]
    edit(lora, **{name: value})
    message = error_of(lora)
    assert f"{name} is {value!r}" in message
    assert reason in message
    with pytest.raises(AdapterError, match=name):
        describe_adapter(lora)


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_inits_that_changed_the_base_are_refused(init, lora):
    edit(lora, init_lora_weights=init)
    assert f"init_lora_weights is {init!r}" in error_of(lora)


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica", True, False, None])
def test_inits_that_left_the_base_alone_are_read(init, lora):
    edit(lora, init_lora_weights=init, a_new_field=None, use_dora=False, loftq_config={})
    assert read_adapter(lora, PROJECTIONS, 2).settings.get("init_lora_weights") == init


@pytest.mark.parametrize("kind, config", [("lora", "LoraConfig"), ("dora", "LoraConfig"),
                                          ("ia3", "IA3Config"), ("hira", "HiraConfig")])  # fmt: skip
def test_every_default_that_peft_writes_is_read(kind, config, tmp_path):
    peft = pytest.importorskip("peft")
    folder = write_adapter(make(kind, rank=8), tmp_path / "a")
    options = {} if kind == "ia3" else {"r": 8}
    options |= {"use_dora": True} if kind == "dora" else {}
    made = getattr(peft, config)(target_modules=["c_attn", "mlp.c_proj"], **options)
    made.save_pretrained(folder)
    assert read_adapter(folder, PROJECTIONS, 2).targets() == ("attn.c_attn", "mlp.c_proj")


VALUES = [
    ("lora", "r", 0, "r is 0, expected an integer of at least 1"),
    ("lora", "r", True, "r is True"),
    ("hira", "r", None, "r is None"),
    ("lora", "lora_alpha", "8", "lora_alpha is '8', expected a number"),
    ("lora", "lora_alpha", float("nan"), "lora_alpha is nan"),
    ("lora", "lora_alpha", 10**400, "lora_alpha is 1000"),
    ("lora", "use_rslora", 1, "use_rslora is 1, expected true or false"),
    ("lora", "rank_pattern", {"c_attn": 1.5}, "rank_pattern is"),
    ("lora", "rank_pattern", [1], "rank_pattern is"),
    ("lora", "alpha_pattern", {"c_(": 1}, "'c_(' is not a regular expression"),
    ("lora", "target_modules", ["c_attn", 3], "expected a string or a list of strings"),
    ("lora", "target_modules", "*", "'*' is not a regular expression"),
    ("lora", "layers_to_transform", [0.5], "expected an integer or a list of integers"),
    ("lora", "layers_pattern", ["h("], "'h(' is not a regular expression"),
    ("flora", "reduction", "max", "reduction is 'max', expected 'mean' or 'sum'"),
    ("flora", "reduction", None, "reduction is None"),
    ("flora", "frozen_components", -1, "frozen_components is -1"),
    ("flora", "frozen_components", 3, "frozen_components is 3"),
    ("ia3", "layers_to_transform", [0], "layers_to_transform is [0]: a field of unknown effect"),
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), VALUES)
def test_a_value_of_the_wrong_type_is_named(kind, name, value, expected, tmp_path):
    folder = write_adapter(make(kind), tmp_path / "a")
    edit(folder, **{name: value})
    assert expected in error_of(folder)


def test_all_fields_at_fault_are_in_one_message(lora):
    edit(lora, use_qalora=True, r=-1, a_new_field="x")
    message = error_of(lora)
    assert all(name in message for name in ("use_qalora", "r is -1", "a_new_field"))


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", None, "lora", 3])
def test_another_type_is_named_with_those_that_are_read(peft_type, lora):
    edit(lora, peft_type=peft_type)
    message = error_of(lora)
    assert repr(peft_type) in message
    assert "'LORA', 'FLORA', 'IA3', 'HIRA'" in message


TARGETS = [
    (["q_proj", "k_proj"], {}, "'k_proj', which is in no layer"),
    (["transformer.h.2.attn.c_attn"], {}, "'transformer.h.2.attn.c_attn', which is in no layer"),
    (["c_attn", "lm_head"], {}, "'lm_head': embedding/lm_head adapters are not supported"),
    (["wte"], {}, "'transformer.wte': embedding/lm_head adapters are not supported"),
    (["mlp"], {}, "'transformer.h.0.mlp', which is not a linear projection"),
    (["ln_1"], {}, "'transformer.h.1.ln_1', which is not a linear projection"),
    (".*", {}, "'transformer.wpe': embedding"),
    (r"h\.0\.attn\.c_attn", {}, "leave no module to adapt"),
    ([], {}, "leave no module to adapt"),
    (["c_attn"], {"exclude_modules": ["attn.c_attn"]}, "leave no module to adapt"),
    (["c_attn"], {"layers_to_transform": [1, 5]}, "layer 5, the base model has 2 layers"),
    (["c_attn"], {"layers_to_transform": 0, "layers_pattern": "layers"}, "leave no module"),
    (".*c_attn", {"layers_to_transform": [0]}, "need a list of target_modules"),
]


@pytest.mark.parametrize(("targets", "more", "expected"), TARGETS)
def test_targets_that_the_base_does_not_have_are_named(targets, more, expected, lora):
    edit(lora, target_modules=targets, **more)
    assert expected in error_of(lora)
