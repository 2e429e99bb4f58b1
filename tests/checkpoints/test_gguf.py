"""A GGUF file becomes a Hugging Face directory with the same weights and llama.cpp's token ids."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

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
from flora_jax.serve.stream import TextDecoder
from tests.helpers.gguf_files import (
    MERGES,
    SPM_FACTS,
    SPM_SCORES,
    SPM_TOKENS,
    SPM_TYPES,
    TEMPLATE,
    TOKENS,
    tiny_llama,
    tiny_model,
    write_gguf,
)
from tests.helpers.sentencepiece_ids import SentencePieceIds

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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "starcoder2"])
def test_the_weights_of_every_family_keep_their_names_and_order(architecture, tmp_path):
    model = tiny_model(architecture, tie_word_embeddings=False, head_dim=8)
    plain = architecture == "starcoder2"
    epsilons = {f"{architecture}.attention.layer_norm_epsilon": 1e-5}
    epsilons |= {f"{architecture}.attention.layer_norm_rms_epsilon": None}
    path = write_gguf(
        tmp_path / "m.gguf", model, epsilons if plain else {}, architecture=architecture
    )
    convert_gguf(path, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy(), err_msg=name)
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["architectures"] == [type(model).__name__]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    with torch.no_grad():
        np.testing.assert_array_equal(theirs(ids).logits, model(ids).logits)


@pytest.mark.parametrize("values", [None, [4, 4]])
def test_heads_that_all_layers_have_alike_may_be_missing_or_listed(values, tmp_path):
    model = tiny_llama(num_key_value_heads=4)
    facts = {"llama.attention.head_count_kv": values}
    facts |= {"llama.feed_forward_length": [64, 64], "llama.attention.head_count": [4, 4]}
    convert_gguf(write_gguf(tmp_path / "m.gguf", model, facts), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["num_attention_heads"], raw["num_key_value_heads"]) == (4, 4)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, value in model.model.named_parameters():
        np.testing.assert_array_equal(found[f"model.{name}"], value.detach().numpy(), err_msg=name)


def test_a_factor_alone_scales_positions(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, {"llama.rope.scaling.factor": 4.0})
    convert_gguf(path, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0}
    assert raw["rope_parameters"] == expected


def test_nothing_that_lies_beside_the_file_is_read(model, made, tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", model)
    beside = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"bos_token": "QQ", "chat_template": "other"}',
        "added_tokens.json": '{"ab": 5}',
        "special_tokens_map.json": '{"bos_token": "12"}',
        "chat_template.jinja": "other",
        "config.json": '{"model_type": "qwen2", "hidden_size": 64}',
        "generation_config.json": '{"eos_token_id": 77}',
        "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "a/b"}',
    }
    for name, text in beside.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    convert_gguf("m.gguf", "hf")
    expected = {one.name: one.read_bytes() for one in (made / "hf").iterdir()}
    assert {one.name: one.read_bytes() for one in (tmp_path / "hf").iterdir()} == expected

    def refused(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    convert_gguf("m.gguf", "again")
    assert {one.name: one.read_bytes() for one in (tmp_path / "again").iterdir()} == expected


def test_what_transformers_makes_of_a_file_is_one_line_with_its_name(model, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", model)

    def fails(directory, gguf_file):
        raise TypeError(f"{directory / gguf_file} is\nodd in {directory}")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", fails)
    with pytest.raises(InputError) as caught:
        convert_gguf(path, tmp_path / "hf")
    assert str(caught.value) == f"{path}: transformers cannot read it: {path} is odd in {path}"
    assert [one.name for one in tmp_path.iterdir()] == ["m.gguf"]


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


SPM_TEXTS = (
    "the abc", " the", "  the", "", " ", "a", "abc  12 the ing", "é 12\n\n", "x<|user|>ab the",
    " <|user|> ab", "the</s>the", "<s>a", "a<unk> b", "<|user|>", "<|user|><|user|> a  ",
)  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """By whether a blank is put in front: a directory, and llama.cpp's ids."""
    home = tmp_path_factory.mktemp("spm")
    model = tiny_llama(vocab_size=len(SPM_TOKENS))
    made = {}
    for space, said in ((True, None), (False, False)):
        facts = SPM_FACTS | {"tokenizer.ggml.add_space_prefix": said}
        convert_gguf(write_gguf(home / f"{space}.gguf", model, facts), home / f"{space}")
        made[space] = home / f"{space}", SentencePieceIds(SPM_TOKENS, SPM_SCORES, SPM_TYPES, space)
    return made


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_ids_are_those_of_llama_cpps_rules(space, sentencepiece):
    directory, rules = sentencepiece[space]
    ours = open_checkpoint(directory).tokenizer
    theirs = AutoTokenizer.from_pretrained(directory)
    draw = random.Random(0)
    parts = [*"abcthe ing12é. ", "    ", "<|user|>", "</s>", "\n"]
    drawn = ["".join(draw.choices(parts, k=draw.randint(1, 20))) for _ in range(200)]
    for text in (*SPM_TEXTS, *drawn):
        expected = [1, *rules(text)]
        assert ours.encode(text).ids == expected, text
        assert theirs(text).input_ids == expected, text
        assert ours.encode(text, add_special_tokens=False).ids == expected[1:], text


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_ids_become_their_text_again_at_once_and_one_by_one(space, sentencepiece):
    tokenizer = open_checkpoint(sentencepiece[space][0]).tokenizer
    for text in SPM_TEXTS:
        if "<" not in text:
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
        ids = tokenizer.encode(text).ids
        whole = tokenizer.decode(ids)
        for count in range(len(ids) + 1):
            before = tokenizer.decode(ids[:count])
            if "\ufffd" in before:
                continue  # In the middle of a character.
            decoder = TextDecoder(tokenizer, ids[:count])
            assert before + "".join(map(decoder.add, ids[count:])) + decoder.rest() == whole


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
        ({"llama.attention.head_count": 0}, {}, "head_count is 0, expected a number above 0"),
        ({"llama.attention.head_count": "4"}, {}, "head_count is '4', expected a number above 0"),
        ({"llama.attention.head_count": None}, {}, "head_count is missing, expected a number"),
        ({"llama.attention.head_count": 3}, {}, "length is 32, expected a multiple of .*count, 3"),
        (
            {"llama.attention.head_count_kv": [2, 1]},
            {},
            r"head_count_kv is \[2, 1\], expected the same number for each of 2 layers",
        ),
        (
            {"llama.feed_forward_length": [64]},
            {},
            r"length is \[64\], expected the same number for",
        ),
        (
            {"llama.attention.head_count_kv": None},
            {},
            r"k.weight has shape \(16, 32\), expected \(32,",
        ),
        (
            {"llama.embedding_length": [32, 32]},
            {},
            r"length is \[32, 32\], expected a number above 0",
        ),
        (
            {"llama.embedding_length": 64, "llama.rope.dimension_count": None},
            {},
            r"token_embd.weight has shape \(271, 32\), expected \(271, 64\) by the file's metadata",
        ),
        ({"llama.vocab_size": 10}, {}, r"token_embd.weight has shape .*, expected \(10, 32\)"),
        (
            {"llama.block_count": 3},
            {},
            r"has no tensor blk\.2\.attn_norm\.weight, expected for model",
        ),
        ({"llama.block_count": 1}, {}, r"has the tensor blk\.1\.\w+\.weight, which is not known"),
        ({"llama.rope.scaling.factor": "4"}, {}, "scaling.factor is '4', expected a number"),
        ({"tokenizer.ggml.tokens": None}, {}, "tokenizer.ggml.tokens is missing, expected a list"),
        ({"tokenizer.ggml.merges": None}, {}, "tokenizer.ggml.merges is missing, expected a list"),
        (
            {"tokenizer.ggml.merges": ["a b", "a q"]},
            {},
            r"tokenizer.ggml.merges\[1\] is 'a q', expected two tokens that are a token together",
        ),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            {},
            "tokenizer.ggml.bos_token_id is missing, expected the token that is added to every text",
        ),
        *(
            (
                {f"tokenizer.ggml.{name}_token_id": 99999},
                {},
                f"{name}_token_id is 99999, expected below 271",
            )
            for name in ("bos", "eos", "unknown", "padding", "eot")
        ),
        (
            {"tokenizer.ggml.model": "llama"},
            {},
            "scores is None, expected a number for each of 271",
        ),
        ({"tokenizer.ggml.pre": ["a"]}, {}, r"tokenizer.ggml.pre is \['a'\], expected a text"),
        ({"tokenizer.chat_template": 5}, {}, "tokenizer.chat_template is 5, expected a text"),
        ({"llama.attention.value_length": 4}, {}, "value_length is 4, expected a head's width, 8"),
        ({"split.count": 3}, {}, "is one of 3 parts, expected one file"),
        ({}, {"rope_factors_long.weight": np.ones(4)}, "has the tensor rope_factors_long.weight"),
        (
            {},
            {"blk.0.attn_q.bias": np.ones(32)},
            "has the tensor blk.0.attn_q.bias, which is not known here",
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
    assert "a GGUF needs gguf, torch, transformers: pip install" in ends(
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
