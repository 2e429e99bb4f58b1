"""The figures' programs: a run that is there already is not run again, and the rates are as planned."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

from flora_jax.bench.receipts.collected import read_lines
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
PLAN = {"num_prompts": 6, "scale": 0.02, "ranks": (1, 4), "max_num_seqs": 2}
CAPACITY = 10.0


def load(name, monkeypatch, tmp_path):
    """The program without a model, engine or time; ``calls`` is what it would have measured."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    monkeypatch.setitem(sys.modules, name, script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(script, "prepare_jax", lambda: None)
    monkeypatch.setattr(script.jax, "clear_caches", lambda: None)
    monkeypatch.setattr(script.setup, "load_base", lambda *_: None)
    script.calls = []
    return script


@pytest.fixture
def throughput(monkeypatch, tmp_path):
    script = load("fig2_throughput", monkeypatch, tmp_path)
    monkeypatch.setitem(script.PLANS, "mini", script.Plan(**PLAN, sequential_ranks=(1,),
                                                          sequential_prompts=3))  # fmt: skip

    def measure(model, contender, asked):
        script.calls.append((contender.kind, contender.rank, len(asked.workload.requests)))
        rate = CAPACITY / (1 + contender.rank)
        names = ("request_throughput", "output_throughput", "total_token_throughput")
        about = {"kind": contender.kind, "rank": contender.rank, "failed": 0}
        return about | dict.fromkeys(names, rate)

    monkeypatch.setattr(script.setup, "measure", measure)
    return script


@pytest.fixture
def latency(monkeypatch, tmp_path):
    script = load("fig2_latency", monkeypatch, tmp_path)
    monkeypatch.setitem(script.PLANS, "mini", script.Plan(**PLAN))
    monkeypatch.setitem(script.PLANS, "3b", script.Plan(**PLAN, rate=8.0))

    @contextlib.contextmanager
    def running(model, contender, workload, *_):
        yield contender, {"kind": contender.kind, "rank": contender.rank}

    def run_throughput(engine, requests, **_):
        script.calls.append((engine.kind, engine.rank, None))
        return {"request_throughput": CAPACITY, "failed": 0}

    def run_latency(engine, requests, arrivals_s, **_):
        rate = len(requests) / arrivals_s[-1]
        script.calls.append((engine.kind, engine.rank, round(rate, 6)))
        metrics = [f"{s}_{m}_ms" for s in ("mean", "p99") for m in ("ttft", "tpot", "e2el", "itl")]
        return {"request_throughput": rate, "failed": 0, **dict.fromkeys(metrics, 5.0)}

    monkeypatch.setattr(script.setup, "running", running)
    monkeypatch.setattr(script, "run_throughput", run_throughput)
    monkeypatch.setattr(script, "run_latency", run_latency)
    return script


def test_throughput_runs_the_plan_once(throughput, tmp_path, capsys):
    throughput.main(["mini"], None, 0, 1, None)
    expected = [("none", 0, 6), ("flora", 1, 6), ("lora", 1, 6), ("flora", 4, 6), ("lora", 4, 6),
                ("sequential", 1, 3)]  # fmt: skip
    assert throughput.calls == expected
    throughput.main(["mini"], None, 0, 1, tmp_path / "figure.png")
    assert throughput.calls == expected
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_lines(throughput.RESULTS)) == 6


def test_throughput_goes_on_where_it_was_stopped(throughput):
    throughput.main(["mini"], None, 0, 1, None)
    lines = throughput.RESULTS.read_text().splitlines(keepends=True)
    throughput.RESULTS.write_text("".join(lines[:2]))
    del throughput.calls[:]
    throughput.main(["mini"], None, 0, 1, None)
    assert [call[:2] for call in throughput.calls] == [
        ("lora", 1), ("flora", 4), ("lora", 4), ("sequential", 1)
    ]  # fmt: skip


def test_another_seed_or_repeat_is_another_run(throughput):
    throughput.main(["mini"], None, 0, 1, None)
    throughput.main(["mini"], None, 1, 1, None)
    throughput.main(["mini"], None, 0, 3, None)
    assert len(throughput.calls) == 4 * 6
    rows = throughput.medians(read_lines(throughput.RESULTS))
    assert {(row["kind"], row["rank"]): row["to_base"] for row in rows}["lora", 4] == 1 / 5


def test_latency_measures_the_capacity_first_and_loads_from_it(latency, tmp_path):
    latency.main(["mini"], None, 0, 1, None)
    assert latency.calls == [
        ("none", 0, None),
        *((kind, rank, CAPACITY * part)
          for kind, rank in (("none", 0), ("flora", 1), ("lora", 1), ("flora", 4), ("lora", 4))
          for part in (0.5, 0.9)),
    ]  # fmt: skip
    count = len(latency.calls)
    lines = latency.RESULTS.read_text().splitlines(keepends=True)
    latency.RESULTS.write_text("".join(lines[:-1]))
    latency.main(["mini"], None, 0, 1, tmp_path / "figure.png")
    assert latency.calls[count:] == [("lora", 4, CAPACITY * 0.9)]
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_preset_with_a_rate_needs_no_capacity(latency):
    latency.main(["3b"], None, 0, 1, None)
    assert {call[2] for call in latency.calls} == {8.0}
    assert len(latency.calls) == 5


def test_an_experiment_ends_bad_input_with_one_line(throughput, monkeypatch, capsys):
    for words, message in (
        (["7b"], "PRESET is '7b', expected some of mini, 164m, 1b, 1b-gpu, 3b, 15b"),
        (["mini", "--seed", "x"], "Invalid value for '--seed'"),
    ):
        monkeypatch.setattr(sys, "argv", ["experiments/fig2_throughput.py", *words])
        with pytest.raises(SystemExit) as ended:
            run_function(throughput.main)
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"fig2_throughput: {message}")
        assert err.count("\n") == 1


def test_an_unknown_preset_is_named(throughput, latency):
    for script in (throughput, latency):
        with pytest.raises(InputError, match="PRESET is '7b', expected some of mini"):
            script.main(["7b"], None, 0, 1, None)
