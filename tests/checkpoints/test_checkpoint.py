"""Checkpoints: parity with transformers both ways, every tensor accounted for, errors at their cause."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, GPTBigCodeForCausalLM

from flora_jax.checkpoints import checkpoint, sources
from flora_jax.checkpoints.checkpoint import (
    CheckpointError,
    describe,
    load_model,
    open_checkpoint,
    save_hf,
    save_orbax,
)
from flora_jax.checkpoints.tensor_files import stored_tensors
from flora_jax.cli.convert import convert as convert_verb
from flora_jax.cli.info_rows import describe_rows
from flora_jax.errors import InputError
from flora_jax.models.model import Model, abstract_model
from flora_jax.models.sharding import named_leaves
from flora_jax.models.starcoder.names import hf_tensors
from flora_jax.shipped import ASSETS
from flora_jax.weights.held import stored_array
from tests.helpers.torch_models import flax_logits, random_tokens, tiny_torch_model, torch_logits

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [dict(multi_query=mq, tie_word_embeddings=tied) for mq in (1, 0) for tied in (1, 0)]
SHAPES = [{key: bool(value) for key, value in shape.items()} for shape in SHAPES]


def bits(model: Model) -> dict[str, tuple]:
    leaves, _ = named_leaves(model.params)
    arrays = {path: np.asarray(stored_array(leaf)) for path, leaf in leaves.items()}
    return {path: (str(x.dtype), x.shape, x.tobytes()) for path, x in arrays.items()}


def file_bits(directory: Path) -> dict[str, tuple]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                value = tensors.get_tensor(name)
                raw = value.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(value.dtype), tuple(value.shape), raw)
    return found


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A tied multi-query checkpoint as transformers writes it."""
    tiny_torch_model(1).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def rewrite(directory: Path, change) -> None:
    """Applies ``change`` to the dictionary of tensors of model.safetensors."""
    file = directory / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        state = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
    change(state)
    save_file({name: value.contiguous() for name, value in state.items()}, file)


@pytest.mark.parametrize("seed, shape", list(enumerate(SHAPES)))
def test_logits_survive_load_and_export(tmp_path, seed, shape):
    reference = tiny_torch_model(seed, **shape)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    tokens = random_tokens(seed)
    expected = torch_logits(reference, tokens)
    np.testing.assert_allclose(flax_logits(model, tokens), expected, atol=2e-5)

    save_hf(model, tmp_path / "ours")
    assert file_bits(tmp_path / "ours") == file_bits(tmp_path / "theirs")
    again = GPTBigCodeForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    np.testing.assert_array_equal(torch_logits(again, tokens), expected)
    assert bits(load_model(tmp_path / "ours")) == bits(model)


@pytest.mark.parametrize("seed, shape", [(0, SHAPES[0]), (1, SHAPES[3])])
def test_shards_and_torch_files_load_to_the_same_bits(tmp_path, seed, shape):
    reference = tiny_torch_model(seed, **shape)
    reference.save_pretrained(tmp_path / "one")
    expected = bits(load_model(tmp_path / "one"))

    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert bits(load_model(tmp_path / "many")) == expected

    save_hf(load_model(tmp_path / "many"), tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert file_bits(tmp_path / "ours") == file_bits(tmp_path / "one")
    again = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), reference.parameters(), strict=True)
    )

    for folder, half in (("bin", None), ("bins", 9)):
        directory = tmp_path / folder
        directory.mkdir()
        (directory / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
        items = list(reference.state_dict().items())
        if half is None:
            torch.save(dict(items), directory / "pytorch_model.bin")
        else:
            parts = {"pytorch_model-1.bin": items[:half], "pytorch_model-2.bin": items[half:]}
            for name, part in parts.items():
                torch.save(dict(part), directory / name)
            weight_map = {key: name for name, part in parts.items() for key, _ in part}
            index = directory / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"weight_map": weight_map}))
        assert bits(load_model(directory)) == expected


