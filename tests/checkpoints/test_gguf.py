"""A GGUF file becomes a Hugging Face directory with the same weights and llama.cpp's token ids."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
pytest.importorskip("accelerate", reason="the extra 'gguf' is not installed")

import safetensors.torch
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.smollm2.llama_cpp_ids import LlamaCppIds
from flora_jax import cli
from flora_jax.checkpoints import open_checkpoint
from flora_jax.checkpoints.gguf import convert_gguf, is_gguf
from flora_jax.errors import InputError
from tests.helpers.gguf_files import (
    MERGES,
    TEMPLATE,
    TOKENS,
    tiny_llama,
    write_gguf,
)

ROOT = Path(__file__).resolve().parents[2]
TEXTS = (
    "ab  12 123  4", "  7", "1 12ab\n\n\n 3", "café é 12é", "x1y2", "½ ²3 ४५", "\t \r\n12 ", "",
    "it's 9's don't", "abcé ab 1 1", " a  b   c    1",
)  # fmt: skip


APART, TOGETHER = (LlamaCppIds(TOKENS, MERGES, apart) for apart in (True, False))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A file in float32, and the directory that it becomes."""
    home = tmp_path_factory.mktemp("gguf")
    convert_gguf(write_gguf(home / "m.gguf", model), home / "hf")
    return home


def test_every_weight_is_that_of_the_file(model, made):
    found = load_file(made / "hf" / "model.safetensors")
    expected = {f"model.{name}": value for name, value in model.model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy(), err_msg=name)


def test_this_package_and_transformers_load_the_directory_and_agree(model, made):
    opened = open_checkpoint(made / "hf")
    ours = opened.load("float32")
    ids = np.array([[5, 9, 200, 31, 7]])
    torch_model = AutoModelForCausalLM.from_pretrained(made / "hf")
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
        theirs = torch_model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_array_equal(theirs, expected)
    logits = np.asarray(nnx.merge(ours.graph, ours.params)(ids.astype(np.int32)))
    assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()
    assert opened.config.eos_token_ids == (2,)
    assert opened.config.n_positions == 64
    assert "gguf" not in (made / "hf" / "config.json").read_text()
    assert len({file.stat().st_mode for file in (made / "hf").iterdir()}) == 1


def test_ids_are_those_of_llama_cpps_rules_on_digits_blanks_and_accents(made):
    ours = open_checkpoint(made / "hf").tokenizer
    theirs = AutoTokenizer.from_pretrained(made / "hf")
    for text in TEXTS:
        expected = APART(text)
        assert ours.encode(text).ids == expected, text
        assert theirs(text).input_ids == expected, text
        assert ours.decode(expected) == text
    # Some of these would differ if digits stayed together.
    assert any(APART(text) != TOGETHER(text) for text in TEXTS)
    assert ours.encode("a<|im_end|>b").ids == [TOKENS.index("a"), 2, TOKENS.index("b")]


def test_the_chat_template_and_special_tokens_go_along(made):
    opened = open_checkpoint(made / "hf")
    assert opened.chat.template == TEMPLATE
    theirs = AutoTokenizer.from_pretrained(made / "hf")
    assert theirs.chat_template == TEMPLATE
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert opened.chat.tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "pre, rules", [("gpt-2", TOGETHER), ("starcoder", APART), ("refact", APART)]
)
def test_text_is_split_as_the_files_pre_tokenizer_says(pre, rules, model, tmp_path):
    facts = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": True}
    convert_gguf(write_gguf(tmp_path / "m.gguf", model, facts), tmp_path / "hf")
    tokenizer = open_checkpoint(tmp_path / "hf").tokenizer
    for text in TEXTS:
        expected = rules(text)
        assert tokenizer.encode(text).ids == [1, *expected]
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected


