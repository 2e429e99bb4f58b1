"""``flora-jax convert-adapter``: folders in, folders and cards out."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flora_jax.checkpoints import load_model, open_checkpoint
from flora_jax.peft.read import read_adapter
from flora_jax.peft.write import write_adapter
from tests.helpers.program import program_in
from tests.helpers.random_adapters import random_adapter
from tests.helpers.training_home import fill, snapshot

ROOT = Path(__file__).resolve().parents[2]
TEXT = ["loris", "--base", "flat", "--to", "flora", "--rank", "2", "--data", "perl.data.jsonl"]
FAST = ["--seq-len", "16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def mini():
    return load_model("mini", "float32")


@pytest.fixture(scope="module")
def home(tmp_path_factory, mini):
    home = tmp_path_factory.mktemp("home")
    layers = mini.config.n_layer
    for kind in ("hira", "lora", "ia3"):
        made = random_adapter(kind, 0, mini.config.projections(), layers, rank=2)
        write_adapter(made, home / kind, "mini")
    return home


@pytest.fixture
def program(home, monkeypatch, capsys):
    run = program_in(home, monkeypatch, capsys, "convert-adapter")
    return lambda *words: run(*words)[::2]


def test_an_exact_conversion_says_so_and_gives_the_same_logits(program, home, mini, tmp_path):
    output = tmp_path / "made"
    code, said = program("hira", "--base", "mini", "--to", "flora", "--output", output)
    assert (code, said) == (0, f"{output}: the same weights in all 6 projections, to rounding\n")
    card = (output / "README.md").read_text()
    assert "# flora, made of hira" in card
    assert "| attn.c_attn | 2 | 3 | 6 of 6 | 0.0000 | 0.0000 |" in card
    tokens_BT = np.arange(1, 9)[None]
    shape = mini.config.projections(), mini.config.n_layer
    adapters = [read_adapter(folder, *shape) for folder in (home / "hira", output)]
    assert adapters[1].settings["base_model_name_or_path"] == "mini"
    first, second = (logits(mini, adapter, tokens_BT) for adapter in adapters)
    np.testing.assert_allclose(first, second, atol=2e-4 * np.abs(first).max())


def logits(model, adapter, tokens_BT):
    from flax import nnx

    whole = nnx.merge(model.graph, model.params)
    return np.asarray(whole(tokens_BT, adapters=adapter.layers))


def test_an_approximate_one_says_what_is_left(program, tmp_path):
    words = ["lora", "--base", "mini", "--to", "flora", "--output", tmp_path / "made"]
    code, said = program(*words)
    assert code == 2
    assert said.startswith(
        "flora-jax: layer 0 attn.c_attn: no flora is the same: it adds to the weight, and a FLoRA "
        "only multiplies it; the nearest can be asked for (--approximate)"
    )
    assert not (tmp_path / "made").exists()
    code, said = program(*words, "--approximate", "--rank", "4")
    assert code == 0
    assert "% of the adapter's change of the weights is left as error" in said
    assert "0 of 6 projections are the same" in said


def test_a_quantised_base_is_what_an_adapter_is_fitted_to(program, tmp_path):
    words = ["lora", "--base", "mini", "--to", "flora", "--approximate", "--rank", "1"]
    made = []
    for held in ("none", "int4"):
        output = tmp_path / held
        code, said = program(*words, "--quantize", held, "--output", output)
        assert code == 0, said
        made.append((output / "adapter_model.safetensors").read_bytes())
    # A LoRA adds the same to any weight; what of that can be multiplied depends on the weight.
    assert made[0] != made[1]


def test_what_is_lost_of_a_bias_is_said(program, tmp_path):
    words = ["ia3", "--base", "mini", "--to", "hira", "--output", tmp_path / "made"]
    code, said = program(*words, "--approximate")
    assert code == 0
    assert "; of biases up to" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere", "--base", "mini", "--to", "flora"], "nowhere"),
        (["hira", "--base", "nowhere", "--to", "flora"], "nowhere"),
        (["hira", "--base", "mini", "--to", "ia3"], "--to is 'ia3', expected one of lora, flora"),
        (["hira", "--base", "mini", "--to", "flora", "--rank", "0"], "rank"),
        (
            ["lora", "--base", "mini", "--to", "flora", "--approximate", "--rank", "300"],
            "--rank is 300, expected at most 256: attn.c_attn of mini has 256 inputs and ",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(program, tmp_path, words, message):
    code, said = program(*words, "--output", tmp_path / "made")
    assert (code, len(said.splitlines())) == (2, 1), said
    assert message in said
    assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Small models, one with a tokenizer and a text, and adapters on them."""
    home = tmp_path_factory.mktemp("small")
    fill(home)
    (home / "short.jsonl").write_text('{"content": "abc"}\n{"content": "abc"}\n')
    config = open_checkpoint(home / "flat").config
    for name, kind, layers in (("loris", "lora", 1), ("hiro", "hira", 1), ("bared", "lora", 2)):
        made = random_adapter(kind, 1, config.projections(), layers, rank=2)
        write_adapter(made, home / name)
    return home