@pytest.mark.parametrize("word, kind", [("bfloat16", jnp.bfloat16), ("float16", jnp.float16)])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_sixteen_bits_are_kept_and_cast_once(tmp_path, tiny, word, kind, form):
    half = tiny_torch_model(1).to(getattr(torch, word))
    half.save_pretrained(tmp_path / "half")
    if form == "bin":
        torch.save(half.state_dict(), tmp_path / "half" / "pytorch_model.bin")
        (tmp_path / "half" / "model.safetensors").unlink()
    model = load_model(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(kind)}
    # A cast while loading rounds as PyTorch does, and widening changes no value.
    assert bits(load_model(tiny, word)) == bits(model)
    widened = load_model(tmp_path / "half", "float32")
    assert bits(Model(*model[:2], jax.tree.map(lambda x: x.astype(kind), widened.params))) == bits(
        model
    )
    save_hf(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == word
    tokens = random_tokens(0)
    again = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters()))
    got = torch_logits(again.float(), tokens)
    np.testing.assert_allclose(flax_logits(widened, tokens), got, atol=2e-5)


@pytest.mark.parametrize(
    "seed, shape, word", [(0, SHAPES[0], "float32"), (3, SHAPES[3], "bfloat16")]
)
def test_orbax_round_trip_keeps_every_bit(tmp_path, seed, shape, word):
    tiny_torch_model(seed, **shape).to(getattr(torch, word)).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    model = load_model(tmp_path / "hf")
    save_orbax(model, tmp_path / "orbax", companions=tmp_path / "hf")
    restored = load_model(tmp_path / "orbax")
    assert bits(restored) == bits(model)
    assert restored.config == model.config
    save_hf(restored, tmp_path / "back", companions=tmp_path / "orbax")
    assert file_bits(tmp_path / "back") == file_bits(tmp_path / "hf")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    other = "bfloat16" if word == "float32" else "float32"
    assert bits(load_model(tmp_path / "orbax", other)) == bits(load_model(tmp_path / "hf", other))
    described = [describe(tmp_path / name) for name in ("hf", "orbax")]
    assert [d.format for d in described] == ["safetensors", "orbax"]
    for d in described:
        leaves = jax.tree.leaves(model.params)
        assert d.parameters == sum(leaf.size for leaf in leaves)
        assert d.bytes == sum(leaf.nbytes for leaf in leaves)
        assert d.disk_bytes > 0


def test_the_name_table_has_the_shapes_of_the_model(tiny):
    for overrides in SHAPES:
        config = tiny_torch_model(0, **overrides).config.to_dict()
        ours = type(load_model(tiny).config).from_dict(config)
        leaves, _ = named_leaves(abstract_model(ours).params)
        stored = {path: stored_array(leaf).shape for path, leaf in leaves.items()}
        assert stored == {path: tensor.shape for path, tensor in hf_tensors(ours).items()}


