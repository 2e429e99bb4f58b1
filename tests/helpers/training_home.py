"""A directory to train in: small models, data of two languages, and the program run inside."""

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from flora_jax import cli
from flora_jax.peft.read import read_adapter
from tests.helpers.byte_tokenizer import PIECES, byte_tokenizer
from tests.helpers.torch_models import tiny_torch_model

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_inner": 24}
NAMES, LENGTH = ("perl", "ruby"), 24


def write_data(path, seed, documents=20):
    """Lines of a small language: few letters, so that something is quickly learned."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice([*"abc \n{}λ"], rng.integers(5, 60))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    return path


def data_of(*names, option="data"):
    return [word for n in names for word in (f"--{option}", f"{n}={n}.{option}.jsonl")]


def fill(home):
    """A model with a tokenizer, one without, one of a single layer, and data of two languages."""
    tiny_torch_model(0, vocab_size=PIECES, **SIZES).save_pretrained(home / "bare")
    shutil.copytree(home / "bare", home / "text")
    byte_tokenizer().save(str(home / "text" / "tokenizer.json"))
    flat = tiny_torch_model(0, vocab_size=PIECES, **SIZES | {"n_layer": 1})
    flat.save_pretrained(home / "flat")
    shutil.copy(home / "text" / "tokenizer.json", home / "flat")
    for number, name in enumerate(NAMES):
        write_data(home / f"{name}.data.jsonl", number)
        write_data(home / f"{name}.validation.jsonl", 10 + number, 6)
    write_data(home / "empty.jsonl", 0, 0)
    (home / "empty.toml").write_text("")
    (home / "output.toml").write_text('output = "both"\n')
    (home / "corrupt.jsonl").write_text('{"content": "abc"}\n{"content": \n{"content": "a"}\n')
    for name, file in (("taken", "notes"), ("broken", "config.json")):
        (home / name).mkdir()
        (home / name / file).write_text("nothing")
    (home / "notes.txt").write_text("no data")


@contextlib.contextmanager
def inside(home):
    with pytest.MonkeyPatch.context() as patch:
        # Set, though to nothing, the variable keeps the program from choosing a place.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.chdir(home)
        yield patch


def program(home, *arguments):
    """Runs the program; returns its exit code."""
    with inside(home) as patch:
        patch.setattr(sys, "argv", ["flora-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return stopped.value.code


def lines_of(output, speed=False):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if not speed:
        for line in lines:
            line.pop("tokens_per_second", None)
    return lines


def snapshot(folder):
    """Every file below with the digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_for(model, folder):
    return read_adapter(folder, model.config.projections(), model.config.n_layer)
