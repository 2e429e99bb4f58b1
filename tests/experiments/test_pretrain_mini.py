"""Pre-training from a directory of source files to a checkpoint that loads, at a tiny size."""

import dataclasses
import functools
import gzip
import importlib.util
import json
import lzma
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
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
    # Named, because dataclasses and NamedTuple look their modules up.
    monkeypatch.setitem(sys.modules, "pretrain_mini", module)
    spec.loader.exec_module(module)
    tiny = dataclasses.replace(PRESETS["mini"], n_positions=32)
    monkeypatch.setitem(module.PRESETS, "mini", tiny)
    return module


def write_lines(path, texts):
    opener = {".gz": gzip.open, ".xz": lzma.open}[path.suffix]
    with opener(path, "wt", encoding="utf8") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in texts)


@pytest.fixture
def corpora(tmp_path):
    """Two directories as those that are read, each language in its own letters."""
    small, large = tmp_path / "small", tmp_path / "large"
    for root in (small, large):
        root.mkdir()
    for language, letter in (("python", "p"), ("lua", "ü")):
        write_lines(small / f"{language}.train.jsonl.gz", [letter * 10, letter * 11])
        write_lines(small / f"{language}.validation.jsonl.gz", [letter * 5, letter * 6])
        write_lines(large / f"{language}.jsonl.xz", [letter * 20])
    return [small, large]


def test_training_text_is_that_of_all_roots_up_to_the_limits(pretrain, corpora):
    text = pretrain.source_text
    assert text.read_texts(corpora, "train", text.Limits()) == {
        "lua": ["ü" * 10, "ü" * 11, "ü" * 20], "python": ["p" * 10, "p" * 11, "p" * 20],
    }  # fmt: skip
    # A letter of Lua's has two bytes. The document that reaches the limit is the last one.
    assert text.read_texts(corpora, "train", text.Limits(22, 20)) == {
        "lua": ["ü" * 10], "python": ["p" * 10, "p" * 11, "p" * 20],
    }  # fmt: skip
    assert text.read_texts(corpora, "validation", text.Limits()) == {
        "lua": ["ü" * 5, "ü" * 6], "python": ["p" * 5, "p" * 6],
    }  # fmt: skip


def test_a_packed_file_has_the_same_texts(pretrain, corpora, tmp_path):
    text, packed = pretrain.source_text, tmp_path / "packed.jsonl.xz"
    text.main(corpora, packed, other_bytes=20, held_out_bytes=8)
    limits = {"train": text.Limits(None, 20), "validation": text.Limits(8, 8)}
    for split, bounds in limits.items():
        assert text.read_texts([packed], split, text.Limits()) == text.read_texts(
            corpora, split, bounds
        )
    with pytest.raises(InputError, match=r"would have \d+ bytes, expected at most 10"):
        text.main(corpora, tmp_path / "small.jsonl.xz", most_bytes=10)
    assert not (tmp_path / "small.jsonl.xz").exists()
    packed.write_bytes(lzma.compress(b'{"language": "lua", "split": "train"}\n'))
    with pytest.raises(InputError, match=r"packed\.jsonl\.xz, line 1: content is missing"):
        text.read_texts([packed], "train", text.Limits())


def test_matrices_of_the_blocks_have_orthogonal_updates_and_embeddings_adams(pretrain):
    params = {
        "wte": {"embedding": jnp.ones((6, 4))},
        "kernel": jax.random.normal(jax.random.key(0), (8, 4)),
        "bias": jnp.ones(4),
    }
    optimizer = pretrain.pretraining.muon(lambda _: 0.1, weight_decay=0.0, clip=1e9)
    grads = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) ** 2).reshape(leaf.shape),
        params,
    )
    grads["kernel"] *= jnp.array([10.0, 1.0, 1.0, 1.0])[None]
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    spread = {
        name: values.max() / values.min()
        for name, tree in (("gradient", grads), ("update", updates))
        for values in [np.linalg.svd(tree["kernel"], compute_uv=False)]
    }
    assert spread["update"] < 2 < 5 < spread["gradient"]
    for name in (updates["wte"]["embedding"], updates["bias"]):
        np.testing.assert_allclose(np.abs(name), 0.1, rtol=1e-3)  # Adam's first step: the sign.


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
    run = functools.partial(
        pretrain.main,
        [sources],
        output,
        shape="1x16",
        pieces=300,
        learning_rate=1e-2,
        optimizer="adamw",
    )
    run(steps=12)
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
    run(steps=12)
    again = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again] == metrics
    with pytest.raises(InputError, match=r"recipe\.json: pieces was 300, now 310"):
        run(steps=12, pieces=310)
    with pytest.raises(InputError, match=r"steps were 12, now 40, but the run is at step 12 and"):
        run(steps=40)