def causal(n: int = 48, kind=torch.bool) -> torch.Tensor:
    return torch.tril(torch.ones(n, n)).to(kind)[None, None]


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_redundant_tensors_are_accepted_where_they_agree(tiny, kind):
    expected = bits(load_model(tiny))

    def add(state):
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
        state["transformer.bias"] = causal(kind=kind)[0, 0]
        state["transformer.h.0.attn.bias"] = causal(kind=kind)
        value = torch.tensor(-1e4)
        state["transformer.h.1.attn.masked_bias"] = value.to(
            kind if kind.is_floating_point else torch.float16
        )

    rewrite(tiny, add)
    assert bits(load_model(tiny)) == expected

    def strip(state):
        del state["lm_head.weight"]
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)

    rewrite(tiny, strip)
    assert bits(load_model(tiny)) == expected
    rewrite(tiny, lambda state: state.update({"lm_head.weight": state.pop("wte.weight")}))
    assert bits(load_model(tiny)) == expected


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("lm_head.weight", torch.zeros(97, 32), "lm_head.weight in model.safetensors differs"),
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 48, 48), "is not the causal mask of 48"),
        ("transformer.h.0.attn.bias", causal(40), "shape .1, 1, 40, 40., is not the causal mask"),
        ("transformer.h.1.attn.masked_bias", torch.tensor(0.0), "has value 0, expected"),
        ("transformer.h.2.attn.bias", causal(), "h.2.attn.bias .* is unexpected"),
        ("wte.weight", torch.zeros(97, 32), "are the same parameter"),
    ],
)
def test_redundant_tensors_that_disagree_are_refused(tiny, name, value, message):
    rewrite(tiny, lambda state: state.update({name: value}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tiny)


def test_one_error_lists_every_tensor_that_does_not_fit(tiny):
    def damage(state):
        del state["transformer.ln_f.bias"]
        state["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(32, 48)
        state["transformer.h.1.mlp.c_fc.bias"] = torch.zeros(48, dtype=torch.int32)
        state["transformer.h.1.mlp.c_proj.weight"] = torch.zeros(32, 48, dtype=torch.float8_e4m3fn)
        state["transformer.extra"] = torch.zeros(3)

    rewrite(tiny, damage)
    with pytest.raises(CheckpointError) as caught:
        load_model(tiny)
    for part in (
        f"{tiny}: 5 tensors do not fit config.json",
        "transformer.ln_f.bias is missing, expected shape (32,)",
        "transformer.h.0.mlp.c_fc.weight in model.safetensors has shape (32, 48), expected (48, 32)",
        "transformer.h.1.mlp.c_fc.bias in model.safetensors is int32, expected floating point",
        "transformer.h.1.mlp.c_proj.weight in model.safetensors is F8_E4M3",
        "transformer.extra in model.safetensors is unexpected, of shape (3,)",
    ):
        assert part in str(caught.value)


def test_an_untied_model_needs_its_head(tmp_path):
    tiny_torch_model(0, tie_word_embeddings=False).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is missing, expected shape \(97, 32"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_one_error_with_its_name(tiny, kept):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load_model(tiny)


def test_values_too_large_for_the_dtype_are_an_error(tmp_path, tiny):
    rewrite(tiny, lambda state: state["transformer.wpe.weight"].add_(1e6))
    with pytest.raises(CheckpointError, match=r"wpe\.weight has values up to 1e\+06, too large"):
        load_model(tiny, "float16")
    save_orbax(load_model(tiny, ml_dtypes.bfloat16), tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=r"wpe\.embedding has values too large for float16"):
        load_model(tmp_path / "orbax", "float16")


def test_a_torch_file_cannot_run_code_or_hold_other_things(tmp_path, tiny):
    (tiny / "model.safetensors").unlink()
    file = tiny / "pytorch_model.bin"
    witness = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (witness,))

    for value in ({"a": Hostile()}, {"a": 3}, [torch.zeros(1)]):
        torch.save(value, file)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
            load_model(tiny)
    assert not witness.exists()
    file.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: damaged"):
        load_model(tiny)


# PyTorch makes an error of another type of each, some of them without a message.
@pytest.mark.parametrize(
    "found", [b"abc", b"", b"\x80\x02}q.", b"{}", b"\x80\x02K", b"j", b"R", b"e."]
)
def test_bytes_that_are_no_torch_file_are_one_error_with_its_name(tmp_path, found):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(found)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: damaged, .*: \S") as caught:
        stored_tensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_torch_file_without_torch_says_what_to_install(tiny, monkeypatch):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="pip install torch, or convert it to safetensors"):
        load_model(tiny)


def test_an_index_and_its_shards_must_agree(tmp_path):
    tiny_torch_model(0).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for weight_map, message in (
        ({**good["weight_map"], "more": "absent.safetensors"}, "missing beside it: absent"),
        (
            {**good["weight_map"], "more": "../x.safetensors"},
            "names of files in the same directory",
        ),
        (dict(list(good["weight_map"].items())[1:]), "holds tensors that the index does not have"),
        (3, "not an index of shards"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)


def test_sources_that_are_no_checkpoint_are_named(tmp_path, tiny, monkeypatch):
    for read in (load_model, describe):
        for source, message in (
            (tmp_path / "absent", "no such file or directory, and not a Hugging Face id"),
            ("./absent", "no such file or directory, and not a Hugging Face id"),
            (
                "nobody/nothing",
                "no such file or directory, and the Hugging Face hub (gives no model|cannot be)",
            ),
            (tmp_path, "not a checkpoint: no config.json"),
            (tiny / "config.json", "is a file, expected a directory"),
        ):
            with pytest.raises(CheckpointError, match=message) as caught:
                read(source)
            assert str(source) in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="dtype is 'int8', expected float32"):
        load_model(tiny, "int8")
    # A hub id that the hub knows becomes a directory.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny))
    assert sources.resolve("owner/tiny") == tiny
    assert describe("owner/tiny").format == "hub"
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'mamba'"):
        load_model(tiny)


@pytest.mark.parametrize(
    ("found", "expected"), [(5, (5,)), ([5, 7], (5, 7)), ([7, 0, 7], (0, 7)), (None, (0,))]
)
def test_end_tokens_of_generation_config_take_precedence(tiny, found, expected):
    raw = {"eos_token_id": found, "max_length": 20}
    (tiny / "generation_config.json").write_text(json.dumps(raw))
    assert open_checkpoint(tiny).config.eos_token_ids == expected
    if found is not None:
        theirs = GenerationConfig.from_pretrained(tiny).eos_token_id
        assert set(np.atleast_1d(theirs)) == set(expected)


@pytest.mark.parametrize("found", ["x", [], [1.5], -1, True, [2**31]])
def test_end_tokens_that_are_none_are_named(tiny, found):
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    message = r"generation_config\.json: eos_token_id is .*, expected token ids"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tiny)


