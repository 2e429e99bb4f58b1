"""What ``flora-jax info`` says of models, adapters, runs, and of what is none of them."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from flora_jax.shipped import shipped_adapters
from tests.cli.conftest import KINDS
from tests.helpers.byte_tokenizer import PIECES
from tests.helpers.torch_models import TINY

CONTEXT = TINY["n_positions"]


def test_info_describes_a_model(program):
    code, out, err = program("info", "text")
    assert (code, err) == (0, "")
    assert "GPTBigCode (StarCoder), " in out
    assert f"{CONTEXT} positions" in out
    assert f"{PIECES} pieces" in out
    assert "16 -> 32" in out
    assert "text/chat_template.jinja" in out
    bare = [line.split() for line in program("info", "bare")[1].splitlines()]
    assert ["tokenizer", "none"] in bare
    assert ["chat", "template", "none"] in bare


@pytest.mark.parametrize("name", KINDS)
def test_info_describes_an_adapter(name, program):
    code, out, err = program("info", name)
    assert (code, err) == (0, "")
    for words in (
        KINDS[name],
        "tiny/base",
        "target mlp.c_proj",
        "rank 2, 24 -> 16",
        "320 as float32",
    ):
        assert words in out


def test_info_knows_what_is_shipped_and_a_path_wins(program, home):
    code, out, err = program("info", "mini")
    assert (code, err) == (0, "")
    assert "GPTBigCode (StarCoder), safetensors" in out
    for name in ("flora/lua", "dora/lua", "ia3/perl"):
        assert name in shipped_adapters()
        code, out, err = program("info", name)
        assert (code, err) == (0, ""), name
        assert out.replace(",", " ").split()[:2] == ["adapter", name.split("/")[0]]
    shutil.copytree(home / "loris", home / "flora" / "lua")
    assert ["adapter", "lora"] in [
        line.split() for line in program("info", "flora/lua")[1].splitlines()
    ]
    shutil.rmtree(home / "flora")


def test_info_looks_into_the_weights(program, home, tmp_path):
    shutil.copytree(home / "bare", tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensors[name] for name in tensors if "ln_f" not in name}, weights)
    code, _, err = program("info", tmp_path / "short")
    assert code == 2
    assert "transformer.ln_f.weight is missing" in err


def test_info_prints_a_base_name_as_it_is(program, home, tmp_path):
    shutil.copytree(home / "loris", tmp_path / "odd")
    config = tmp_path / "odd" / "adapter_config.json"
    raw = json.loads(config.read_text()) | {"base_model_name_or_path": "a[/b] [red]c"}
    config.write_text(json.dumps(raw))
    code, out, _ = program("info", tmp_path / "odd")
    assert code == 0
    assert "a[/b] [red]c" in out


@pytest.mark.parametrize(
    "path, named",
    [("./none", "none"), ("no-config", "config.json"), ("broken", "broken"), ("mamba", "mamba")],
)
def test_info_of_nonsense_ends_in_one_line(path, named, program):
    code, out, err = program("info", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("flora-jax: ")
    assert named in err


def test_info_of_a_run_names_its_adapters(program, home, tmp_path):
    options = {"model": "text", "kind": "lora", "data": {"own": "data"}}
    (tmp_path / "config.json").write_text(json.dumps(options))
    (tmp_path / "metrics.jsonl").write_text("")
    code, out, err = program("info", tmp_path)
    assert (code, err) == (0, "")
    assert "adapters none yet: they are written at the end" in " ".join(out.split())
    shutil.copytree(home / "loris", tmp_path / "own")
    code, out, err = program("info", tmp_path)
    assert (code, err) == (0, "")
    assert " ".join(out.split()).replace(" /", "/").startswith("run flora-jax train: lora on text")
    assert f"adapter{tmp_path}/own:80parameters" in "".join(out.split())
    (tmp_path / "config.json").write_text("[]")
    code, out, err = program("info", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{tmp_path}/config.json: not the options of a training run" in err


def test_info_of_what_is_nearly_an_adapter_says_what_is_wrong(program, home, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = program("info", "flora/pearl")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "shipped; near it: flora/perl, " in err
    assert (
        "as a model: no such file or directory, and the Hugging Face hub cannot be reached" in err
    )
    shutil.copytree(home / "loris", tmp_path / "own")
    config = tmp_path / "own" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    code, out, err = program("info", tmp_path / "own")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "found rank 2, adapter_config.json says 5" in err
    config.unlink()
    code, out, err = program("info", tmp_path / "own")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "adapter_config.json is missing beside adapter_model.safetensors" in err