def test_a_run_that_is_extended_before_its_rate_falls_is_the_longer_run(pretrain, tmp_path):
    (tmp_path / "one.py").write_text("def f(x):\n    return x\n" * 200)
    (tmp_path / "two.py").write_text("def g(y):\n    return y + 1\n" * 200)
    shared = {
        "shape": "1x16",
        "pieces": 300,
        "rows": 2,
        "evaluation_windows": 2,
        "optimizer": "adamw",
    }
    losses = {}
    for name, lengths in (("straight", [15]), ("extended", [10, 15])):
        output = tmp_path / "runs" / name
        for steps in lengths:
            recipe = pretrain.Recipe(
                (str(tmp_path),), None, 10**6, 300, "1x16", 2, "adamw", 1e-2, "float32", 0, steps
            )
            if steps == 10:  # Stopped where the rate is about to fall.
                pretrain.keep_recipe(recipe, output)
                held = pretrain.Pretraining(recipe, output, 2)
                held.run(10, pretrain.LoopOptions(steps=recipe.decay))
            else:
                pretrain.main([tmp_path], output, steps=steps, learning_rate=1e-2,
                              other_bytes=10**6, **shared)  # fmt: skip
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses[name] = lines[-1]["loss"], lines[-1]["validation"]
    assert losses["extended"] == losses["straight"]


def test_the_steps_of_a_time_leave_room_for_what_stands_beside_them(pretrain, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pretrain.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pretrain, "TRIAL", 4)

    def run(steps, options, folder):
        # Half a minute of compiling and evaluating, then a tenth of a second for each step.
        now[0] += 30 + options.steps * 0.1
        lines = [{"tokens_per_second": speed} for speed in (2.0, 640.0)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    held = types.SimpleNamespace(recipe=types.SimpleNamespace(rows=2), length=32, run=run)
    found = pretrain.steps_within(held, 100.0)
    np.testing.assert_allclose(now[0] + 30 + found * 0.1, 100.0, atol=0.1)


def test_a_run_of_seconds_plans_its_steps_once(pretrain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "TRIAL", 4)
    (tmp_path / "one.py").write_text("def f(x):\n    return x\n" * 200)
    (tmp_path / "two.py").write_text("def g(y):\n    return y + 1\n" * 200)
    output = tmp_path / "run"
    few = {
        "shape": "1x16",
        "pieces": 300,
        "evaluation_windows": 2,
        "dtype": "bfloat16",
        "optimizer": "adamw",
    }
    planned = pretrain.steps_within
    # Killed in the trial.
    monkeypatch.setattr(pretrain, "steps_within", lambda run, seconds: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain.main([tmp_path], output, seconds=1e-3, **few)
    monkeypatch.setattr(pretrain, "steps_within", planned)
    pretrain.main([tmp_path], output, seconds=1e-3, **few)
    assert "4 steps fit 0.001 seconds" in capsys.readouterr().out
    assert json.loads((output / "recipe.json").read_text())["steps"] == 4
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    # Done: the same command finds its plan.
    monkeypatch.setattr(pretrain, "steps_within", lambda run, seconds: 1 / 0)
    pretrain.main([tmp_path], output, seconds=1e-3, **few)
    assert json.loads((output / "recipe.json").read_text())["steps"] == 4
    with pytest.raises(InputError, match=r"recipe\.json: pieces was 300, now 310"):
        pretrain.main([tmp_path], output, seconds=1e-3, **few | {"pieces": 310})
    for wrong, match in (
        ({"shape": "6-256"}, "--shape is '6-256', expected LAYERSxWIDTH"),
        ({"optimizer": "sgd"}, "--optimizer is 'sgd', expected one of adamw, muon"),
        ({"dtype": "int8"}, "--dtype is 'int8', expected float32 or bfloat16"),
    ):
        with pytest.raises(InputError, match=match):
            pretrain.main([tmp_path], tmp_path / "wrong", **few | wrong)
    assert not (tmp_path / "wrong").exists()