@pytest.fixture
def with_text(small, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small / "cache"))
    run = program_in(small, monkeypatch, capsys, "convert-adapter")
    return lambda *words: run(*words)[::2]


def test_text_teaches_and_the_card_says_how_and_how_well(with_text, tmp_path):
    words = [*TEXT, *FAST, "--approximate", "--steps", "12", "--learning-rate", "0.02"]
    for number in range(2):
        code, said = with_text(*words, "--output", tmp_path / str(number))
        assert code == 0, said
    assert snapshot(tmp_path / "0") == snapshot(tmp_path / "1")
    written = (tmp_path / "0/README.md").read_text()
    assert max(map(len, written.splitlines())) <= 106
    card = " ".join(written.split())
    assert "fitted under the moments of the inputs of " in card
    assert "windows of 16 tokens of perl.data.jsonl, then distilled from the source's" in card
    assert "12 steps of 2 windows (384 tokens) at a peak rate of 0.02. It has" in card
    assert "0 of 1 projections are the same; on " in card
    last, first = map(
        float, re.search(r"is ([\d.]+) nats a token \(([\d.]+) before", card).groups()
    )
    assert last < first
    result = " ".join(written.split("\n\n")[2].split())
    # What counts comes first, also where it is nothing.
    assert re.match(
        r"(-?[\d.]+% of the source's gain is kept|The source gains nothing); 0 of 1", result
    )
    assert result.split(";")[-1].startswith(
        " distilling moves the weights elsewhere, so that their error"
    )
    assert "is left as error" not in said
    assert result[:-1].split(";", 1)[-1] in said
    assert "no measure of the adapter; the share of the gain is." in card


def test_without_steps_only_the_fit_is_weighted(with_text, tmp_path):
    code, said = with_text(
        *TEXT, *FAST, "--approximate", "--steps", "0", "--output", tmp_path / "a"
    )
    assert code == 0
    assert "before distilling" not in said
    assert "istill" not in (tmp_path / "a/README.md").read_text()
    assert ": the source gains nothing" in said or "gain is kept\n" in said
    code, _ = with_text(*TEXT[:-2], "--approximate", "--output", tmp_path / "b")
    assert code == 0
    first, second = (snapshot(tmp_path / name)["adapter_model.safetensors"] for name in "ab")
    assert first != second


def test_what_is_exact_is_measured_only(with_text, tmp_path):
    words = ["hiro", *TEXT[1:5], *TEXT[7:], *FAST, "--output", tmp_path / "made"]
    code, said = with_text(*words)
    assert code == 0, said
    assert "the same weights in all 1 projections, to rounding; on " in said
    assert "is 0.0000 nats a token, bits" in said
    card = " ".join((tmp_path / "made/README.md").read_text().split())
    assert "exactly, so that the data only measured it" in card


