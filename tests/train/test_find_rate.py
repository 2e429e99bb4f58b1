"""The search for a learning rate: copies are trained as if alone, and the best on held-out data wins."""

import contextlib
import io
import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax.train.find_rate
from flora_jax.errors import InputError
from flora_jax.train.find_rate import Search, Trial, find_rate
from flora_jax.train.options import check_rates, make_options, parse_rates, rates_around
from flora_jax.train.run import prepare
from flora_jax.train.step import (
    init_adapter_state,
    make_optimizer,
    make_optimizer_of_peak,
    make_schedule,
)
from tests.helpers.training_home import (
    LENGTH,
    NAMES,
    data_of,
    fill,
    inside,
    program,
    snapshot,
)

# The third goes far, the fourth farther than numbers go.
GOOD, BAD = (2e-3, 2e-2), (300.0, 1e6)
STEPS = 6
# What a copy has of its own beside its rate: dropout's keys, parts, decay.
OPTIONS = {
    "kind": "lora", "rank": 2, "targets": "c_attn", "dropout": 0.3, "accumulate": 2,
    "weight_decay": 0.1, "batch_size": 8, "seq_len": LENGTH, "eval_windows": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    fill(home)
    return home


def options_of(**changes):
    values = {"model": "flat", "steps": STEPS} | OPTIONS
    for option in ("data", "validation"):
        values[option] = {name: f"{name}.{option}.jsonl" for name in NAMES}
    return make_options(values | changes)


class Found(NamedTuple):
    """What the command printed and wrote, and the files that are new."""

    code: int
    lines: list[str]
    said: list[str]
    raw: dict
    new: set[str]


@pytest.fixture(scope="module")
def found(home):
    """Of a search over two data sets, with two rates that are far off.

    The file is that of the run to come, whose output, steps and warm-up are not the search's.
    """
    run = {"output": "later", "resume": True, "steps": 1500, "warmup_steps": 100, "model": "flat"}
    (home / "run.json").write_text(json.dumps(run | OPTIONS))
    before = snapshot(home)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(
            home, "train", "--config", "run.json", "--find-rate", "--steps", STEPS, "--mesh", "data=1",
            "--rates", ",".join(map(str, (*BAD, *GOOD))), "--output", "rates.json", *data_of(*NAMES),
            *data_of(*NAMES, option="validation"),
        )  # fmt: skip
    new = {name for name in snapshot(home).keys() - before.keys() if not name.startswith("cache/")}
    raw = json.loads((home / "rates.json").read_text())
    return Found(code, out.getvalue().splitlines(), err.getvalue().splitlines(), raw, new)


def test_every_rate_does_as_a_run_alone_at_that_rate(home, found):
    """Beside others that diverge."""
    trials = {(trial["rate"], trial["name"]): trial for trial in found.raw["trials"]}
    assert list(trials) == [(rate, name) for rate in (*GOOD, *BAD) for name in NAMES]
    rate = GOOD[1]
    options = options_of(learning_rate=rate).effective("cpu")
    with inside(home):
        run = prepare(options, None, say=lambda line: None)
    state, step = run.start()
    evaluate, losses = run.evaluator(), []
    before = evaluate(state.params)
    for number in range(STEPS):
        state, measured = step(state, run.batch_at(number))
        losses.append(np.asarray(measured["loss"]))
    after = evaluate(state.params)
    for number, name in enumerate(NAMES):
        trial = trials[rate, name]
        assert trial["first_loss"] == pytest.approx(losses[0][number], rel=1e-5)
        assert trial["last_loss"] == pytest.approx(losses[-1][number], rel=1e-4)
        bits = [measures[name]["bits_per_byte"] for measures in (before, after)]
        assert [trial["bits_before"], trial["bits_after"]] == pytest.approx(bits, rel=1e-5)
        # The agreement says something: at another rate it is another number.
        other = trials[GOOD[0], name]
        assert abs(other["bits_after"] - bits[1]) > 1e-3 * bits[1]
        assert [other["first_loss"], other["bits_before"]] == pytest.approx(
            [trial["first_loss"], trial["bits_before"]], rel=1e-6
        )


def test_adapters_with_peaks_of_their_own_move_as_each_alone_at_its_peak():
    peaks, steps = np.float32([1e-3, 2.0, 1e30]), 5
    rng = np.random.default_rng(0)
    start = {"a": rng.standard_normal((3, 4, 2)), "b": rng.standard_normal((3, 5))}
    grads = [
        jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), start) for _ in range(steps)
    ]
    start, grads = jax.tree.map(jnp.float32, (start, grads))

    def schedule_of(peak):
        return make_schedule("cosine", peak, steps, 2)

    def moved(optimizer, start, grads, peaks=None):
        with jax.numpy_dtype_promotion("standard"):
            state = init_adapter_state(start, optimizer, peaks)
            params, opt_state = state.params, state.opt_state
            update = jax.jit(jax.vmap(optimizer.update))
            for own in grads:
                updates, opt_state = update(own, opt_state, params)
                params = optax.apply_updates(params, updates)
        return params

    own = {"clip": 1.5, "weight_decay": 0.1}
    found = moved(make_optimizer_of_peak(schedule_of, **own), start, grads, jnp.asarray(peaks))
    for n, peak in enumerate(peaks[:2]):
        one = jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], (start, grads))
        right = moved(make_optimizer(schedule_of(float(peak)), **own), *one)
        for name, leaf in right.items():
            np.testing.assert_allclose(found[name][n], leaf[0], rtol=1e-5)
            assert not np.allclose(leaf[0], start[name][n], rtol=1e-5, atol=0)


