"""A family needs its own description and nothing else: a second one is stored, served and trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flora_jax.adapters.model_adapter import init_adapter, randomise
from flora_jax.checkpoints import CheckpointError, open_checkpoint
from flora_jax.checkpoints.checkpoint import save_hf, save_orbax
from flora_jax.errors import InputError
from flora_jax.models import family
from flora_jax.models.model import abstract_model, init_model
from flora_jax.models.quantize import quantize_model
from flora_jax.models.sharding import named_leaves, partition_specs
from flora_jax.peft.read import describe_adapter, read_adapter, write_adapter
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from flora_jax.train.step import StepOptions, init_adapter_state, make_adapter_step
from flora_jax.weights.held import Held, stored_array
from flora_jax.weights.quantized import Quantized
from tests.helpers import second_family
from tests.helpers.broken_folders import edit
from tests.helpers.peft_folders import assert_same
from tests.helpers.requests import make_request
from tests.helpers.second_family import EchoConfig
from tests.helpers.tiny_training import random_batch, stacked

CONFIG = EchoConfig()


@pytest.fixture(autouse=True, scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(family.FAMILIES, "echo", second_family.__name__)
        yield


@pytest.fixture(scope="module")
def model(registered):
    return init_model(CONFIG, 3)


# What Unsloth and trainers add to any model's config.json.
OF_TOOLS = {
    "hidden_dropout": 0.0, "loss_type": "ForCausalLM", "model_name": "unsloth/a-model",
    "unsloth_fixed": True, "unsloth_version": "2025.3.19",
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "starcoder2", "gpt_bigcode"]
)
def test_what_tools_add_to_a_configuration_changes_nothing(model_type):
    raw = {"model_type": model_type, "num_hidden_layers": 2}
    assert family.read_family_config(raw | OF_TOOLS, "") == family.read_family_config(raw, "")


def adapter_of(kind, seed, targets=None, rank=2):
    fresh = init_adapter(
        jax.random.key(seed), kind, CONFIG.projections(), CONFIG.n_layer,
        rank=1 if kind == "ia3" else rank, targets=targets, weights=init_model(CONFIG, 3).weight,
    )  # fmt: skip
    return randomise(fresh, seed)


def bits(model):
    leaves, _ = named_leaves(model.params)
    return {path: np.asarray(stored_array(leaf)).tobytes() for path, leaf in leaves.items()}


def test_a_family_is_found_by_the_model_type(model):
    assert family.family_of(CONFIG) is second_family.FAMILY
    assert model.embedding.shape == (97, 16)
    with pytest.raises(InputError, match=r"x: model_type is 'other', expected 'echo' or 'gpt_big"):
        family.read_family_config({"model_type": "other"}, "x")
    for wrong in ({}, {"model_type": 3}, {"model_type": ["echo"]}):
        with pytest.raises(InputError, match="x: model_type is"):
            family.read_family_config(wrong, "x")


def test_its_checkpoints_come_back_to_the_bit(model, tmp_path):
    for save, name in ((save_hf, "hf"), (save_orbax, "flax")):
        save(model, tmp_path / name)
        opened = open_checkpoint(tmp_path / name)
        assert opened.config == CONFIG
        assert bits(opened.load()) == bits(model)
        assert opened.describe().parameters == sum(x.size for x in jax.tree.leaves(model.params))
    quantised = open_checkpoint(tmp_path / "hf").load(quantize="int8")
    for path, leaf in named_leaves(quantised.params)[0].items():
        assert isinstance(leaf, Quantized) == path.endswith("kernel")
    save_hf(init_model(EchoConfig(num_hidden_layers=3)), tmp_path / "deep")
    (tmp_path / "deep" / "config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.up_proj\.weight is unexp"):
        open_checkpoint(tmp_path / "deep").load()


def test_every_parameter_has_axes(model):
    for own in (model, quantize_model(model, "int8")):
        specs = partition_specs(own.params, second_family.FAMILY.axes)
        assert len(jax.tree.leaves(specs)) == len(jax.tree.leaves(own.params))


@pytest.mark.parametrize("name", ["mini", "llama-3-8b", "echo"])
def test_weights_are_held_by_outputs_exactly_where_files_have_them_so(name):
    config = CONFIG if name == "echo" else family.presets()[name]
    if name == "llama-3-8b":
        config = dataclasses.replace(config, num_hidden_layers=2, windows=config.windows[:2])
    leaves, _ = named_leaves(abstract_model(config).params)
    table = family.family_of(config).tensors(config)
    assert set(leaves) == set(table)
    for path, leaf in leaves.items():
        assert isinstance(leaf, Held) == table[path].by_outputs, path
        assert stored_array(leaf).shape == table[path].shape, path


@pytest.mark.parametrize("kind", ["lora", "flora", "ia3", "hira", "dora"])
def test_its_adapter_folders_have_its_own_names(kind, tmp_path):
    projections = CONFIG.projections()
    whole = adapter_of(kind, 1, tuple(projections))
    write_adapter(whole, tmp_path / "whole")
    assert_same(read_adapter(tmp_path / "whole", projections, 2), whole)
    found = describe_adapter(tmp_path / "whole")
    assert (set(found.targets), found.layers) == (set(projections), (0, 1))
    # Where the file names no targets they are PEFT's for the family.
    ends = second_family.NAMES.default_targets(kind)
    assert ends == (("k_proj", "v_proj", "down_proj") if kind == "ia3" else ("q_proj", "v_proj"))
    usual = adapter_of(kind, 2, tuple(t for t in projections if t.endswith(ends)))
    write_adapter(usual, tmp_path / "usual")
    edit(tmp_path / "usual", target_modules=None)
    if kind == "ia3":
        edit(tmp_path / "usual", feedforward_modules=None)
        assert usual.layers[0]["down_proj"].side == "input"
    assert_same(read_adapter(tmp_path / "usual", projections, 2), usual)


def test_rows_of_one_batch_draw_what_the_whole_model_does_under_their_adapters(model):
    targets = tuple(CONFIG.projections())
    adapters = {
        kind: adapter_of(kind, n, targets) for n, kind in enumerate(("lora", "flora", "ia3"))
    }
    options = EngineOptions(max_num_seqs=5, max_model_len=24, chunk=8, block_size=4)
    rng = np.random.default_rng(0)
    requests = [
        make_request(
            n, tuple(rng.integers(1, 97, 11).tolist()), name, max_tokens=6, ignore_eos=True
        )
        for n, name in enumerate((None, *adapters))
    ]
    with_engine = Engine(model, adapters, options=options)
    completions = list(generate(with_engine, requests))
    with_engine.close()

    forward = jax.jit(
        lambda params, tokens_BT, layers: _logits(nnx.merge(model.graph, params), tokens_BT, layers)
    )
    different = set()
    for request, completion in zip(requests, completions, strict=True):
        layers = None if request.adapter is None else adapters[request.adapter].layers
        tokens = jnp.asarray([(*request.prompt_token_ids, *completion.token_ids)], jnp.int32)
        scores = np.asarray(forward(model.params, tokens, layers))[
            0, len(request.prompt_token_ids) - 1 : -1
        ]
        top = np.sort(scores, axis=-1)
        assert (top[:, -1] - top[:, -2]).min() > 1e-4
        assert scores.argmax(-1).tolist() == list(completion.token_ids)
        different.add(tuple(completion.token_ids))
    assert len(different) > 1


def _logits(whole, tokens_BT, layers):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return whole.logits(whole.hidden(tokens_BT, positions_BT, adapters=layers)[0])


def test_an_adapter_of_it_learns_over_a_frozen_base(model):
    adapter = init_adapter(jax.random.key(0), "lora", CONFIG.projections(), 2, rank=2)
    assert adapter.targets() == ("mixer.q_proj", "mixer.v_proj")
    optimizer = optax.sgd(1.0)
    step = make_adapter_step(model.graph, optimizer, lambda _: jnp.float32(1.0), StepOptions())
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(stacked([adapter]), optimizer)
    before, batch, losses = bits(model), random_batch(0), []
    for _ in range(8):
        state, measured = step(state, model.params, batch, jax.random.split(jax.random.key(1), 1))
        losses.append(float(measured["loss"][0]))
    assert losses[-1] < losses[0] - 0.02
    assert bits(model) == before
