"""Pre-training from a directory of source files to a checkpoint that loads, at a tiny size."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from flora_jax.checkpoints.checkpoint import load_model
from flora_jax.checkpoints.tokenizer import load_tokenizer
from flora_jax.errors import InputError
from flora_jax.models.starcoder.config import PRESETS

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "pretrain_mini.py"


@pytest.fixture
def pretrain(monkeypatch):
    spec = importlib.util.spec_from_file_location("pretrain_mini", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = dataclasses.replace(
        PRESETS["mini"], n_embd=16, n_head=2, n_layer=1, n_inner=32, n_positions=32
    )
    monkeypatch.setitem(module.PRESETS, "mini", tiny)
    return module


@pytest.mark.parametrize("windows, rows, extra", [(12, 4, 0), (12, 5, 4), (7, 3, 2), (1, 2, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_epoch_visits_every_whole_window_once(pretrain, windows, rows, extra, seed):
    tokens = np.arange(windows * 5 + 1 + extra, dtype=np.uint16)
    stream = pretrain.Stream(tokens, 1000)
    batches = [stream.batch(step, rows, 5, seed) for step in range(-(-3 * windows // rows))]
    assert {(batch.dtype.name, batch.shape) for batch in batches} == {("int32", (rows, 6))}
    found = np.concatenate(batches)
    np.testing.assert_array_equal(np.diff(found, axis=1), 1)
    for epoch in range(3):
        order = np.random.default_rng([seed, epoch]).permutation(windows)
        np.testing.assert_array_equal(found[epoch * windows :][:windows, 0], 5 * order)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_stream_shorter_than_a_window_is_an_error(pretrain, tokens):
    stream = pretrain.Stream(np.zeros(tokens, np.uint16), 1)
    with pytest.raises(InputError, match=f"{tokens} tokens hold no window of 6"):
        stream.batch(0, 1, 5, 0)


def test_a_directory_of_sources_becomes_a_model_that_loads(pretrain, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for number in range(40):
        text = "".join(f"def f{number}_{i}(x):\n    return x + {i}\n" for i in range(20))
        (sources / f"{number}.py").write_text(text)
    output = tmp_path / "run"
    pretrain.main(sources, output, steps=12, pieces=300, learning_rate=1e-2)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 10, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    model = load_model(output / "model")
    assert model.config.n_positions == 32
    tokenizer = load_tokenizer(output / "model", model.config.vocab_size)
    text = "def f(x):\n    return 'ü' + 12\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert np.dtype(model.params["wte"]["embedding"][...].dtype) == np.float16
    card = (output / "model" / "README.md").read_text()
    held_out = sum(len((sources / f"{n}.py").read_bytes()) for n in (0, 1))
    (measured,) = re.findall(r"\| source \| \d\.\d{3} \| ([\d,]+) \|", card)
    assert 0.8 * held_out < int(measured.replace(",", "")) <= held_out
    pretrain.main(sources, output, steps=12, pieces=300, learning_rate=1e-2)
    again = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again] == metrics
    with pytest.raises(InputError, match=r"recipe\.json: pieces was 300, now 310"):
        pretrain.main(sources, output, steps=12, pieces=310, learning_rate=1e-2)
