"""The experiments that are clients of a server: what they compute, and a short run of the soak."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments"


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("http_overhead", FOLDER / "http_overhead.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "http_overhead", script)
    spec.loader.exec_module(script)
    return script


def line(overhead, contender, number, throughput, ttft, rows=16):
    figures = dict.fromkeys(overhead.SHOWN, 1.0)
    figures |= {"output_throughput": throughput, "median_ttft_ms": ttft}
    return {"rows": rows, "load": "full", "contender": contender, "round": number, **figures}


def test_servers_are_compared_with_the_engine_within_each_round(overhead):
    lines = [
        line(overhead, "engine", 0, 100.0, 10.0), line(overhead, "server", 0, 90.0, 14.0),
        line(overhead, "engine", 1, 200.0, 30.0), line(overhead, "server", 1, 190.0, 33.0),
        line(overhead, "engine", 2, 50.0, 20.0), line(overhead, "server", 2, 60.0, 29.0),
        line(overhead, "engine", 0, 1.0, 1.0, rows=32), line(overhead, "server", 0, 2.0, 3.0, rows=32),
    ]  # fmt: skip
    found = {(one["rows"], one["contender"]): one for one in overhead.summarise(lines)}
    server = found[16, "server"]
    assert server["throughput_ratio"] == 0.95
    assert (server["least_ratio"], server["most_ratio"]) == (0.9, 1.2)
    assert server["ttft_above_ms"] == 4.0
    assert server["output_throughput"] == 90.0
    assert found[16, "engine"]["throughput_ratio"] == 1.0
    assert found[32, "server"]["throughput_ratio"] == 2.0


def test_a_round_that_was_cut_short_is_left_out(overhead):
    lines = [line(overhead, "engine", 0, 1.0, 1.0), line(overhead, "server", 1, 1.0, 1.0)]
    assert [overhead.is_own(lines[0], other) for other in lines] == [True, False]
    assert not any(overhead.is_own(lines[1], other) for other in lines)


def test_all_contenders_of_a_round_get_the_same_requests_and_each_round_others(overhead):
    loads = overhead.loads(4, 0.1, 0, 0.5)
    assert {name: (one.requests, one.concurrency) for name, one in loads.items()} == {
        "full": (16, None), "clients": (12, 4), "arrivals": (6, None), "alone": (6, 1)
    }  # fmt: skip
    names = ["a", "b", "c", "d"]
    once, again = (loads["full"].workload(names) for _ in range(2))
    assert once == again
    assert [one.adapter for one in once.requests] == names * 4
    arrivals_s = loads["arrivals"].workload(names).arrivals_s
    assert max(arrivals_s) > 0 == max(loads["full"].workload(names).arrivals_s)
    assert overhead.loads(4, 0.1, 1, 0.5)["full"].workload(names).requests != once.requests


@pytest.mark.slow
def test_a_short_soak_over_http_finds_nothing_wrong(tmp_path):
    output = tmp_path / "soak.json"
    words = ["--requests", "300", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "soak_http.py"), *words],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["answered"] + result["disconnects"] == 300
    assert (result["compilations"], result["problems"]) == (0, [])
