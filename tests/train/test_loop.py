"""The loss, the schedule, the step, and a loop that a stop at any moment does not change."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pretraining import (
    adamw,
    init_state,
    make_step,
    next_token_loss,
    rate_at,
)
from flora_jax.errors import RunError
from flora_jax.train import loop
from flora_jax.train.interrupt import Interrupt, InterruptedRun
from flora_jax.train.loop import LoopOptions, NonFiniteLossError, Work, run_loop
from flora_jax.train.loss import bits_per_byte
from flora_jax.train.step import TrainState

# One test compares with a process of its own, bit for bit.
pytestmark = pytest.mark.usefixtures("optimised")

VOCABULARY, WIDTH, ROWS, LENGTH, STEPS = 11, 6, 3, 7, 9
OPTIMIZER, RATE = adamw(), np.float32(0.05)


def toy_loss(params, windows):
    """A bigram model with a bias."""
    hidden_BTD = params["table"][windows[:, :-1]]
    logits_BTV = hidden_BTD @ params["head"] + params["bias"][None, None]
    return next_token_loss(logits_BTV, windows[:, 1:])


rated_step = make_step(toy_loss, OPTIMIZER)


def toy_step(state, batch):
    return rated_step(state, (RATE, batch))


def toy_state():
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCABULARY, WIDTH), "head": (WIDTH, VOCABULARY), "bias": (VOCABULARY,)}
    params = {name: jnp.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}
    return init_state(params, OPTIMIZER)


def toy_batch(step):
    return np.random.default_rng(step).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)


@dataclasses.dataclass
class Batches:
    """Gives toy batches, remembers which, and fails at one."""

    stop_at: int | None = None
    asked: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, step):
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(step)
        return toy_batch(step)


def run(directory, batches=toy_batch, step=toy_step, evaluate=None, interrupt=None, **options):
    options = LoopOptions(**{"steps": STEPS, "save_seconds": 0, "log_every": 2} | options)
    work = Work(step, batches, tokens_per_batch=ROWS * LENGTH, evaluate=evaluate)
    return run_loop(toy_state(), work, directory, options, interrupt)


def lines_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("tokens_per_second") > 0
    return lines


def saved_steps(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def assert_same_state(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    # One checkpoint only, at the end.
    return run(directory, save_seconds=1e9), lines_of(directory), directory


def test_without_a_directory_nothing_is_kept_and_the_state_is_the_same(
    uninterrupted, tmp_path, monkeypatch
):
    expected, lines, _ = uninterrupted
    monkeypatch.setattr(loop.ocp, "CheckpointManager", None)
    monkeypatch.chdir(tmp_path)
    described = []
    work = Work(
        toy_step, toy_batch, tokens_per_batch=ROWS * LENGTH,
        describe=lambda measured: described.append(float(measured["loss"])) or {},
    )  # fmt: skip
    # Every step is due to be saved.
    found = run_loop(toy_state(), work, None, LoopOptions(STEPS, save_every=1, log_every=2))
    assert_same_state(found, expected)
    assert described == [line["loss"] for line in lines]
    with pytest.raises(InterruptedRun, match="at step 1 of 9"):
        run(None, step=interrupting(interrupt := Interrupt()), interrupt=interrupt)
    assert not list(tmp_path.iterdir())


def interrupting(interrupt):
    """A step during which the process is asked to end."""

    def step(state, batch):
        interrupt.request(signal.SIGTERM)
        return toy_step(state, batch)

    return step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["none", "random", "empty"])
def test_the_loss_is_that_of_numpy(dtype, mask):
    rng = np.random.default_rng(1)
    logits_BTV = jnp.asarray(5 * rng.standard_normal((2, 4, VOCABULARY)), dtype)
    targets_BT = rng.integers(0, VOCABULARY, (2, 4))
    masks = {"none": None, "random": rng.integers(0, 2, (2, 4)), "empty": np.zeros((2, 4), int)}
    mask_BT = masks[mask]
    wide = np.asarray(logits_BTV, np.float64)
    picked_BT = np.take_along_axis(wide, targets_BT[..., None], axis=2)[..., 0]
    nll_BT = np.log(np.exp(wide).sum(axis=-1)) - picked_BT
    counted_BT = np.ones((2, 4)) if mask_BT is None else mask_BT
    mask = None if mask_BT is None else jnp.asarray(mask_BT, bool)
    total, count = jax.jit(next_token_loss)(logits_BTV, jnp.int32(targets_BT), mask)
    np.testing.assert_allclose(total, (nll_BT * counted_BT).sum(), rtol=1e-5)
    assert float(count) == counted_BT.sum()
    assert count.dtype == total.dtype == jnp.float32


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)


@pytest.mark.parametrize(
    "step, share",
    [(0, 0), (50, 0.5), (100, 1), (101, 1), (799, 1), (800, 1), (900, 0.55), (1000, 0.1)],
)
def test_the_rate_at_the_borders_of_warmup_and_decay(step, share):
    assert rate_at(step, 3e-3, 1000, 200) == pytest.approx(3e-3 * share, rel=1e-5)


def test_the_rate_does_not_depend_on_the_length_before_the_decay():
    plans = (1000, 200), (5000, 1000), (None, 0)
    for step in range(0, 801, 40):
        assert len({rate_at(step, 0.1, *plan) for plan in plans}) == 1
    assert rate_at(900, 0.1, 1000, 200) < rate_at(900, 0.1, 5000, 1000)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_run_shorter_than_the_warmup_has_a_rate_at_every_step(steps):
    decay = max(1, steps // 5)
    assert all(0 <= rate_at(n, 1.0, steps, decay) <= 1 for n in range(0, 60, 3))
    assert rate_at(steps - decay, 1.0, steps, decay) == pytest.approx((steps - decay) / 100)


def test_weights_decay_and_vectors_do_not():
    optimizer = adamw(weight_decay=0.1)
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0), "scalar": jnp.float32(2.0)}
    step = make_step(lambda params, batch: (batch, jnp.float32(1)), optimizer)
    given = np.float32(0.5), jnp.float32(0)
    params = step(init_state(params, optimizer), given)[0].params
    np.testing.assert_allclose(params["kernel"], 2.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(params["bias"], 2.0)
    assert float(params["scalar"]) == 2.0


def test_a_repeated_batch_is_learned_and_the_state_is_donated():
    optimizer = adamw()
    step, state = make_step(toy_loss, optimizer), init_state(toy_state().params, optimizer)
    batch, losses = jnp.asarray(toy_batch(0)), []
    for _ in range(60):
        before = state
        state, measured = step(state, (RATE, batch))
        losses.append(float(measured["loss"]))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert int(state.step) == 60
    assert losses[-1] < 0.35 * losses[0]
    assert measured.keys() == {"loss", "grad_norm"}
    assert {value.dtype for value in measured.values()} == {jnp.dtype("float32")}


def test_the_reported_loss_and_norm_are_those_before_the_update():
    state, batch = toy_state(), jnp.asarray(toy_batch(0))
    loss, grads = jax.jit(
        jax.value_and_grad(lambda params: toy_loss(params, batch)[0] / (ROWS * (LENGTH - 1)))
    )(state.params)
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(grads)))
    _, measured = toy_step(state, batch)
    assert float(measured["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(measured["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_metrics_have_the_first_every_logged_every_evaluated_and_the_last_step(tmp_path):
    def evaluate(params):
        return {"bias": float(jnp.sum(params["bias"]))}

    run(tmp_path, evaluate=evaluate, log_every=4, evaluate_every=3, save_seconds=1e9, steps=8)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 4, 6, 8]
    assert [line["step"] for line in lines if "validation" in line] == [3, 6, 8]
    assert all({"loss", "grad_norm"} <= line.keys() for line in lines)


@pytest.mark.parametrize("stop_at, save_seconds, resumed_from", [(5, 0, 5), (1, 0, 1), (5, 1e9, 0)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    stop_at, save_seconds, resumed_from, tmp_path, uninterrupted
):
    state, lines, _ = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Batches(stop_at), save_seconds=save_seconds)
    batches = Batches()
    again = run(tmp_path, batches, save_seconds=1e9)
    assert batches.asked == list(range(resumed_from, STEPS))
    assert_same_state(again, state)
    assert lines_of(tmp_path) == lines
    assert [path.name for path in tmp_path.glob("*.part*")] == []


@pytest.mark.parametrize("stop_at, save_seconds", [(5, 1e9), (4, 0), (1, 1e9), (0, 1e9)])
def test_a_run_asked_to_end_saves_its_last_step_and_goes_on_from_there(
    stop_at, save_seconds, tmp_path, uninterrupted
):
    interrupt = Interrupt()

    def batches(step):
        if step == max(stop_at - 1, 0):
            interrupt.request(signal.SIGTERM)
        return toy_batch(step)

    if not stop_at:
        interrupt.request(signal.SIGTERM)
    with pytest.raises(InterruptedRun, match=f"SIGTERM at step {stop_at} of {STEPS}; --resume"):
        run(tmp_path, batches, interrupt=interrupt, save_seconds=save_seconds)
    assert saved_steps(tmp_path)[-1:] == ([stop_at] if stop_at else [])
    again = Batches()
    state, lines, _ = uninterrupted
    assert_same_state(run(tmp_path, again, save_seconds=1e9), state)
    assert again.asked == list(range(stop_at, STEPS))
    assert lines_of(tmp_path) == lines


def bias_of(params):
    return {"bias": float(jnp.sum(params["bias"]))}


@dataclasses.dataclass
class Evaluations:
    """Evaluates as ``bias_of`` does; a signal comes during some of them, counted from 0."""

    interrupted: tuple[int, ...]
    interrupt: Interrupt = dataclasses.field(default_factory=Interrupt)
    count: int = 0

    def __call__(self, params):
        self.count += 1
        if self.count - 1 in self.interrupted:
            self.interrupt.request(signal.SIGTERM)
        self.interrupt.check("in a validation")
        return bias_of(params)


EVALUATED = {"evaluate_every": 4, "save_seconds": 1e9}


@pytest.mark.parametrize("number, reached", [(0, 4), (1, 8), (2, STEPS)])
def test_a_run_asked_to_end_in_an_evaluation_saves_its_step_and_evaluates_it_later(
    number, reached, tmp_path
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, evaluate=bias_of, **EVALUATED)
    first, again = Evaluations((number,)), Evaluations((0,))
    with pytest.raises(InterruptedRun, match="in a validation"):
        run(stopped, evaluate=first, interrupt=first.interrupt, **EVALUATED)
    assert saved_steps(stopped) == [reached]
    # The evaluation that a resumed run begins with may be interrupted too.
    with pytest.raises(InterruptedRun, match="in a validation"):
        run(stopped, evaluate=again, interrupt=again.interrupt, **EVALUATED)
    batches = Batches()
    assert_same_state(run(stopped, batches, evaluate=bias_of, **EVALUATED), expected)
    assert batches.asked == list(range(reached, STEPS))
    assert lines_of(stopped) == lines_of(whole)


def test_a_step_that_was_evaluated_is_not_evaluated_again(tmp_path):
    run(tmp_path, steps=4, evaluate=bias_of, **EVALUATED)
    evaluations = Evaluations(())
    run(tmp_path, steps=4, evaluate=evaluations, **EVALUATED)
    assert evaluations.count == 0
    run(tmp_path, steps=8, evaluate=evaluations, **EVALUATED)
    assert evaluations.count == 1
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 4, 6, 8]


def test_a_resumed_step_whose_line_is_gone_is_evaluated(tmp_path):
    run(tmp_path, steps=4, evaluate=bias_of, **EVALUATED)
    validation = lines_of(tmp_path)[-1]["validation"]
    (tmp_path / "metrics.jsonl").unlink()
    run(tmp_path, steps=4, evaluate=bias_of, **EVALUATED)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 4, "validation": validation}


def test_a_step_whose_evaluation_fails_is_neither_logged_nor_saved(tmp_path):
    def evaluate(params):
        raise RunError("the validation loss is nan")

    with pytest.raises(RunError, match="validation loss is nan"):
        run(tmp_path, evaluate=evaluate, save_every=2, **EVALUATED)
    assert saved_steps(tmp_path) == [2]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_spoiled_step_is_not_saved_when_the_run_is_asked_to_end(tmp_path):
    interrupt = Interrupt()

    def batches(step):
        if step == 3:
            interrupt.request(signal.SIGTERM)
        return toy_batch(step)

    with pytest.raises(NonFiniteLossError, match="loss is nan at step 4"):
        run(tmp_path, batches, spoiled_step(4, "loss"), interrupt=interrupt, save_seconds=1e9)
    assert saved_steps(tmp_path) == []


def die_at(step, fatal):
    if step == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return toy_batch(step)


def test_a_killed_process_is_resumed_as_if_nothing_had_happened(tmp_path, uninterrupted):
    code = f"""