def test_rates_that_diverge_are_reported_and_the_best_of_the_others_is_recommended(found):
    raw = found.raw
    far = {
        rate: [t["problem"] for t in raw["trials"] if t["rate"] == rate] for rate in raw["rates"]
    }
    assert [far[rate] for rate in GOOD] == 2 * [[None, None]]
    assert far[BAD[0]] == 2 * ["worse than at the start"]
    assert far[BAD[1]] == 2 * ["not finite in step 3"]
    assert [t["diverged"] for t in raw["trials"]] == [False] * 4 + [True] * 4
    means = {
        rate: np.mean([t["bits_after"] for t in raw["trials"] if t["rate"] == rate])
        for rate in GOOD
    }
    assert raw["recommended"] == min(means, key=means.get)
    assert raw["edge"] is None


def test_the_command_prints_a_table_and_writes_it_with_its_receipt(found):
    assert (found.code, found.new) == (0, {"rates.json"})
    raw, lines = found.raw, found.lines
    assert raw["command"].startswith("flora-jax train --config run.json --find-rate")
    assert raw["rates"] == [*GOOD, *BAD]
    assert (raw["options"]["steps"], raw["options"]["warmup_steps"]) == (STEPS, 0)
    assert found.said[0] == "4 rates x 2 adapters x 4 rows = 32 rows a step, 6 steps"
    assert f"lora of rank 2 for flat, {STEPS} steps" in lines[0]
    assert lines[-1] == "recommended: --learning-rate 0.02"
    for trial in raw["trials"]:
        (cells,) = [
            cells
            for line in lines
            if (cells := [cell.strip() for cell in line.split("│")])[1:3]
            == [f"{trial['rate']:g}", trial["name"]]
        ]
        numbers = [trial[name] for name in ("first_loss", "last_loss", "bits_before", "bits_after")]
        # What is not finite is null in the file.
        shown = ["nan" if number is None else f"{number:.4f}" for number in numbers]
        note = "best" if trial["rate"] == raw["best"][trial["name"]] else ""
        assert cells[3:8] == [*shown, trial["problem"] or note]


def trials(**bits):
    """Of adapters that start at 2 bits per byte: what each has at rates 1, 2, 3 …"""
    return tuple(
        Trial(name, float(rate), 3.0, 1.0, 2.0, after)
        for rate, many in enumerate(zip(*bits.values(), strict=True), 1)
        for name, after in zip(bits, many, strict=True)
    )


def search_of(*own):
    names = dict.fromkeys(trial.name for trial in own)
    return Search(options_of(data={name: "x" for name in names}, validation={}), own)


@pytest.mark.parametrize(
    "bits, best, edge",
    [
        ({"perl": [1.5, 1.2, 1.4]}, 2.0, None),
        ({"perl": [1.1, 1.2, 1.4]}, 1.0, "lowest"),
        ({"perl": [1.5, 1.2, 1.1]}, 3.0, "highest"),
        ({"perl": [1.2, 1.2, 1.4]}, 1.0, "lowest"),
        ({"perl": [1.5, 1.2, math.nan]}, 2.0, None),
        ({"perl": [1.5, 1.2, math.inf]}, 2.0, None),
        ({"perl": [2.1, 2.2, math.nan]}, None, None),
        # By the mean, and never one that is no good for one of them.
        ({"perl": [1.0, 1.2, 1.9], "ruby": [1.9, 1.6, 1.5]}, 2.0, None),
        ({"perl": [1.5, 0.1, 1.9], "ruby": [1.9, 2.1, 1.0]}, 3.0, "highest"),
    ],
)
def test_the_best_rate_has_the_fewest_held_out_bits_and_says_if_it_is_at_the_edge(bits, best, edge):
    found = search_of(*trials(**bits))
    assert (found.best(), found.edge()) == (best, edge)