def test_llama_3s_positions_end_tokens_and_whole_pieces_are_kept(model, tmp_path):
    factor, context, pairs = 8.0, 8192, model.config.head_dim // 2
    wave = 2 * np.pi * 50_000.0 ** (np.arange(pairs) / pairs)
    between = np.clip((context / wave - 1) / 3, 0, 1)
    factors = (1 / ((1 - between) / factor + between)).astype(np.float32)
    facts = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.eot_token_id": 0}
    facts |= {"tokenizer.ggml.add_bos_token": None}
    path = write_gguf(tmp_path / "m.gguf", model, facts, {"rope_freqs.weight": factors})
    convert_gguf(path, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["rope_parameters"] == {
        "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    opened = open_checkpoint(tmp_path / "hf")
    assert set(opened.config.eos_token_ids) == {0, 2}
    assert opened.tokenizer.encode("xyz").ids == [1, TOKENS.index("xyz")]
    factors[0] *= 1.1
    odd = write_gguf(tmp_path / "odd.gguf", model, facts, {"rope_freqs.weight": factors})
    with pytest.raises(InputError, match=r"odd.gguf: rope_freqs.weight\[\d\] is .*, expected"):
        convert_gguf(odd, tmp_path / "none")


def test_yarn_and_a_quantised_tensor_are_read(model, tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    facts = {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    path = write_gguf(tmp_path / "m.gguf", model, facts, quantized=["ffn_down.weight"])
    convert_gguf(path, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0,
        "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
    }  # fmt: skip
    assert raw["dtype"] == "float32"
    name = "model.layers.0.mlp.down_proj.weight"
    found = load_file(tmp_path / "hf" / "model.safetensors")[name]
    wanted = dict(model.named_parameters())[name].detach().numpy()
    step = np.abs(wanted).reshape(-1, 32).max(axis=1).repeat(32).reshape(wanted.shape) / 127
    assert np.abs(found - wanted).max() > 0
    # Half a step, and up to 127 times what a float16 scale is off by.
    assert (np.abs(found - wanted) <= (0.5 + 127 / 2**11) * step + 1e-6).all()


@pytest.mark.parametrize(
    "facts, tensors, named",
    [
        ({"tokenizer.ggml.pre": "sesame"}, {}, "tokenizer.ggml.pre is 'sesame', expected one of"),
        ({"tokenizer.ggml.pre": None}, {}, "tokenizer.ggml.pre is None, expected one of"),
        ({"tokenizer.ggml.model": "bert"}, {}, "tokenizer.ggml.model is 'bert', expected 'gpt2'"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type is 'longrope', expected"),
        ({"llama.logit_scale": 2.0}, {}, "llama.logit_scale is 2.0, which is not known here"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count is 8, which is not known here"),
        ({"llama.attention.value_length": 4}, {}, "value_length is 4, expected a head's width, 8"),
        ({"split.count": 3}, {}, "is one of 3 parts, expected one file"),
        ({}, {"rope_factors_long.weight": np.ones(4)}, "has the tensor rope_factors_long.weight"),
        (
            {},
            {"blk.0.attn_q.bias": np.ones(32)},
            "27,296 numbers, transformers' model 27,264: some would be left out",
        ),
    ],
)
def test_what_would_be_left_out_is_refused_by_name(facts, tensors, named, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, facts, tensors)
    with pytest.raises(InputError, match=named) as caught:
        convert_gguf(path, tmp_path / "hf")
    assert str(caught.value).startswith(str(path))
    assert [one.name for one in tmp_path.iterdir()] == ["m.gguf"]


def test_another_architecture_is_named(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, architecture="mamba")
    with pytest.raises(InputError, match=r"general.architecture is 'mamba', expected .* or "):
        convert_gguf(path, tmp_path / "hf")


def test_what_is_no_gguf_or_has_no_room_ends_in_one_line(made, tmp_path, monkeypatch, capsys):
    def ends(*words):
        monkeypatch.setattr(sys, "argv", ["flora-jax", "convert", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said.count("\n") == 1
        return said

    source, target = made / "m.gguf", tmp_path / "new"
    (tmp_path / "odd.gguf").write_bytes(b"PK..")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(source.read_bytes()[:2000])
    assert "odd.gguf: no GGUF file: begins with b'PK..'" in ends(
        tmp_path / "odd.gguf", target, "--to", "hf"
    )
    assert "damaged.gguf: damaged: " in ends(damaged, target, "--to", "hf")
    assert "none.gguf: no such file" in ends(tmp_path / "none.gguf", target, "--to", "hf")
    assert "becomes Hugging Face files first: --to hf" in ends(source, target, "--to", "flax")
    assert "exists already" in ends(source, made / "hf", "--to", "hf")
    assert "dtype is 'int8', expected float32" in ends(
        source, target, "--to", "hf", "--dtype", "int8"
    )
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "bytes are needed, 1,000 are free there" in ends(source, target, "--to", "hf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "a GGUF needs gguf, torch, transformers, accelerate: pip install" in ends(
        source, target, "--to", "hf"
    )
    assert sorted(one.name for one in tmp_path.iterdir()) == ["damaged.gguf", "odd.gguf"]
    with pytest.raises(InputError, match=r"m.gguf: is a file, .*; flora-jax convert .* makes one"):
        open_checkpoint(source)


def test_a_file_is_known_by_its_first_bytes_too(made, tmp_path):
    shutil.copy(made / "m.gguf", tmp_path / "blob")
    assert is_gguf(str(tmp_path / "blob"))
    assert is_gguf("any.gguf")
    assert not is_gguf(str(made / "hf"))
    assert not is_gguf(str(made / "hf" / "config.json"))


def test_the_script_converts_in_another_dtype(made, tmp_path):
    words = ["convert/gguf_to_hf.py", made / "m.gguf", tmp_path / "hf", "--dtype", "bfloat16"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    opened = open_checkpoint(tmp_path / "hf")
    assert opened.config.dtype == "bfloat16"
    tensors = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
