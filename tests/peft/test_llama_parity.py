"""Random PEFT adapters on Llama's projections, all in one batch: each row's logits are PEFT's own."""

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import list_pairs
from flora_jax.mixing.ragged import ragged_hooks
from flora_jax.peft.read import write_adapter
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from tests.helpers import oracles
from tests.helpers.peft_folders import assert_logits_equal, assert_same, read_for
from tests.helpers.random_adapters import random_adapter
from tests.helpers.requests import make_request
from tests.helpers.torch_models import (
    flax_logits,
    random_peft,
    random_tokens,
    redrawn,
    to_flax,
    torch_logits,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, eos_token_id=0,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None,
)  # fmt: skip
# No bias, biases on all projections, biases on three of them beside a window.
MODELS = {
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=12),
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
}  # fmt: skip
PER_MODEL = 8


def torch_model(name):
    config = AutoConfig.for_model(**SHAPE, **MODELS[name])
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return redrawn(model, list(MODELS).index(name))


def random_config(number, rng):
    """A configuration of PEFT's; of each kind in turn, the first of each with PEFT's own targets."""
    kind, own = ("lora", "dora", "ia3", "hira")[number % 4], number >= 4
    ends = [str(end) for end in rng.choice(ENDS, rng.integers(2, 6), replace=False)]
    targets = dict(target_modules=ends) if own else {}
    if kind == "ia3":
        forward = [end for end in ends if rng.random() < 0.5]
        return peft.IA3Config(**targets, **(dict(feedforward_modules=forward) if own else {}))
    rank = int(rng.choice([1, 2, 3, 5, 8]))
    if kind == "hira":
        return peft.HiraConfig(r=rank, **targets)
    patterns = dict(
        rank_pattern={ends[0]: 4, r"layers\.1\..*": 6},
        alpha_pattern={rf"layers\.1\..*{ends[1]}": 9, ends[1]: 5},
        layers_to_transform=[None, [1]][number // 4 % 2],
    )
    # PEFT saves keys sorted, and the first that matches counts.
    for name in ("rank_pattern", "alpha_pattern"):
        patterns[name] = dict(sorted(patterns[name].items()))
    return peft.LoraConfig(
        r=rank, lora_alpha=float(rng.integers(1, 12)), use_rslora=bool(rng.integers(2)),
        use_dora=kind == "dora", task_type="CAUSAL_LM", **targets, **(patterns if own else {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    """A model's torch twin, ours, and adapters by name, each with the torch model under it."""
    name = request.param
    rng = np.random.default_rng(list(MODELS).index(name))
    model = to_flax(torch_model(name))
    adapters, theirs = {}, {}
    for number in range(PER_MODEL):
        config = random_config(number, rng)
        wrapped = random_peft(torch_model(name), config, seed=number)
        folder = tmp_path_factory.mktemp("adapter")
        wrapped.save_pretrained(folder)
        own = f"{number}-{type(config).__name__}"
        adapters[own], theirs[own] = read_for(model, folder), wrapped
    for number, reduction in enumerate(("mean", "sum")):
        own = f"flora-{reduction}"
        targets = tuple(model.config.projections())[number::2]
        adapters[own] = random_adapter(
            "flora", number, model.config.projections(), 2, rank=3, targets=targets,
            reduction=reduction,
        )  # fmt: skip
        theirs[own] = merged(torch_model(name), adapters[own])
    return torch_model(name), model, adapters, theirs


def merged(own, adapter):
    """The torch model with the explicit weights of an adapter that PEFT does not have."""
    with torch.no_grad():
        for number, layer in enumerate(adapter.layers):
            for target, params in layer.items():
                linear = own.get_submodule(adapter.projections.names.path(number, target))
                # A bias stays as it is.
                weight, _ = oracles.explicit_weight(params, linear.weight.T, 0)
                linear.weight.copy_(torch.tensor(weight.T))
    return own


@pytest.mark.parametrize("served", MODELS, indirect=True)
def test_rows_of_one_batch_have_pefts_logits_each_under_its_own_adapter(served):
    base, model, adapters, theirs = served
    rows = [None, *adapters]
    tokens = random_tokens(11, rows=len(rows), length=12)
    bank = build_bank(adapters, model.config.projections(), model.config.n_layer, model.weight)
    found = flax_logits(model, tokens, ragged_hooks(bank.layers, list_pairs(bank, rows)))
    plain = torch_logits(base, tokens)
    assert_logits_equal(found[0], plain[0])
    for row, name in enumerate(adapters, 1):
        expected = torch_logits(theirs[name], tokens[row : row + 1])[0]
        assert np.abs(expected - plain[row]).max() > 0.02 * np.abs(plain[row]).max(), name
        assert_logits_equal(found[row], expected)


@pytest.mark.parametrize("served", MODELS, indirect=True)
def test_a_folder_written_anew_is_the_same_to_peft(served, tmp_path):
    base, model, adapters, theirs = served
    tokens = random_tokens(12)
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / name, "some/base")
        again = read_for(model, tmp_path / name)
        assert again.targets() == adapter.targets()
        if adapter.kind == "flora":
            # The drawn one has no settings; those that were read follow from its factors.
            assert_same(dataclasses.replace(again, settings=adapter.settings), adapter)
            continue
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        np.testing.assert_array_equal(
            torch_logits(read, tokens), torch_logits(theirs[name], tokens), err_msg=name
        )


@pytest.mark.parametrize("served", ["qwen2"], indirect=True)
def test_the_engine_gives_each_row_what_peft_would_draw(served):
    """Prompts beyond the window, in chunks; of two logits that are all but equal either may be drawn."""
    base, model, adapters, theirs = served
    chosen = dict(list(adapters.items())[4:])
    options = EngineOptions(max_num_seqs=8, max_model_len=24, chunk=8, block_size=4)
    rng = np.random.default_rng(0)
    requests = [
        make_request(
            n, tuple(rng.integers(1, 97, 11).tolist()), name, max_tokens=6, ignore_eos=True
        )
        for n, name in enumerate((None, *chosen))
    ]
    with Engine(model, chosen, options=options) as engine:
        completions = list(generate(engine, requests))
    for request, completion in zip(requests, completions, strict=True):
        own = base if request.adapter is None else theirs[request.adapter]
        tokens = np.asarray([(*request.prompt_token_ids, *completion.token_ids)])
        scores = torch_logits(own, tokens)[0, len(request.prompt_token_ids) - 1 : -1]
        drawn = scores[np.arange(6), list(completion.token_ids)]
        assert len(completion.token_ids) == 6
        np.testing.assert_allclose(drawn, scores.max(-1), rtol=0, atol=1e-4)