def test_each_adapter_has_a_best_rate_of_its_own():
    found = search_of(*trials(perl=[1.0, 1.2, 1.9], ruby=[2.9, 1.6, 1.5]))
    assert [found.best(name) for name in NAMES] == [1.0, 3.0]
    assert (found.to_json()["best"], found.to_json()["recommended"]) == (
        {"perl": 1.0, "ruby": 3.0}, 2.0
    )  # fmt: skip


# Grids.


def test_rates_may_come_in_any_order():
    assert parse_rates("1e-2, 3e-3,1") == (3e-3, 1e-2, 1.0)


def test_the_usual_grid_reaches_from_a_sixteenth_to_256_times_the_rate():
    assert rates_around(1e-4) == pytest.approx(
        [6.25e-6, 2.5e-5, 1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2]
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("1e-3,many", "rates is '1e-3,many': 'many' is no number"),
        ("", "rates is '': '' is no number"),
        ("1e-3,,2", "rates is '1e-3,,2': '' is no number"),
        ("1e-3,0", "rates has 0, expected numbers from 1e-37 to 1e+38"),
        ("1e-3,-2", "rates has -2, expected numbers from"),
        ("inf,1", "rates has inf, expected numbers from"),
        ("1,nan", "rates has nan, expected numbers from"),
        ("1e-50,1", "rates has 1e-50, expected numbers from"),
        ("0.01,0.1,1e-2", "rates has 0.01 twice, expected each once"),
        ("0.01", "rates has 1, expected two or more to compare"),
    ],
)
def test_a_bad_grid_is_one_error_that_says_why(text, message):
    with pytest.raises(InputError) as refused:
        parse_rates(text)
    assert str(refused.value).startswith(message)


def test_no_rates_are_refused_from_python_too():
    with pytest.raises(InputError, match="rates has 0, expected two or more"):
        check_rates(())
    with pytest.raises(InputError, match="rates has 3 twice"):
        find_rate(options_of(), (3.0, 1.0, 3.0))


def test_an_adapter_without_held_out_data_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match="validation of ruby is missing, expected NAME=PATH"):
        find_rate(options_of(model="./none", validation={"perl": "p"}), (1.0, 2.0))


# The command.

ARGUMENTS = [
    "train", "flat", "--kind", "lora", "--targets", "c_attn", "--batch-size", "4", "--seq-len", LENGTH,
    *data_of("perl"), *data_of("perl", option="validation"), "--find-rate",
]  # fmt: skip


@pytest.mark.parametrize(
    "bits, code, last",
    [
        ([1.5, 1.2, 1.4], 0, "recommended: --learning-rate 2"),
        ([1.5, 1.2, 1.1], 0, "it is the highest that was tried, a higher one may be better: "),
        ([1.0, 1.2, 1.1], 0, "it is the lowest that was tried, a lower one may be better: "),
        ([2.5, 3.2, math.nan], 1, "flora-jax: no rate did well on all data: the lowest was 1,"),
    ],
)
def test_the_last_line_says_what_is_recommended(bits, code, last, home, capsys, monkeypatch):
    """After the table; the exit code is 1 where nothing is."""
    made = search_of(*trials(perl=bits))
    monkeypatch.setattr(flora_jax.train.find_rate, "find_rate", lambda *_, **__: made)
    assert program(home, *ARGUMENTS) == code
    out, err = capsys.readouterr()
    assert out.count("│ perl │") == 3
    assert ("recommended" in out) == (code == 0)
    assert (err if code else out).splitlines()[-1].startswith(last)


@pytest.mark.parametrize(
    "changes, named",
    [
        (["--rates", "0.1,x"], "rates is '0.1,x': 'x' is no number"),
        (["--output", "both"], "output is both, expected a new .json file with --find-rate"),
        (["--output", "taken.json"], "output is taken.json, which exists already"),
        (["--output", "none/rates.json"], "expected a file in an existing directory"),
        (["--resume"], "resume is True, expected none with --find-rate"),
        (["--num-processes", "2"], "num_processes is 2, expected none with --find-rate"),
        (["--warmup-steps", "70"], "warmup_steps is 70, expected at most the 60 steps"),
        (data_of("ruby"), "validation of ruby is missing"),
        (["--mesh", "tensor=99"], "mesh tensor=99 needs 99 devices"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_and_writes_nothing(changes, named, home, capsys):
    (home / "taken.json").write_text("{}")
    before = snapshot(home)
    assert program(home, *ARGUMENTS, *changes) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert (out, last.startswith("flora-jax: ")) == ("", True)
    assert named in last
    assert snapshot(home) == before


def test_rates_without_the_search_are_refused(home, capsys):
    assert program(home, *ARGUMENTS[:-1], "--output", "new", "--rates", "1,2") == 2
    assert "rates is '1,2', expected none without --find-rate" in capsys.readouterr().err
    assert not (home / "new").exists()