import pathlib, {__name__} as t
t.run(pathlib.Path({str(tmp_path)!r}), lambda step: t.die_at(step, 6))
"""
    root = str(Path(__file__).resolve().parents[2])
    killed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "tokens_per')
    batches = Batches()
    again = run(tmp_path, batches)
    # Only the checkpoint that was being written may be missing.
    assert batches.asked[0] in (5, 6)
    state, lines, _ = uninterrupted
    assert_same_state(again, state)
    assert lines_of(tmp_path) == lines


def test_a_finished_run_returns_at_once(uninterrupted):
    state, lines, directory = uninterrupted
    batches = Batches()
    assert_same_state(run(directory, batches), state)
    assert batches.asked == []
    assert lines_of(directory) == lines
    assert saved_steps(directory) == [STEPS]


def test_a_finished_run_can_be_extended_and_keeps_the_last_checkpoints(tmp_path):
    run(tmp_path, steps=3)
    batches = Batches()
    state = run(tmp_path, batches, steps=6, keep=2)
    assert (batches.asked, int(state.step)) == ([3, 4, 5], 6)
    assert saved_steps(tmp_path) == [5, 6]


def test_a_damaged_checkpoint_is_named_with_the_one_before(tmp_path):
    run(tmp_path, steps=4)
    last, before = sorted(saved_steps(tmp_path), reverse=True)[:2]
    for file in (tmp_path / "checkpoints" / str(last)).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    message = rf"checkpoints/{last}: damaged .*; without that directory .* from step {before}"
    with pytest.raises(RunError, match=message):
        run(tmp_path, steps=5)
    shutil.rmtree(tmp_path / "checkpoints" / str(last))
    assert int(run(tmp_path, steps=5).step) == 5


def test_metrics_past_the_checkpoint_are_cut_away(tmp_path):
    run(tmp_path, steps=4)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')
    run(tmp_path, steps=4)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 4]


def spoiled_step(spoiled, name):
    """From one step on the parameters are NaN, as is what is measured; then only ``name`` is."""

    def step(state, batch):
        state, measured = toy_step(state, batch)
        if int(state.step) == spoiled:
            measured[name] = jnp.float32(math.nan)
            params = jax.tree.map(lambda p: p * jnp.nan, state.params)
            state = TrainState(params, state.opt_state, state.step)
        return state, measured

    return step


@pytest.mark.parametrize("log_every", [1, 4, 1000])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_not_finite_is_named_and_never_saved(name, log_every, tmp_path):
    with pytest.raises(NonFiniteLossError, match=f"{name} is nan at step 4"):
        run(tmp_path, step=spoiled_step(4, name), log_every=log_every)
    assert saved_steps(tmp_path) == [2, 3]
    assert all(math.isfinite(line["loss"]) and line["step"] < 4 for line in lines_of(tmp_path))
    state = run(tmp_path, save_seconds=1e9)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_loss_that_is_not_finite_between_logs_is_named_at_the_next_one(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 4, .* before was [0-9.]+$"):
        run(tmp_path, step=spoiled_step(4, "loss"), log_every=3, save_seconds=1e9)
    assert saved_steps(tmp_path) == []
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3]


@dataclasses.dataclass
class Told:
    """A measure that tells when it is read."""

    value: jax.Array
    number: int
    events: list[tuple[str, int]]

    def __array__(self, dtype=None, copy=None):
        self.events.append(("read", self.number))
        return np.asarray(self.value, dtype)


def told_run(directory, **options):
    """What happened in which order: the dispatch of a step, by its number, and its loss's reading."""
    events = []

    def step(state, batch):
        number = len([name for name, _ in events if name == "dispatch"]) + 1
        events.append(("dispatch", number))
        state, measured = toy_step(state, batch)
        return state, measured | {"loss": Told(measured["loss"], number, events)}

    run(directory, step=step, **options)
    return events