def test_an_index_may_list_a_tied_head_that_no_shard_holds(tmp_path):
    tiny_torch_model(0).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = bits(load_model(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["lm_head.weight"] = raw["weight_map"]["transformer.wte.weight"]
    index.write_text(json.dumps(raw))
    assert bits(load_model(tmp_path)) == expected
    # What is needed has to be there.
    raw["weight_map"]["lm_head.weight"] = "gone.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="missing beside it: gone"):
        load_model(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    tiny_torch_model(0).save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=f"{second.name}: holds .*, as does {first.name}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "field", ["n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size"]
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(tiny, field):
    raw = json.loads((tiny / "config.json").read_text()) | {field: 1_000_000_000}
    (tiny / "config.json").write_text(json.dumps(raw))
    for read in (load_model, describe):
        with pytest.raises(CheckpointError, match=f"{field} is 1000000000, expected at most"):
            read(tiny)


def test_a_configuration_that_the_tensors_do_not_fit_builds_nothing(tiny, monkeypatch):
    raw = json.loads((tiny / "config.json").read_text()) | {"n_layer": 900}
    (tiny / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(checkpoint, "abstract_model", None)
    with pytest.raises(CheckpointError, match=r"tensors do not fit config\.json"):
        load_model(tiny)


def test_a_hub_id_whose_config_names_no_dtype_is_loaded_in_that_of_its_weights(
    tmp_path, tiny, monkeypatch
):
    raw = json.loads((tiny / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        raw.pop(name, None)
    rewrite(tiny, lambda state: state.update({n: t.half() for n, t in state.items()}))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text(json.dumps(raw))

    def fetch(hub_id, weights):
        if weights:
            shutil.copy(tiny / "model.safetensors", snapshot)
        return snapshot

    monkeypatch.setattr(sources, "_fetch", fetch)
    opened = open_checkpoint("owner/tiny")
    assert opened.describe().bytes is None
    rows = dict(describe_rows("owner/tiny"))
    assert rows["bytes"] == "not known before the weights are fetched: config.json names no dtype"
    first, found = opened.load(), describe("owner/tiny")
    assert first.config.dtype == first.embedding.dtype == "float16"
    assert found.bytes == 2 * found.parameters
    assert dict(describe_rows("owner/tiny"))["bytes"] == f"{found.bytes:,} as float16"
    again = load_model("owner/tiny")
    assert again.config == first.config
    assert bits(again) == bits(first)


def test_a_shipped_model_is_described_by_its_files():
    found = describe("mini")
    files = (ASSETS / "mini").glob("*.safetensors")
    assert (found.source, found.format) == ("mini", "safetensors")
    assert found.disk_bytes == sum(file.stat().st_size for file in files) > found.bytes


def test_a_relative_path_is_the_same_directory_after_the_process_has_moved(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    opened = open_checkpoint("tiny")
    expected = bits(opened.load())
    assert str(opened.directory) == "tiny"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert bits(opened.load()) == expected
    assert (opened.format, opened.describe().format) == ("safetensors", "safetensors")
    assert (opened.source, opened.tokenizer) == ("tiny", None)


def test_opening_looks_at_no_tensor(tiny):
    (tiny / "model.safetensors").write_bytes(b"")
    opened = open_checkpoint(tiny)
    assert (opened.config.n_layer, opened.tokenizer, opened.directory) == (2, None, tiny)
    with pytest.raises(CheckpointError, match="truncated"):
        opened.describe()


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tiny, caplog):
    asked = []

    def unreachable(_, hub_id, timeout):
        asked.append((hub_id, timeout))
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(CheckpointError, match="the Hugging Face hub cannot be reached") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert "Name or service not known" in str(caught.value)
    assert len(asked) == 1
    assert asked[0][1] <= 10
    assert caplog.text == ""


def test_names_and_files_that_cannot_be_read_are_one_line(tiny, tmp_path):
    for source, message in (
        ("", "the model is '', expected a directory or a Hugging Face id"),
        (" ", "the model is ' ', expected"),
        ("y" * 300, "cannot be read: File name too long"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(source)
    for name in ("config.json", "generation_config.json"):
        (tiny / name).write_bytes(b"\xff{")
        with pytest.raises(CheckpointError, match=f"{name}: not JSON"):
            open_checkpoint(tiny)
        (tiny / name).write_text("[1]")
        with pytest.raises(CheckpointError, match=f"{name}: expected a JSON object, found list"):
            open_checkpoint(tiny)
        tiny_torch_model(1).save_pretrained(tiny)
    index = tiny / "model.safetensors.index.json"
    (tiny / "model.safetensors").unlink()
    index.mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(tiny)


def test_a_damaged_orbax_directory_is_one_error(tmp_path, tiny):
    model = load_model(tiny)
    save_orbax(model, tmp_path / "orbax")
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())
    (tmp_path / "orbax" / "config.json").write_text(json.dumps({**config, "n_positions": 50}))
    with pytest.raises(
        CheckpointError, match=r"wpe\.embedding has shape \(48, 32\), expected \(50"
    ):
        load_model(tmp_path / "orbax")
    (tmp_path / "orbax" / "params" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="params: damaged, or not an orbax checkpoint"):
        load_model(tmp_path / "orbax")
    (tmp_path / "orbax" / "flora_jax.json").write_text('{"version": 7}')
    with pytest.raises(
        CheckpointError, match="version is 7, expected 2: convert the checkpoint anew"
    ):
        describe(tmp_path / "orbax")


def test_output_is_whole_or_absent(tmp_path, tiny, monkeypatch):
    model = load_model(tiny)
    for save in (save_hf, save_orbax):
        with pytest.raises(InputError, match="exists already"):
            save(model, tiny)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flora_jax.checkpoints.checkpoint._write_config", full)
    for save in (save_hf, save_orbax):
        with pytest.raises(OSError, match="No space left"):
            save(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_output_follows_a_link_and_refuses_a_mount(tmp_path, tiny, monkeypatch):
    model = load_model(tiny)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_hf(model, tmp_path / "link")
    assert file_bits(tmp_path / "real") == file_bits(tiny)
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(InputError, match="mounted: a file system is mounted there"):
        save_hf(model, tmp_path / "mounted")


def test_fields_that_others_read_survive_a_conversion(tmp_path, tiny):
    path = tiny / "config.json"
    given = {"attn_pdrop": 0.0, "embd_pdrop": 0.2, "bos_token_id": 1, "pad_token_id": 3}
    raw = {n: v for n, v in json.loads(path.read_text()).items() if n != "resid_pdrop"}
    path.write_text(json.dumps(raw | given))
    save_orbax(load_model(tiny), tmp_path / "flax")
    save_hf(load_model(tmp_path / "flax"), tmp_path / "back")
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: found[name] for name in given} == given
    assert "resid_pdrop" not in found


def convert(program: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "convert" / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_convert_programs_give_the_same_bits_back(tmp_path, tiny):
    (tiny / "tokenizer.json").write_text("{}")
    done = convert("hf_to_flax.py", tiny, tmp_path / "flax")
    assert done.returncode == 0, done.stderr
    done = convert("flax_to_hf.py", tmp_path / "flax", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert file_bits(tmp_path / "back") == file_bits(tiny)
    assert (tmp_path / "back" / "tokenizer.json").is_file()

    # In one process: another start of Python shows nothing more.
    for source, to, other in ((tiny, "hf", "flax"), (tmp_path / "flax", "flax", "hf")):
        message = rf"already; .*: flora-jax convert \S+ \S+ --to {other}"
        with pytest.raises(InputError, match=message):
            convert_verb(str(source), tmp_path / "bad", to)
    (tiny / "model.safetensors").write_bytes(b"")
    done = convert("hf_to_flax.py", tiny, tmp_path / "bad")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model.safetensors: truncated" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "flax", "tiny"]
