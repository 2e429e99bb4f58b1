"""Adapter folders read back bit for bit, describe themselves, and hold FLoRA as we define it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters import KINDS, FLoRA
from flora_jax.adapters.model_adapter import ModelAdapter, rank_of
from flora_jax.peft.read import describe_adapter, read_adapter, write_adapter
from tests.helpers.broken_folders import PROJECTIONS, edit, edit_tensors, error_of, make
from tests.helpers.peft_folders import (
    assert_logits_equal,
    assert_same,
    random_factors,
    read_for,
    some_adapter,
)
from tests.helpers.random_adapters import projections_of
from tests.helpers.torch_models import (
    flax_logits,
    random_tokens,
    tiny_torch_model,
    to_flax,
    torch_logits,
)

TARGETS = tuple(PROJECTIONS)


@pytest.mark.parametrize("targets", [TARGETS[:1], TARGETS[1:3], TARGETS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_written_adapter_reads_back_to_the_bit(kind, targets, tmp_path):
    projections = PROJECTIONS
    rng = np.random.default_rng(len(targets))
    layers = tuple(
        {target: random_factors(kind, *projections[target], 2, rng) for target in targets}
        for _ in range(3)
    )
    adapter = ModelAdapter(kind, layers, {"task_type": "CAUSAL_LM"}, projections=projections)
    write_adapter(adapter, tmp_path / "a")
    assert_same(read_adapter(tmp_path / "a", projections, 3), adapter)
    part = dataclasses.replace(adapter, layers=({}, *adapter.layers[1:]))
    write_adapter(part, tmp_path / "part")
    assert_same(read_adapter(tmp_path / "part", projections, 3), part)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_flora_folder_gives_the_logits_of_explicitly_merged_weights(reduction, rank, tmp_path):
    import torch

    torch_model = tiny_torch_model(rank)
    model = to_flax(torch_model)
    tokens = random_tokens(rank)
    rng = np.random.default_rng(rank)
    layers = tuple(
        {
            target: random_factors("flora", *widths, rank, rng, reduction=reduction)
            for target, widths in model.config.projections().items()
        }
        for _ in range(2)
    )
    adapter = ModelAdapter("flora", layers, projections=model.config.projections())
    write_adapter(adapter, tmp_path / "a", "some/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["reduction"]) == ("FLORA", rank, reduction)
    adapter = read_for(model, tmp_path / "a")
    assert adapter.settings["base_model_name_or_path"] == "some/base"
    linears = dict(torch_model.named_modules())
    for number, layer in enumerate(adapter.layers):
        for target, params in layer.items():
            factor = np.asarray(params.down_RI).T @ np.asarray(params.up_RO)
            factor = factor / rank if reduction == "mean" else factor
            with torch.no_grad():
                linears[f"transformer.h.{number}.{target}"].weight.mul_(torch.tensor(factor.T))
    assert_logits_equal(
        flax_logits(model, tokens, adapter.layers), torch_logits(torch_model, tokens)
    )


def test_floras_frozen_components_and_uneven_ranks_are_kept(tmp_path):
    model = to_flax(tiny_torch_model(0))
    uneven = some_adapter("flora", model, 2, reduction="sum", frozen=1)
    adapter = dataclasses.replace(uneven, settings={"init": "frozen_ones"})
    write_adapter(adapter, tmp_path / "a")
    assert_same(read_for(model, tmp_path / "a"), adapter)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_factors_of_another_float_dtype_are_widened_exactly(dtype, file, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model = to_flax(tiny_torch_model(0))
    adapter = some_adapter("lora", model, 1)
    rounded = jax.tree.map(
        lambda x: x.astype("float32" if dtype == "float64" else dtype).astype(jnp.float32),
        adapter.layers,
    )
    folder = write_adapter(adapter, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(path).items()}
    path.unlink()
    save_file(tensors, path) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    found = read_for(model, folder)
    assert_same(found, dataclasses.replace(adapter, layers=rounded))
    summary = describe_adapter(folder)
    size = {"float16": 2, "bfloat16": 2, "float64": 8}[dtype]
    assert summary.bytes == size * summary.parameters == size * adapter.parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_described_without_its_base(kind, tmp_path):
    model = to_flax(tiny_torch_model(0))
    adapter = some_adapter(kind, model, 4)
    write_adapter(adapter, tmp_path / "a", "some/base")
    summary = describe_adapter(tmp_path / "a")
    assert summary.kind == kind
    assert summary.base_model_name_or_path == "some/base"
    assert summary.targets == adapter.targets() == TARGETS
    assert summary.layers == (0, 1)
    assert summary.reduction == ("mean" if kind == "flora" else None)
    assert summary.parameters == adapter.parameters()
    assert summary.bytes == adapter.bytes()
    assert summary.dtypes == ("F32",)
    for target in TARGETS:
        ranks = {rank_of(layer[target]) for layer in adapter.layers if target in layer}
        assert summary.ranks[target] == tuple(sorted(ranks))
    widths = {"attn.c_attn": (32, 48), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 48)}
    widths["mlp.c_proj"] = (48, 32)
    if kind == "ia3":
        widths = {target: (None, outputs) for target, (_, outputs) in widths.items()}
        widths["mlp.c_proj"] = (48, None)
    assert summary.widths == widths


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_in_no_layer_adapts_nothing_where_another_one_does(kind, tmp_path):
    adapter = make(kind)
    folder = write_adapter(adapter, tmp_path / "a")
    assert describe_adapter(folder).unused == ()
    # As StarCoder's own fine-tuning scripts name them: the model has no q_attn.
    edit(folder, target_modules=["c_attn", "q_attn", "mlp.c_proj"])
    assert_same(read_adapter(folder, PROJECTIONS, 2), adapter)
    assert describe_adapter(folder).unused == ("q_attn",)

    def rename(tensors):
        for name in [name for name in tensors if "0.attn.c_attn" in name]:
            tensors[name.replace("c_attn", "q_attn")] = tensors[name]

    edit_tensors(folder, rename)
    assert "0.attn.q_attn." in error_of(folder)
    edit(folder, target_modules=["q_attn"])
    assert "'q_attn', which is in no layer" in error_of(folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_survive_as_alphas(rslora, tmp_path):
    projections = projections_of({"attn.c_attn": (4, 6)})
    for number, alpha in enumerate((1, 3, 0.1, 7.77, 32, 1e-5)):
        for rank in (1, 3, 7):
            scale = alpha / (np.sqrt(rank) if rslora else rank)
            rng = np.random.default_rng(rank)
            params = random_factors("lora", 4, 6, rank, rng, scale=float(scale))
            settings = {"use_rslora": True} if rslora else {}
            adapter = ModelAdapter(
                "lora", ({"attn.c_attn": params},), settings, projections=projections
            )
            folder = write_adapter(adapter, tmp_path / f"{number}-{rank}")
            assert_same(read_adapter(folder, projections, 1), adapter)
            raw = json.loads((folder / "adapter_config.json").read_text())
            assert raw["lora_alpha"] == pytest.approx(alpha, rel=1e-15)


def test_flora_reads_its_sides_from_b_and_a(tmp_path):
    params = FLoRA(jnp.ones((2, 4)), 2 * jnp.ones((2, 6)))
    adapter = ModelAdapter("flora", ({"attn.c_attn": params},), projections=PROJECTIONS)
    folder = write_adapter(adapter, tmp_path / "a")
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.transformer.h.0.attn.c_attn."
    assert {name: array.shape for name, array in tensors.items()} == {
        stem + "flora_B": (2, 4),
        stem + "flora_A": (2, 6),
    }