@pytest.mark.parametrize(
    "words, message",
    [
        ([*TEXT[:-2], "--steps", "3"], "--steps belongs to --data, which is not given"),
        ([*TEXT, *FAST], "no flora is the same: it adds to the weight"),
        (["bared", "--base", "bare", *TEXT[3:]], "text needs tokenizer.json and an end token"),
        ([*TEXT, "--seq-len", "4000"], "--seq-len is 4000, the model's context has 48"),
        (
            [*TEXT[:-1], "short.jsonl", "--seq-len", "40"],
            "more than the 40 of a window (--seq-len)",
        ),
        ([*TEXT[:-1], "empty.jsonl"], "empty.jsonl: "),
        ([*TEXT[:-1], "corrupt.jsonl", *FAST], "corrupt.jsonl"),
        ([*TEXT[:-1], "notes.txt", "--seq-len", "40"], "notes.txt"),
        ([*TEXT, *FAST, "--approximate", "--learning-rate", "-1"], "learning-rate is -1"),
    ],
)
def test_text_that_cannot_be_used_is_one_line(with_text, tmp_path, words, message):
    code, said = with_text(*words, "--output", tmp_path / "made")
    lines = [line for line in said.splitlines() if not line.startswith("data perl.data.jsonl: ")]
    assert (code, len(lines)) == (2, 1), said
    assert message in lines[0]
    assert not (tmp_path / "made").exists()


def test_what_is_read_and_what_is_skipped_is_said(with_text, small, tmp_path):
    good = 15 * (small / "perl.data.jsonl").read_text()  # One line in a hundred may be unusable.
    (small / "some.jsonl").write_text('{"content": 3}\n' + good + '{"content": \n')
    words = ["hiro", *TEXT[1:5], "--data", "some.jsonl", *FAST, "--output", tmp_path / "made"]
    code, said = with_text(*words)
    assert code == 0, said
    assert "data some.jsonl: 300 documents, " in said
    assert "data some.jsonl: skipped some.jsonl, line 1: 'content' is of type int" in said
    assert "data some.jsonl: skipped some.jsonl, line 302: malformed JSON" in said


def test_an_end_token_of_another_vocabulary_is_one_line(with_text, small, tmp_path):
    endless = shutil.copytree(small / "flat", small / "endless", dirs_exist_ok=True)
    for file in ("config.json", "generation_config.json"):
        raw = json.loads((endless / file).read_text())
        (endless / file).write_text(json.dumps(raw | {"eos_token_id": 5000}))
    words = ["hiro", "--base", "endless", *TEXT[3:5], *TEXT[7:], *FAST]
    code, said = with_text(*words, "--output", tmp_path / "made")
    assert (code, len(said.splitlines())) == (2, 1), said
    assert "endless: the end token is 5000, expected below the vocabulary's " in said


def test_weights_that_are_held_otherwise_are_named(program, tmp_path):
    """The lengths of a DoRA are those of the weights that it is made on."""
    words = ["lora", "--base", "mini", "--to", "dora", "--quantize", "int4"]
    code, said = program(*words, "--output", tmp_path / "made")
    assert code == 0, said
    assert "over mini with int4 weights the same weights in all 6 projections" in said
    card = " ".join((tmp_path / "made/README.md").read_text().split())
    assert "An adapter of kind dora for mini with int4 weights, converted" in card
    assert "Over mini with int4 weights the same" in card


def test_the_thin_program_does_the_same(small, tmp_path):
    words = [ROOT / "convert/adapters.py", "hiro", "--base", "flat", "--to", "flora"]
    done = subprocess.run(
        [sys.executable, *map(str, words), "--output", tmp_path / "made"],
        cwd=small, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made/adapter_config.json").is_file()
