"""Pre-training from a directory of source files to a checkpoint that loads, at a tiny size."""

import dataclasses
import functools
import gzip
import importlib.util
import json
import lzma
import re
import sys
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
    optimizer = pretrain.pretraining.muon(weight_decay=0.0, clip=1e9)
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
        np.testing.assert_allclose(np.abs(name), 1.0, rtol=1e-3)  # Adam's first step: the sign.


def test_a_step_moves_in_proportion_to_its_rate(pretrain):
    training = pretrain.pretraining
    for make in training.OPTIMIZERS.values():
        optimizer = make()
        step = training.make_step(lambda w, x: (jnp.sum((w["kernel"] * x) ** 2), x.size), optimizer)
        moved = []
        for rate in (1e-3, 2e-3):
            params = {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4)}
            before = np.asarray(params["kernel"])
            state = training.init_state(params, optimizer)
            state, _ = step(state, (np.float32(rate), np.ones((3, 4), np.float32)))
            moved.append(state.params["kernel"] - before)
        np.testing.assert_allclose(2 * moved[0], moved[1], rtol=1e-2)
        assert np.abs(moved[0]).max() > 1e-5


def test_the_rate_rises_stays_and_falls_to_a_tenth_over_the_last_steps(pretrain):
    rates = [pretrain.pretraining.rate_at(step, 2.0, 300, 50) for step in range(301)]
    assert rates[:101:50] == [0.0, 1.0, 2.0]
    assert set(rates[100:251]) == {2.0}
    np.testing.assert_allclose(np.diff(rates[250:]), -2.0 * 0.9 / 50)
    np.testing.assert_allclose(rates[300], 0.2)
    for steps, decay in ((None, 0), (400, 50)):
        assert [pretrain.pretraining.rate_at(n, 2.0, steps, decay) for n in range(251)] == rates[
            :251
        ]


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
    match = (
        "at step 12 of 12 and its learning rate falls from step 10, .* not to step 40 with Stage"
    )
    with pytest.raises(InputError, match=match):
        run(steps=40)
    with pytest.raises(InputError, match=r"not to step 12 with Stage.rows=9"):
        run(steps=12, rows=9)
    with pytest.raises(InputError, match="--decay is 13, expected 1 to 12, of --steps"):
        run(steps=12, decay=13)


def write_sources(directory):
    (directory / "one.py").write_text("def f(x):\n    return x\n" * 200)
    (directory / "two.py").write_text("def g(y):\n    return y + 1\n" * 200)


def test_a_run_that_goes_on_before_its_rate_falls_is_the_longer_run(pretrain, tmp_path):
    write_sources(tmp_path)
    few = {"shape": "1x16", "pieces": 300, "rows": 2, "evaluation_windows": 2, "optimizer": "adamw",
           "learning_rate": 1e-2}  # fmt: skip
    losses = {}
    for name, lengths in (("straight", [15]), ("extended", [10, 15])):
        output = tmp_path / "runs" / name
        for steps in lengths:
            if steps == 10:  # Stopped where the rate is about to fall.
                stage = pretrain.Stage(2, 1e-2, "float32", "cpu")
                recipe = pretrain.Recipe(
                    (str(tmp_path),), None, 8_000_000, 300, "1x16", "adamw", 0, (stage,), 10, 2
                )
                pretrain.keep_recipe(recipe, output)
                pretrain.Pretraining(recipe, output, 2).train(8)
            else:
                pretrain.main([tmp_path], output, steps=steps, **few)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses[name] = lines[-1]["loss"], lines[-1]["validation"]
    assert losses["extended"] == losses["straight"]


