"""A place with models and adapters, whole and broken, and the program in it."""

import json
import shutil

import pytest

from flora_jax.checkpoints import open_checkpoint
from flora_jax.peft.read import write_adapter
from tests.helpers.byte_tokenizer import PIECES, byte_tokenizer
from tests.helpers.program import program_in
from tests.helpers.random_adapters import random_adapter
from tests.helpers.torch_models import tiny_torch_model

KINDS = {"loris": "lora", "flo": "flora"}
SIZES = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_inner": 24}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models with and without a tokenizer, broken ones, adapters that fit and ones that do not."""
    home = tmp_path_factory.mktemp("home")
    torch_model = tiny_torch_model(0, vocab_size=PIECES, **SIZES)
    torch_model.save_pretrained(home / "bare")
    shutil.copytree(home / "bare", home / "text")
    byte_tokenizer().save(str(home / "text" / "tokenizer.json"))
    (home / "text" / "chat_template.jinja").write_text("{{ messages[0].content }}d")
    config = open_checkpoint(home / "bare").config
    for name, kind in KINDS.items():
        adapter = random_adapter(kind, 1, config.projections(), 1, rank=2, targets=["mlp.c_proj"])
        write_adapter(adapter, home / name, "tiny/base")

    wide = {"attn.c_attn": (32, 48)}
    write_adapter(random_adapter("lora", 0, wide, 1, rank=2), home / "wide")
    shutil.copytree(home / "loris", home / "broken")
    (home / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    shutil.copytree(home / "bare", home / "truncated")
    weights = home / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (home / "no-config").mkdir()
    shutil.copytree(home / "bare", home / "mamba")
    raw = json.loads((home / "mamba" / "config.json").read_text())
    raw |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (home / "mamba" / "config.json").write_text(json.dumps(raw))
    shutil.copytree(home / "bare", home / "bad-tokenizer")
    (home / "bad-tokenizer" / "tokenizer.json").write_text("{}")
    return home


@pytest.fixture
def program(home, monkeypatch, capsys, tmp_path):
    """Runs the program from where the models are; returns exit code, stdout, stderr."""
    return program_in(home, monkeypatch, capsys)
