"""Tensors that do not fit and files that are damaged are refused by name, with both shapes."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flora_jax.adapters import KINDS
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.errors import InputError
from flora_jax.peft.read import (
    AdapterError,
    describe_adapter,
    write_adapter,
)
from tests.helpers.broken_folders import (
    C_ATTN,
    PROJECTIONS,
    STEM,
    edit,
    edit_tensors,
    error_of,
    make,
)
from tests.helpers.random_adapters import projections_of


@pytest.fixture
def lora(tmp_path) -> Path:
    return write_adapter(make("lora"), tmp_path / "lora")


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(lora):
    def change(tensors):
        tensors[C_ATTN + "lora_A.weight"] = np.zeros((3, 8), np.float32)
        del tensors[STEM + "1.mlp.c_proj.lora_B.weight"]
        tensors[STEM + "1.mlp.c_fc.lora_A.weight"] = np.zeros((2, 8), np.float32)
        tensors["base_model.model.lm_head.weight"] = np.zeros((5, 8), np.float32)

    edit_tensors(lora, change)
    message = error_of(lora)
    assert "adapter_model.safetensors: 4 tensors" in message
    assert f"{C_ATTN}lora_A.weight: found shape (3, 8), expected (2, 8)" in message
    assert f"{STEM}1.mlp.c_proj.lora_B.weight: missing, expected shape (8, 2)" in message
    assert "c_fc.lora_A.weight: found shape (2, 8), expected no such tensor" in message
    assert "lm_head.weight: embedding/lm_head adapters are not supported" in message


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_width_is_named_with_both_shapes(kind, tmp_path):
    folder = write_adapter(make(kind), tmp_path / "a")
    wider = projections_of({target: (2 * i, 2 * o) for target, (i, o) in PROJECTIONS.items()})
    message = error_of(folder, projections=wider)
    expected = {
        "lora": "lora_B.weight: found shape (12, 2), expected (24, 2)",
        "dora": "lora_magnitude_vector: found shape (12,), expected (24,)",
        "hira": "hira_A: found shape (2, 8), expected (2, 16)",
        "flora": "flora_A: found shape (2, 12), expected (2, 24)",
        "ia3": "mlp.c_proj.ia3_l: found shape (1, 20), expected (1, 40)",
    }
    assert expected[kind] in message


def test_an_adapter_of_a_deeper_or_shallower_base_is_refused(lora):
    assert "0.attn" not in (message := error_of(lora, n_layer=3))
    assert f"{STEM}2.attn.c_attn.lora_A.weight: missing" in message
    assert f"{C_ATTN}".replace("h.0", "h.1") in error_of(lora, n_layer=1)


def test_a_feed_forward_vector_read_as_an_output_one_is_refused(tmp_path):
    folder = write_adapter(make("ia3"), tmp_path / "a")
    edit(folder, feedforward_modules=[])
    assert "ia3_l: found shape (1, 20), expected (8, 1)" in error_of(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_named(value, lora, tmp_path):
    def change(tensors):
        tensors[C_ATTN + "lora_B.weight"][0, 0] = value

    edit_tensors(lora, change)
    message = error_of(lora)
    assert f"{C_ATTN}lora_B.weight: 1 of 24 numbers are not finite" in message
    adapter = make("lora")
    params = adapter.layers[0]["attn.c_attn"]
    bad = dataclasses.replace(params, up_RO=params.up_RO.at[0, 0].set(value))
    with pytest.raises(AdapterError, match=re.escape(C_ATTN + "lora_B")):
        write_adapter(
            dataclasses.replace(adapter, layers=({"attn.c_attn": bad},)), tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


def test_a_dtype_that_is_not_floating_is_named(lora):
    def change(tensors):
        tensors[C_ATTN + "lora_A.weight"] = np.zeros((2, 8), np.int32)

    edit_tensors(lora, change)
    assert f"{C_ATTN}lora_A.weight: found dtype I32" in error_of(lora)
    with pytest.raises(AdapterError, match="found dtype I32"):
        describe_adapter(lora)


def test_damaged_and_missing_files_are_named(lora, tmp_path):
    tensors, config = lora / "adapter_model.safetensors", lora / "adapter_config.json"
    whole, text = tensors.read_bytes(), config.read_text()
    for size in (0, 5, 100, len(whole) - 1):
        tensors.write_bytes(whole[:size])
        assert f"{tensors}: not a whole safetensors file" in error_of(lora)
        with pytest.raises(AdapterError, match="not a whole safetensors file"):
            describe_adapter(lora)
    tensors.unlink()
    assert "found neither adapter_model.safetensors nor adapter_model.bin" in error_of(lora)
    config.write_text(text.replace(",", "", 1))
    assert f"{config}:3: not JSON" in error_of(lora)
    config.write_text("[]")
    assert f"{config}: found a JSON list, expected an object" in error_of(lora)
    config.write_bytes(b"\xff\xfe")
    assert f"{config}: cannot be read" in error_of(lora)
    config.unlink()
    assert error_of(lora) == f"{lora}: no adapter folder: adapter_config.json is missing"
    assert error_of(tmp_path / "nowhere").startswith(
        f"{tmp_path}/nowhere: no adapter folder is there"
    )


def test_a_torch_file_needs_torch_and_tensors(lora, monkeypatch):
    torch = pytest.importorskip("torch")
    (lora / "adapter_model.safetensors").unlink()
    path = lora / "adapter_model.bin"
    path.write_bytes(b"nonsense")
    assert f"{path}: not a whole file of torch tensors" in error_of(lora)
    torch.save({"x": 3}, path)
    assert f"{path}: found dict, expected named tensors" in error_of(lora)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert f"{path}: reading it needs torch" in error_of(lora)


def test_describing_names_tensors_of_another_kind(lora):
    edit(lora, peft_type="HIRA", lora_alpha=None, bias=None)
    with pytest.raises(AdapterError, match=r"lora_A.weight: shape \(2, 8\): not of a hira adapter"):
        describe_adapter(lora)


def test_a_folder_in_use_is_never_overwritten_and_no_draft_is_left(tmp_path):
    adapter = make("lora")
    (tmp_path / "empty").mkdir()
    write_adapter(adapter, tmp_path / "empty")
    write_adapter(adapter, tmp_path / "deep" / "new")
    before = (tmp_path / "empty" / "adapter_config.json").read_text()
    with pytest.raises(InputError, match="exists already, and is not an empty directory"):
        write_adapter(make("hira"), tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").read_text() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists already, and is not an empty directory"):
        write_adapter(adapter, tmp_path / "file")
    with pytest.raises(InputError, match="below: cannot be written to"):
        write_adapter(adapter, tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty", "file"]


def test_a_summary_misses_no_tensor(tmp_path):
    write_adapter(make("lora"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({name: value for name, value in tensors.items() if name != lost}, path)
    with pytest.raises(AdapterError, match=f"{re.escape(lost)}: missing beside"):
        describe_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_sees_that_config_and_tensors_disagree(kind, tmp_path):
    folder = write_adapter(make(kind), tmp_path / "a")
    for fields, said in [({"r": 5}, "found rank 2, adapter_config.json says 5"),
                         ({"r": 2, "rank_pattern": {"c_attn": 3}}, "adapter_config.json says 3"),
                         ({"rank_pattern": {}, "target_modules": ["c_attn"]},
                          "adapter_config.json names no such target")]:  # fmt: skip
        if "r" in fields and kind == "ia3":  # Without a rank.
            continue
        edit(folder, **fields)
        if kind == "hira" and "rank_pattern" in fields and fields["rank_pattern"]:
            assert (
                describe_adapter(folder).r == 2
            )  # As it is read: PEFT builds it with r all the same.
            continue
        assert "adapter_model.safetensors: " in error_of(folder)
        with pytest.raises(AdapterError, match=said):
            describe_adapter(folder)


def test_tensors_at_fault_are_named_as_far_as_a_line_is_read(lora):
    edit(lora, r=5)
    message = error_of(lora)
    assert "8 tensors do not fit the config and the base" in message
    assert message.count("expected (") == 4
    assert message.endswith("; and 4 more")


def _adapter(kind, *layers):
    return ModelAdapter(kind, layers, projections=PROJECTIONS)


def test_adapters_that_no_folder_can_hold_are_refused(tmp_path):
    flora = make("flora").layers[0]
    other = dataclasses.replace(flora["mlp.c_proj"], reduction="sum")
    lora = make("lora").layers[0]["attn.c_attn"]
    batched = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), lora)
    cases = {
        "adapts no projection": _adapter("lora", {}, {}),
        "modules differ in": _adapter("flora", {**flora, "mlp.c_proj": other}),
        "expected the 2 axes": _adapter("lora", {"attn.c_attn": batched}),
        "settings steps have no place": dataclasses.replace(make("lora"), settings={"steps": 3}),
        "scale is inf": _adapter(
            "lora", {"attn.c_attn": dataclasses.replace(lora, scale=float("inf"))}
        ),
    }
    for message, adapter in cases.items():
        with pytest.raises(AdapterError, match=message):
            write_adapter(adapter, tmp_path / "a")
    assert not any(tmp_path.iterdir())
