"""The layer benchmark: its programs compute what they say, its cost model finds what was planted."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from flora_jax.bench.layer import eq7
from flora_jax.bench.layer.measure import crossovers, measure, print_tables
from flora_jax.bench.layer.options import ALL_KINDS, FORMS, LayerOptions, projection_of
from flora_jax.bench.layer.programs import TARGET, Programs, apply_merged, work
from flora_jax.bench.receipts import machine, report
from flora_jax.bench.receipts.timing import interleaved
from flora_jax.cli.bench import app
from flora_jax.errors import InputError
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.weights.dense import Dense
from flora_jax.weights.product import explicit as explicit_weight
from tests.helpers import oracles

TINY = ["--inputs", "16", "--outputs", "24", "--ranks", "1,3", "--batch", "3", "--repeats", "2"]
RANKS = (1, 2, 4, 8, 16, 32, 64)


def _tiny(**changed):
    sizes = dict(inputs=16, outputs=24, batch=3, length=2, ranks=(1, 3), repeats=2)
    return LayerOptions(**sizes | dict(measure_limits=False) | changed)


@pytest.mark.parametrize(
    "seed, quantize, layout",
    [(0, "none", "auto"), (1, "none", "inputs"), (2, "none", "outputs"), (3, "int8", "auto"),
     (4, "int4", "inputs")],
)  # fmt: skip
def test_every_case_computes_each_row_under_its_own_explicit_weight(seed, quantize, layout):
    options = _tiny(seed=seed, quantize=quantize, layout=layout)
    made = Programs(options)
    x, W, bias = made.base
    assert isinstance(W, Dense) == (quantize == "none" and layout != "inputs")
    explicit = explicit_weight(W, jax.numpy.float32)
    for kind, form, rank in options.cases():
        if form == "merged":
            found = apply_merged(x, *made.build(kind, rank).run())
        else:
            found = made.program((kind, form, rank)).run()
        own = [None] * 3
        if rank is not None:
            own = [adapter.layers[0][TARGET] for adapter in made.adapters(kind, rank).values()]
        expected = np.stack([oracles.project(p, row, explicit, bias) for p, row in zip(own, x)])
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max(), (kind, form, rank)


@pytest.mark.parametrize("kind", ["flora", "lora", "ia3", "hira"])
def test_every_row_has_another_adapter(kind):
    own = Programs(_tiny(batch=5)).adapters(kind, 1).values()
    first = [np.asarray(jax.tree.leaves(adapter.layers[0][TARGET])[0]).tobytes() for adapter in own]
    assert len(set(first)) == 5


def test_counted_operations_are_those_of_the_compiled_program():
    options = _tiny(inputs=128, outputs=192, batch=16, length=4)
    made = Programs(options)
    counted, compiled = {}, {}
    for case in [("base", "plain", None), ("flora", "einsum", 3), ("hira", "einsum", 3)]:
        counted[case] = work(case, options)[1]
        compiled[case] = made.program(case).run.func.cost_analysis()["flops"]
    for case, operations in compiled.items():
        assert counted[case] == pytest.approx(operations, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_finds_planted_constants_and_their_crossover(seed):
    rng = np.random.default_rng(seed)
    inputs, outputs, tokens = (int(n) for n in rng.integers([64, 64, 1], [4096, 4096, 512]))
    c2 = 10 ** rng.uniform(-12, -9)
    # Below this share there is a crossing; drawn on both sides.
    share = rng.uniform(0.1, 1.5)
    c1 = share * c2 * inputs * outputs / (inputs + outputs)
    flora = {r: c2 * r * inputs * outputs * tokens for r in RANKS}
    lora = {r: (c2 * inputs * outputs + c1 * r * (inputs + outputs)) * tokens for r in RANKS}
    found = eq7.fit(inputs, outputs, tokens, flora, lora, base=flora[1])
    assert (found.c1, found.c2) == pytest.approx((c1, c2), rel=1e-6)
    assert found.error < 1e-6
    predicted = eq7.predicted_rank(found, inputs, outputs)
    crossing = eq7.measured_crossing(flora, lora)
    assert (predicted is None) == (share >= 1)
    for rank in RANKS:
        # The paper's inequality, with 2/d of a rectangle.
        holds = c1 * (inputs + outputs) / (c2 * inputs * outputs) + 1 / rank >= 1
        assert holds == (predicted is None or rank <= predicted)
        assert holds == (flora[rank] <= lora[rank])
    if predicted is not None and predicted < RANKS[-1]:
        below = max(rank for rank in RANKS if rank <= predicted)
        assert below <= crossing.rank <= 2 * below
        assert crossing.changes == 1
    else:
        assert crossing.rank is None
        assert "cheaper at every rank" in crossing.verdict


def test_a_crossing_is_told_only_within_the_measured_ranks():
    level = {rank: 1.0 for rank in RANKS}
    expensive = eq7.measured_crossing({rank: 2.0 for rank in RANKS}, level)
    assert (expensive.rank, expensive.changes) == (None, 0)
    assert "more expensive at every rank" in expensive.verdict
    # Equal at exactly rank 8 on logarithmic axes.
    assert eq7.measured_crossing({r: r / 8 for r in (2, 4, 16)}, level).rank == pytest.approx(8)
    wavy = eq7.measured_crossing({1: 2.0, 2: 0.5, 4: 2.0, 8: 0.5}, level)
    assert (wavy.rank, wavy.changes) == (None, 3)
    assert eq7.measured_crossing({1: 1.0}, {2: 1.0}).rank is None


def test_ranks_that_cost_lora_nothing_give_no_negative_constant():
    flora = {r: 1e-9 * r for r in RANKS}
    found = eq7.fit(10, 10, 1, flora, {r: 1e-9 / r for r in RANKS})
    assert found.c1 == 0
    assert found.c2 > 0
    assert eq7.predicted_rank(found, 10, 10) == 1


def test_a_fit_that_is_far_off_predicts_nothing(capsys):
    options = LayerOptions(64, 64, batch=1, length=1, forms=("einsum",), ranks=(1, 8))

    def measured(flora):
        rows = [
            {"kind": kind, "form": "einsum", "rank": rank, "seconds": seconds}
            for kind, times in (("flora", flora), ("lora", {1: 1e-6, 8: 1.1e-6}))
            for rank, seconds in times.items()
        ]
        (found,) = crossovers(options, rows)
        print_tables({
            "options": dataclasses.asdict(options), "results": rows, "from_cache": False,
            "eq7": [found],
        })  # fmt: skip
        return found, "says nothing of a crossover" in capsys.readouterr().out

    good, said = measured({1: 1e-6, 8: 8e-6})
    assert (good["fit_holds"], good["predicted_rank"] is not None, said) == (True, True, False)
    bad, said = measured({1: 1e-6, 8: 1e-6})
    assert bad["fit_error"] > 0.5
    assert (bad["fit_holds"], bad["predicted_rank"], said) == (False, None, True)
    assert bad["verdict"] == "FLoRA is cheaper at every rank measured"


def test_forms_without_both_kinds_and_merged_weights_have_no_crossover():
    options = _tiny()
    results = [
        {"kind": kind, "form": form, "rank": rank, "seconds": rank if kind == "flora" else 2.0}
        for kind in ("flora", "lora")
        for form in FORMS
        for rank in (1, 3)
        if (kind, form) != ("lora", "vmap")
    ]
    found = crossovers(options, results)
    assert [row["form"] for row in found] == ["einsum", "batched", "ragged"]
    assert all(1 < row["measured_rank"] < 3 for row in found)


def test_programs_run_in_turns_and_the_first_round_is_not_timed():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(programs, 4, lambda: calls.append("|"))
    assert [len(found) for found in times.values()] == [4, 4, 4]
    order = [call for call in calls if call != "|"]
    assert calls.count("|") == 15
    assert [sorted(order[n : n + 3]) for n in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    with pytest.raises(ValueError, match="repeats is 0"):
        interleaved(programs, 0)


def test_what_does_not_fit_is_left_out_and_said():
    options = _tiny(inputs=64, outputs=64, ranks=(1, 512), forms=("einsum", "merged"))
    whole = measure(options)
    assert not [row for row in whole["results"] if "skipped" in row]
    limited = measure(_tiny(**vars(options) | {"memory_gib": 0.0005}))
    by_case = {(row["kind"], row["form"], row["rank"]): row for row in limited["results"]}
    assert set(by_case) == set(options.cases())
    for (kind, _, rank), row in by_case.items():
        if rank == 512:
            assert row["seconds"] is None
            assert "the limit is 0.0005" in row["skipped"]
        elif kind == "base":
            assert row["seconds"] > 0
    with pytest.raises(InputError, match="limit is 1e-06"):
        measure(_tiny(memory_gib=1e-6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_command_measures_everything_and_says_on_what(dtype, tmp_path):
    files = tmp_path / "layer.json", tmp_path / "layer.png"
    words = ["--dtype", dtype, "--no-limits", "--output", str(files[0]), "--plot", str(files[1])]
    done = CliRunner().invoke(app, ["layer", *TINY, *words], catch_exceptions=False)
    assert done.exit_code == 0
    written = json.loads(files[0].read_text())
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["jax"] == jax.__version__
    assert {"command", "date"} < set(written)
    expected = _tiny().cases()
    assert [(r["kind"], r["form"], r["rank"]) for r in written["results"]] == expected
    for row in written["results"]:
        assert row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
        assert ("build_seconds" in row) == (row["form"] == "merged")
    assert [row["form"] for row in written["eq7"]] == ["einsum", "vmap", "batched", "ragged"]
    assert files[1].read_bytes()[:4] == b"\x89PNG"
    for kind in ALL_KINDS:
        assert kind in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--inputs", "16"], "found --inputs 16, expected --inputs with --outputs"),
        ([*TINY, "--preset", "mini"], "--preset mini, expected --inputs"),
        (["--preset", "7b"], "--preset is '7b', expected one of mini, 164m"),
        (
            ["--target", "c_proj"],
            "--target is 'c_proj', expected one of attn.c_proj and mlp.c_proj",
        ),
        (["--target", "lm_head"], "target 'lm_head': expected the end of"),
        (["--inputs", "0", "--outputs", "8"], "--inputs is 0, expected at least 1"),
        (["--ranks", "1,x"], "--ranks is '1,x', expected numbers"),
        (["--ranks", "4,0"], "--ranks is 4,0, expected different ranks from 1 up"),
        (["--ranks", "4,4"], "--ranks is 4,4, expected different"),
        (["--kinds", "flora,vera"], "--kinds is flora,vera, expected of base, lora"),
        (["--forms", "bmm"], "--forms is bmm, expected of einsum"),
        (["--dtype", "float8"], "--dtype is float8, expected of float32"),
        (["--quantize", "int2"], "--quantize is int2, expected of none, int8, int4"),
        (["--batch", "-1"], "--batch is -1"),
        (["--layout", "rows"], "--layout is rows, expected of auto, inputs, outputs"),
        (["--layout", "outputs", "--quantize", "int8"], "--layout is outputs, expected auto or"),
        (["--seed", "-1"], "--seed is -1, expected 0 to"),
        (["--memory-limit", "nan"], "--memory-limit is nan, expected GiB above 0"),
        (["--inputs", "17", "--outputs", "8", "--quantize", "int4"], "17 input features"),
        ([*TINY, "--plot", "/no/such/place.png"], "--plot is /no/such/place.png, expected a file"),
    ],
)
def test_bad_input_is_one_error_with_what_was_found(words, message, tmp_path):
    output = tmp_path / "never.json"
    done = CliRunner().invoke(app, ["layer", "--no-limits", *words, "--output", str(output)])
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not output.exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_its_projections_widths(preset):
    width = PRESETS[preset].n_embd
    assert projection_of(preset, "attn.c_attn") == (width, width + 2 * PRESETS[preset].head_dim)
    assert projection_of(preset, "mlp.c_proj") == (4 * width, width)


def test_results_are_plain_numbers_and_replace_the_old_ones_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    report.write_results(path, {"a": (np.float32(1.5), np.arange(2)), "b": math.nan, 3: True})
    written = json.loads(path.read_text())
    assert (written["a"], written["b"], written["3"]) == ([1.5, [0, 1]], None, True)
    before = path.read_text()
    with pytest.raises(TypeError):
        report.write_results(path, {"a": object()})
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_table_shows_what_is_missing_as_a_dash(capsys):
    report.table("title", [{"a": 0.12345, "b": "[x]"}, {"a": None}], {"a": "first", "b": "second"})
    shown = capsys.readouterr().out
    assert "0.1235" in shown
    assert "[x]" in shown
    assert "first" in shown
    assert shown.count("–") == 2


def test_a_plot_survives_gaps_and_empty_series(tmp_path):
    path = tmp_path / "plot.png"
    series = {"gap": [(1, 2.0), (2, None), (4, 3.0)], "nothing": [(1, None)], "empty": []}
    report.plot_lines(path, series, "x", "y", "title", logx=True, logy=True)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_measured_limits_bound_a_time():
    found = {
        "bytes_per_second": machine.memory_bandwidth(megabytes=1, repeats=2),
        "operations_per_second": machine.product_rate(sizes=(64,), repeats=2),
    }
    assert min(found.values()) > 1e6
    limits = {"bytes_per_second": 10.0, "operations_per_second": 4.0}
    assert machine.least_seconds(limits, 20, 4) == 2
    assert machine.least_seconds(limits, 20, 12) == 3


def test_describing_a_machine_and_reading_the_command_line_need_no_jax():
    code = (
        "import sys, flora_jax.cli.bench; from flora_jax.bench.receipts import machine, report; "
        "found = machine.describe(); machine.versions(); machine.command(); "
        "print(found['devices'], *({'jax', 'jaxlib', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("None", "")
