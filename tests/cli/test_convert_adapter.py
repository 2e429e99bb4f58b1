"""``flora-jax convert-adapter`` over the embedded model: folders in, folders and cards out."""

import numpy as np
import pytest

from flora_jax.checkpoints import load_model
from flora_jax.peft.read import read_adapter
from flora_jax.peft.write import write_adapter
from tests.helpers.program import program_in
from tests.helpers.random_adapters import random_adapter


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
        "only multiplies it"
    )
    assert not (tmp_path / "made").exists()
    code, said = program(*words, "--approximate", "--rank", "4")
    assert code == 0
    assert "% of the adapter's change of the weights is left as error" in said
    assert "0 of 6 projections are the same" in said


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
        (["hira", "--base", "mini", "--to", "ia3"], "'ia3' is not one of"),
        (["hira", "--base", "mini", "--to", "flora", "--rank", "0"], "rank"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(program, tmp_path, words, message):
    code, said = program(*words, "--output", tmp_path / "made")
    assert (code, len(said.splitlines())) == (2, 1), said
    assert message in said
    assert not (tmp_path / "made").exists()