def test_a_run_goes_on_with_other_rows_and_another_rate_as_a_new_stage(pretrain, tmp_path):
    write_sources(tmp_path)
    output = tmp_path / "run"
    few = {"shape": "1x16", "pieces": 300, "evaluation_windows": 2, "optimizer": "adamw"}
    first = pretrain.Stage(4, 1e-2, "bfloat16", "gpu")
    recipe = pretrain.Recipe(
        (str(tmp_path),), None, 8_000_000, 300, "1x16", "adamw", 0, (first,), None, None
    )
    pretrain.keep_recipe(recipe, output)
    pretrain.Pretraining(recipe, output, 2).train(5)
    pretrain.main([tmp_path], output, steps=11, decay=6, rows=3, learning_rate=1e-3, **few)
    found = pretrain.read_recipe(output / "recipe.json")
    second = pretrain.Stage(3, 1e-3, "float32", "cpu", first=5)
    assert (found.stages, found.steps, found.decay) == ((first, second), 11, 6)
    assert [found.windows(step) for step in (0, 4, 5, 6, 11)] == [0, 16, 20, 23, 38]
    run = pretrain.Pretraining(found, output, 2)
    # Six steps of its decay; the peak is the stage's. The windows are those behind the 20 seen.
    rate, windows = run.batch(8)
    np.testing.assert_allclose(rate, 1e-3 * 8 / 100 * (1 - 0.9 * 3 / 6), rtol=1e-6)
    np.testing.assert_array_equal(windows, run.training.batch(7 + 3, 3, run.length, 0))
    card = " ".join((output / "model" / "README.md").read_text().split())
    assert f"It has seen {38 * 32:,} tokens" in card
    assert "5 steps of 4 windows on a GPU, in bfloat16" in card
    assert "6 steps of 3 windows on a CPU, in float32, with a peak learning rate of 0.001." in card
    # A stage that was asked for and took no step gives way to the next one.
    other = tmp_path / "other"
    pretrain.keep_recipe(recipe, other)
    assert pretrain.keep_recipe(
        recipe._replace(stages=(second._replace(first=0),)), other
    ).stages == (second._replace(first=0),)


def test_the_steps_of_a_time_are_measured_while_the_run_goes_on(pretrain, tmp_path, monkeypatch):
    now, speed = [0.0], {0: 0.1, 1000: 0.2}  # The device gets slower after a while.
    monkeypatch.setattr(pretrain.time, "monotonic", lambda: now[0])
    run = pretrain.Pretraining.__new__(pretrain.Pretraining)
    run.output, run.recipe = tmp_path, pretrain.Recipe((), None, 0, 300, "1x16", "adamw", 0, ())
    calls = []

    def train(steps):
        now[0] += 30 * (not calls) + 1  # Compiling, and evaluating each time.
        for step in range(calls[-1] if calls else 0, steps):
            now[0] += speed[1000 if step >= 1000 else 0]
        calls.append(steps)

    run.train = train
    planned = run.plan(400.0)
    before = calls[-1]
    train(planned.steps)
    assert before <= planned.steps - planned.decay
    assert planned.steps / 8 < planned.decay <= planned.steps / 5
    assert 380 < now[0] < 405


def test_a_run_of_seconds_plans_its_steps_once(pretrain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "FEW", 2)
    write_sources(tmp_path)
    output = tmp_path / "run"
    few = {
        "shape": "1x16",
        "pieces": 300,
        "evaluation_windows": 2,
        "dtype": "bfloat16",
        "optimizer": "adamw",
    }
    planned = pretrain.Pretraining.plan

    def stopped(run, seconds):
        run.train(3)
        raise ZeroDivisionError

    # Killed before the plan.
    monkeypatch.setattr(pretrain.Pretraining, "plan", stopped)
    with pytest.raises(ZeroDivisionError):
        pretrain.main([tmp_path], output, seconds=1e-3, **few)
    assert json.loads((output / "recipe.json").read_text())["steps"] is None
    monkeypatch.setattr(pretrain.Pretraining, "plan", planned)
    pretrain.main([tmp_path], output, seconds=1e-3, **few)
    # Three, two to compile again, and five stretches of two.
    assert "15 steps fit 0.001 seconds" in capsys.readouterr().out
    found = pretrain.read_recipe(output / "recipe.json")
    assert (found.steps, found.decay, len(found.stages)) == (15, 2, 1)
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 15
    # Done: the same command finds its plan.
    monkeypatch.setattr(pretrain.Pretraining, "plan", stopped)
    pretrain.main([tmp_path], output, seconds=1e-3, **few)
    assert pretrain.read_recipe(output / "recipe.json") == found
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
