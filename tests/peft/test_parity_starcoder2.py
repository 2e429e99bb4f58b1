"""PEFT's adapters on StarCoder2's projections: logits under its folders and ours, single and mixed."""

import dataclasses

import numpy as np
import pytest
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import list_pairs
from flora_jax.mixing.ragged import ragged_hooks
from flora_jax.peft.read import write_adapter
from tests.helpers.peft_folders import assert_logits_equal, assert_same, read_for
from tests.helpers.torch_models import (
    flax_logits,
    random_peft,
    random_tokens,
    redrawn,
    to_flax,
    torch_logits,
)

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5 by a name that is on its way out.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

CASES = {
    "lora-attention": ("LoraConfig", dict(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"])),
    "lora-rslora-patterns": (
        "LoraConfig",
        dict(
            r=4, lora_alpha=2.7, use_rslora=True,
            target_modules=["q_proj", "k_proj", "o_proj", "c_fc", "mlp.c_proj"],
            rank_pattern={"k_proj": 3, r"layers\.1\.mlp.*": 5}, alpha_pattern={"c_fc": 7},
        ),
    ),
    "dora-all-linear": (
        "LoraConfig", dict(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True),
    ),
    "ia3-feedforward": (
        "IA3Config",
        dict(target_modules=["k_proj", "v_proj", "c_proj"], feedforward_modules=["c_proj"]),
    ),
    "hira-one-layer": (
        "HiraConfig", dict(r=3, target_modules=["o_proj", "c_fc"], layers_to_transform=[0]),
    ),
}  # fmt: skip


def tiny_torch(seed=0):
    config = Starcoder2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
        sliding_window=5, eos_token_id=0, bos_token_id=0, use_bias=seed % 2 == 0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return redrawn(Starcoder2ForCausalLM(config).eval(), seed)


@pytest.fixture(scope="module", params=[0, 1], ids=["biases", "without"])
def folders(request, tmp_path_factory):
    """Every case's folder as PEFT wrote it, and PEFT's logits."""
    seed, home, found = request.param, tmp_path_factory.mktemp("peft"), {}
    tokens = random_tokens(seed)
    for number, (case, (config, options)) in enumerate(CASES.items()):
        own = getattr(peft, config)(**options)
        wrapped = random_peft(tiny_torch(seed), own, seed=10 * seed + number)
        wrapped.save_pretrained(home / case)
        found[case] = (home / case, torch_logits(wrapped, tokens))
    return seed, to_flax(tiny_torch(seed)), tokens, found


def test_logits_equal_pefts_for_its_folders_and_for_ours(folders, tmp_path):
    seed, model, tokens, found = folders
    plain = flax_logits(model, tokens)
    for case, (folder, expected) in found.items():
        assert np.abs(expected - plain).max() > 0.05, case
        adapter = read_for(model, folder)
        assert_logits_equal(flax_logits(model, tokens, adapter.layers), expected)
        write_adapter(adapter, tmp_path / case, "some/base")
        again = peft.PeftModel.from_pretrained(tiny_torch(seed), tmp_path / case)
        np.testing.assert_array_equal(torch_logits(again.eval(), tokens), expected)
        settings = {**adapter.settings, "base_model_name_or_path": "some/base"}
        assert_same(
            read_for(model, tmp_path / case), dataclasses.replace(adapter, settings=settings)
        )


def test_rows_of_one_batch_equal_peft_row_by_row(folders):
    _, model, tokens, found = folders
    projections, layers = model.config.projections(), model.config.n_layer
    adapters = {case: read_for(model, folder) for case, (folder, _) in found.items()}
    bank = build_bank(adapters, projections, layers, model.weight)
    hooks = ragged_hooks(bank.layers, list_pairs(bank, list(found)))
    rows = flax_logits(model, np.repeat(tokens[:1], len(found), axis=0), hooks)
    for row, (_, expected) in zip(rows, found.values(), strict=True):
        assert_logits_equal(row, expected[0])


def test_peft_has_no_targets_of_its_own_for_this_family():
    """So that there are none to follow where a folder names none."""
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(tiny_torch(), peft.LoraConfig())