def test_a_step_is_dispatched_before_the_measures_of_the_last_are_read(tmp_path, uninterrupted):
    events = told_run(tmp_path, log_every=1, save_seconds=1e9)
    for number in range(1, STEPS):
        read = events.index(("read", number))
        assert events.index(("dispatch", number + 1)) < read
        assert number + 2 > STEPS or read < events.index(("dispatch", number + 2))
    assert [number for name, number in events if name == "read"] == list(range(1, STEPS + 1))
    lines = {line["step"]: line for line in lines_of(tmp_path)}
    assert list(lines) == list(range(1, STEPS + 1))
    assert all(lines[line["step"]] == line for line in uninterrupted[1])


def test_only_saved_and_evaluated_steps_are_waited_for(tmp_path):
    def evaluate(params):
        return {"bias": float(jnp.sum(params["bias"]))}

    events = told_run(
        tmp_path, log_every=2, save_seconds=1e9, save_every=3, evaluate_every=5, evaluate=evaluate
    )
    waited = [
        number
        for number in range(1, STEPS)
        if events.index(("read", number)) < events.index(("dispatch", number + 1))
    ]
    # Steps 3 and 6 are saved and 5 is evaluated.
    assert waited == [3, 5, 6]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 4, 5, 6, 8, 9]


def test_a_late_report_of_a_step_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 4"):
        run(tmp_path, step=spoiled_step(4, "loss"), log_every=1, save_seconds=1e9)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    assert saved_steps(tmp_path) == []
