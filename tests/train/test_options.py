"""A run's options: the paper's recipe by default, files and command lines, and every refusal."""

import json
import math

import pytest

from flora_jax.adapters.registry import TRAITS
from flora_jax.errors import InputError
from flora_jax.train.options import make_options, read_file
from flora_jax.train.step import warmup_then

BASE = {"model": "some/base", "kind": "flora", "data": {"perl": "perl.jsonl"}}
TWO = {"data": {"perl": "p", "ruby": "r"}}


def options(**values):
    return make_options(BASE | values)


def test_the_defaults_are_the_papers_recipe():
    found = options()
    assert (found.steps, found.batch_size, found.rank, found.targets) == (1500, 8, 1, ("c_attn",))
    assert (found.weight_decay, found.dropout, found.seed) == (0.0, 0.0, 0)
    assert (found.schedule, found.warmup) == ("cosine", 100)
    rates = {kind: options(kind=kind).rate for kind in TRAITS}
    assert rates == {"flora": 8e-3, "lora": 1e-4, "ia3": 5e-3, "hira": 8e-3, "dora": 1e-4}
    assert options(kind="lora", learning_rate=3e-4).rate == 3e-4


@pytest.mark.parametrize("steps, given, warmup", [(9, None, 0), (50, None, 5), (5000, None, 100),
                                                  (50, 0, 0), (50, 70, 70)])  # fmt: skip
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
    "two problems": ({"steps": 0, "rank": 0}, ["steps", "rank", "found 0"]),
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


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "checkpoints", "data.json", "curve.png"])
def test_a_name_that_cannot_be_a_directory_of_the_run_is_refused(name):
    with pytest.raises(InputError, match="expected a name that its directory can have") as refused:
        options(data={name: "x"})
    assert f"data {name!r}" in str(refused.value)


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
    ],
)
def test_a_damaged_file_is_named(name, text, named, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as refused:
        read_file(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "shape, shares",
    [
        ("cosine", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0, 130: 0}),
        ("linear", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 91: 0.1, 100: 0, 130: 0}),
        ("constant", {0: 0, 5: 0.5, 10: 1, 55: 1, 100: 1, 130: 1}),
    ],
)
def test_the_rate_at_the_borders_of_the_warmup_and_the_end(shape, shares):
    schedule = warmup_then(shape, 2e-3, 100, 10)
    for step, share in shares.items():
        assert float(schedule(step)) == pytest.approx(2e-3 * share, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_without_warmup_the_first_step_has_the_peak(shape):
    assert float(warmup_then(shape, 1.0, 5, 0)(0)) == 1.0


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_warmup_that_fills_the_run_only_rises(shape, steps):
    schedule = warmup_then(shape, 1.0, steps, 20)
    rates = [float(schedule(n)) for n in range(steps)]
    assert rates == pytest.approx([n / 20 for n in range(steps)])
