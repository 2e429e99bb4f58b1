"""A run's options: the paper's recipe by default, files and command lines, and every refusal."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters.projections import match_targets
from flora_jax.adapters.registry import TRAITS
from flora_jax.errors import InputError
from flora_jax.files import whole_directory
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.train.options import make_options, read_file
from flora_jax.train.step import make_schedule

BASE = {"model": "some/base", "kind": "flora", "data": {"perl": "perl.jsonl"}}
TWO = {"data": {"perl": "p", "ruby": "r"}}


def options(**values):
    return make_options(BASE | values)


def test_the_defaults_are_the_papers_recipe():
    found = options()
    assert (found.steps, found.batch_size, found.rank, found.targets) == (1500, 8, 1, None)
    # No targets are PEFT's for LoRA: the paper's on its models.
    names = PRESETS["mini"].projections().names
    assert match_targets(names.default_targets("lora"), PRESETS["mini"].projections()) == (
        "attn.c_attn",
    )
    assert (found.weight_decay, found.dropout, found.seed) == (0.0, 0.0, 0)
    assert (found.schedule, found.warmup) == ("cosine", 100)
    rates = {kind: options(kind=kind).rate for kind in TRAITS}
    assert rates == {"flora": 8e-3, "lora": 1e-4, "ia3": 5e-3, "hira": 8e-3, "dora": 1e-4}
    assert options(kind="lora", learning_rate=3e-4).rate == 3e-4


def test_a_frozen_first_component_has_a_rate_of_its_own_by_default():
    frozen = options(kind="flora", rank=4, init="frozen_ones")
    assert frozen.rate == frozen.effective("cpu").learning_rate == 0.064
    for init in (None, "zero_sum", "ones"):
        assert options(kind="flora", rank=4, init=init).rate == 0.008
    assert options(kind="flora", rank=4, init="frozen_ones", learning_rate=0.1).rate == 0.1


@pytest.mark.parametrize("steps, given, warmup", [(9, None, 0), (50, None, 5), (5000, None, 100),
                                                  (50, 0, 0), (70, 70, 70)])  # fmt: skip
def test_warmup_is_a_tenth_at_most_a_hundred_unless_given(steps, given, warmup):
    assert options(steps=steps, warmup_steps=given).warmup == warmup


def test_rows_are_shared_by_the_adapters():
    assert options(**TWO, batch_size=6).rows == 3
    assert options(batch_size=6).rows == 6


@pytest.mark.parametrize(
    "mesh, sizes",
    [(None, (1, 1)), ("data=2", (2, 1)), ("tensor=4", (1, 4)), ("tensor=4,data=2", (2, 4))],
)
def test_the_mesh_is_named_sizes_in_any_order(mesh, sizes):
    assert options(mesh=mesh).devices() == sizes


REFUSED = {
    "nothing": ({"model": None, "kind": None}, ["model", "kind"]),
    "unknown option": ({"learning_rat": 1}, ["learning_rat", "1"]),
    "two problems": ({"steps": 0, "rank": 0}, ["steps is 0", "rank is 0"]),
    "wrong type": ({"steps": "many"}, ["steps", "integer", "'many'"]),
    "fraction of a step": ({"steps": 1.5}, ["steps", "1.5"]),
    "kind": ({"kind": "vera"}, ["kind is 'vera'", "lora, flora, ia3, hira, dora"]),
    "no data": ({"data": {}}, ["data is missing", "NAME=PATH"]),
    "data is a list": ({"data": ["a"]}, ["data", "['a']"]),
    "uneven batch": ({**TWO, "batch_size": 7}, ["batch_size is 7", "multiple of the 2"]),
    "batch 0": ({"batch_size": 0}, ["batch_size", "0"]),
    "accumulate": ({**TWO, "accumulate": 3}, ["accumulate is 3", "divisor of the 4 rows"]),
    "mesh rows": ({"mesh": "data=16"}, ["mesh", "16 devices", "8 rows"]),
    "mesh rows in parts": (
        {"mesh": "data=4", "accumulate": 4}, ["mesh", "4 devices", "2 rows in a pass"]
    ),
    "mesh axis": ({"mesh": "model=2"}, ["mesh is 'model=2'", "data=N,tensor=M"]),
    "mesh size": ({"mesh": "data=0"}, ["mesh is 'data=0'"]),
    "mesh word": ({"mesh": "data=two"}, ["mesh is 'data=two'"]),
    "mesh axis twice": ({"mesh": "data=2,data=2"}, ["mesh is 'data=2,data=2'"]),
    "empty mesh": ({"mesh": ""}, ["mesh is ''"]),
    "rank beyond all models": ({"rank": 100_000}, ["rank is 100000", "at most 65,536"]),
    "steps beyond int32": ({"steps": 10**20}, ["steps is 1000", "at most 1,000,000,000"]),
    "save_every beyond all": ({"save_every": 10**20}, ["save_every", "at most 1,000,000,000"]),
    "warm-up beyond the end": ({"steps": 50, "warmup_steps": 70}, ["warmup_steps is 70", "the 50 steps"]),
    "rank is a truth": ({"rank": True}, ["rank is True", "expected an integer"]),
    "rate is a truth": ({"learning_rate": True}, ["learning_rate is True", "expected a number"]),
    "steps are a string": ({"steps": "20"}, ["steps is '20'", "expected an integer"]),
    "model is a number": ({"model": 5}, ["model is 5", "expected a string"]),
    "no targets": ({"targets": []}, ["targets is ()", "1 or more"]),
    "target is a number": ({"targets": [5]}, ["targets.0 is 5", "expected a string"]),
    "rate beyond float32": ({"learning_rate": 1e39}, ["learning_rate is 1e+39", "at most 1e+38"]),
    "rate below float32": ({"learning_rate": 1e-50}, ["learning_rate is 1e-50", "1e-37 or more"]),
    "alpha beyond float32": ({"kind": "lora", "alpha": 1e39}, ["alpha is 1e+39"]),
    "near an option": ({"step": 5}, ["step (found 5) is no option", "did you mean steps?"]),
    "validation of nobody": ({"validation": {"lua": "x"}}, ["lua", "perl"]),
    "init for lora": ({"kind": "lora", "init": "ones"}, ["init", "flora", "found lora"]),
    "init": ({"init": "random"}, ["init", "'random'", "zero_sum"]),
    "reduction for hira": ({"kind": "hira", "reduction": "sum"}, ["reduction", "found hira"]),
    "dropout for flora": ({"dropout": 0.1}, ["dropout", "lora", "found flora"]),
    "alpha for ia3": ({"kind": "ia3", "alpha": 2.0}, ["alpha", "lora", "found ia3"]),
    "dropout of all": ({"kind": "lora", "dropout": 1.0}, ["dropout", "1"]),
    "frozen rank 1": ({"kind": "flora", "init": "frozen_ones"}, ["rank is 1", "2 or more"]),
    "ia3 rank 2": ({"kind": "ia3", "rank": 2}, ["rank is 2", "expected 1"]),
    "rate nan": ({"learning_rate": math.nan}, ["learning_rate", "nan"]),
    "rate 0": ({"learning_rate": 0}, ["learning_rate", "0"]),
    "rate infinite": ({"learning_rate": math.inf}, ["learning_rate", "inf"]),
    "clip nan": ({"clip": math.nan}, ["clip", "nan"]),
    "decay negative": ({"weight_decay": -1}, ["weight_decay", "-1"]),
    "dropout nan": ({"kind": "lora", "dropout": math.nan}, ["dropout", "nan"]),
    "max_corrupt nan": ({"max_corrupt": math.nan}, ["max_corrupt", "nan"]),
    "seed": ({"seed": -1}, ["seed", "-1"]),
    "large seed": ({"seed": 2**32}, ["seed", "4294967296"]),
    "schedule": ({"schedule": "sine"}, ["schedule", "cosine", "'sine'"]),
    "quantize": ({"quantize": "int2"}, ["quantize", "int8", "'int2'"]),
    "dtype": ({"dtype": "float64"}, ["dtype", "bfloat16", "'float64'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_option_what_was_found_and_what_was_expected(case):
    changed, named = REFUSED[case]
    values = {name: value for name, value in (BASE | changed).items() if value is not None}
    with pytest.raises(InputError) as refused:
        make_options(values)
    message = str(refused.value)
    assert "\n" not in message
    assert all(word in message for word in named), message


NO_DIRECTORY = {
    "": "not an empty one", ".": "one of dots", "..": "one of dots", "a/b": "without separators",
    "a\\b": "without separators", "a\nb": "printable", "a\0b": "printable", "\udc80": "printable",
    "checkpoints": "the run itself writes that", "data.json": "the run itself writes that",
    "curve.png": "the run itself writes that", ".lock": "the run itself writes that",
    "perl.part": "half-written output", "x" * 241: "at most 240 bytes, found 241",
    "λ" * 121: "at most 240 bytes, found 242",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_DIRECTORY)
def test_a_name_that_cannot_be_a_directory_of_the_run_is_refused_with_the_reason(name):
    with pytest.raises(InputError, match="expected a name that its directory can have") as refused:
        options(data={name: "x"})
    assert str(refused.value).startswith("data '")
    assert NO_DIRECTORY[name] in str(refused.value)
    assert len(str(refused.value)) < 220


@pytest.mark.parametrize("name", ["λ" * 120, "us$a_$=", "a b", "_x", "|", ".hidden"])
def test_the_longest_and_the_strangest_names_are_those_of_whole_directories(name, tmp_path):
    assert options(data={name: "x"}).rows == 8
    with whole_directory(tmp_path / name) as part:
        (part / "file").write_text("")
    assert (tmp_path / name / "file").exists()


TOML = """
model = "some/base"
kind = "hira"
steps = 20
learning-rate = 1e-3
targets = ["c_attn", "c_fc"]
[data]
perl = "perl.jsonl"
"""


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_file_gives_options_and_other_values_win(suffix, tmp_path):
    path = tmp_path / f"run{suffix}"
    json_text = json.dumps(
        BASE | {"kind": "hira", "steps": 20, "learning-rate": 1e-3, "targets": ["c_attn", "c_fc"]}
    )
    path.write_text(TOML if suffix == ".toml" else json_text)
    values = read_file(path)
    found = make_options(values)
    assert (found.kind, found.steps, found.rate) == ("hira", 20, 1e-3)
    assert (found.targets, found.data) == (("c_attn", "c_fc"), {"perl": "perl.jsonl"})
    again = make_options(values | {"steps": 30, "targets": "mlp.c_proj, c_fc"})
    assert (again.steps, again.rate, again.targets) == (30, 1e-3, ("mlp.c_proj", "c_fc"))


def test_saved_options_are_read_back_as_they_were(tmp_path):
    found = options(kind="lora", alpha=3.0, dropout=0.1, mesh="data=2", targets="c_fc", **TWO)
    path = tmp_path / "config.json"
    path.write_text(found.model_dump_json())
    assert make_options(read_file(path)) == found


@pytest.mark.parametrize(
    "name, text, named",
    [
        ("run.yaml", "steps: 3", "expected a .toml or a .json file"),
        ("run.toml", "steps = = 3\n", "line 1"),
        ("run.json", '{"steps": }', "line 1"),
        ("run.json", "[1]", "found a list, expected a table"),
        ("run.json", b"\xff", "utf-8"),
        ("run.toml", b"\xff", "utf-8"),
        ("run.json", '{"rank": 1, "rank": 2}', "rank is given twice"),
        ("run.json", '{"data": {"a": "x", "a": "y"}}', "a is given twice"),
        ("run.json", '{"batch-size": 1, "batch_size": 2}', "batch_size is given twice"),
        ("run.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_named(name, text, named, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as refused:
        read_file(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert named in str(refused.value)


def test_a_file_that_is_missing_or_no_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: no such file$"):
        read_file(tmp_path / "none.toml")
    (folder := tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match=r"folder\.toml: is a directory, expected"):
        read_file(folder)


def test_a_message_about_a_value_of_a_file_names_the_file():
    origins = dict.fromkeys(("rank", "warmup_steps", "data", "step"), Path("run.toml"))
    for changed, start in (
        ({"rank": 0}, "run.toml: rank is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 5, "warmup_steps": 9}, "run.toml: warmup_steps is 9"),
        ({"data": {"a/b": "x"}}, "run.toml: data 'a/b'"),
        ({"data": {"a": 1}}, "run.toml: data.a is 1"),
        ({"step": 3}, "run.toml: step (found 3) is no option"),
    ):
        with pytest.raises(InputError) as refused:
            make_options(BASE | changed, origins)
        assert str(refused.value).startswith(start)


# The share of the peak where that share of the steps behind the warm-up is gone.
SHAPES = {
    "cosine": lambda gone: (1 + np.cos(np.pi * gone)) / 2,
    "linear": lambda gone: 1 - gone,
    "constant": np.ones_like,
}


@pytest.mark.parametrize(
    "shape, shares",
    [
        ("cosine", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0, 130: 0}),
        ("linear", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 91: 0.1, 100: 0, 130: 0}),
        ("constant", {0: 0, 5: 0.5, 10: 1, 55: 1, 100: 1, 130: 1}),
    ],
)
def test_the_rate_at_the_borders_of_the_warmup_and_the_end(shape, shares):
    schedule = make_schedule(shape, 2e-3, 100, 10)
    for step, share in shares.items():
        assert float(schedule(step)) == pytest.approx(2e-3 * share, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "steps, warmup", [(1, 0), (1, 1), (5, 0), (5, 1), (40, 0), (40, 9), (9, 9)]
)
def test_the_rate_of_every_step_is_the_formulas(shape, steps, warmup):
    places = np.arange(steps + 1)
    gone = np.clip((places - warmup) / max(1, steps - warmup), 0, 1)
    shares = np.where(places < warmup, places / max(1, warmup), SHAPES[shape](gone))
    with jax.numpy_dtype_promotion("standard"):
        rates = make_schedule(shape, 8e-3, steps, warmup)(jnp.arange(steps + 1))
    np.testing.assert_allclose(
        np.broadcast_to(rates, shares.shape), 8e-3 * shares, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_without_warmup_the_first_step_has_the_peak(shape):
    assert float(make_schedule(shape, 1.0, 5, 0)(0)) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_warmup_that_fills_the_run_only_rises(shape, steps):
    schedule = make_schedule(shape, 1.0, steps, 20)
    rates = [float(schedule(n)) for n in range(steps)]
    assert rates == pytest.approx([n / 20 for n in range(steps)])
