"""The load generator over HTTP, against a server whose delays are known."""

import asyncio
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flora_jax.bench.serving.drive import MetricOptions
from flora_jax.bench.serving.drive_http import Asked, Target, run_http
from flora_jax.bench.serving.latency_metrics import METRICS
from flora_jax.bench.serving.workload import WorkloadOptions, make_workload
from flora_jax.cli import bench_http
from flora_jax.errors import InputError, RunError
from tests.helpers.fake_openai import FakeServer

ROOT = Path(__file__).resolve().parents[3]
# What a busy machine may add to a time, seconds.
SLACK = 0.25
app = typer.Typer()
app.command()(bench_http.serve)


def options(count, prompt=5, output=4, **given):
    given = {"adapter_distribution": "uniform", "num_adapters": 3, **given}
    return WorkloadOptions(count, exact=(prompt, output), **given)


def measured(server, drawn, *, adapters=("a", "b", "c"), endpoint="/v1/completions", **asked):
    """The figures of a run."""
    workload = make_workload(drawn, 100, (), adapters)

    async def main():
        async with server.listening() as url:
            target = Target(url, endpoint, None, server.api_key)
            return await run_http(target, workload, Asked(**{"num_warmups": 0, **asked}))

    return asyncio.run(main())


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_times_are_those_of_the_servers_delays(endpoint):
    server = FakeServer(first_s=0.1, each_s=0.04)
    found = measured(server, options(6), endpoint=endpoint)
    assert (found["completed"], found["failed"], found["failed_by_status"]) == (6, 0, {})
    for key, seconds in (
        ("median_ttft_ms", 0.1), ("median_itl_ms", 0.04), ("median_tpot_ms", 0.04),
        ("median_e2el_ms", 0.1 + 3 * 0.04),
    ):  # fmt: skip
        assert 1000 * seconds - 1 <= found[key] <= 1000 * (seconds + SLACK), key
    assert found["duration"] >= 0.22
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 24)
    assert found["max_concurrent_requests"] == server.most == 6
    assert 0 < found["client_cores"] < 1


@pytest.mark.parametrize("usage, arrivals", [("all", 3), ("end", 3), ("none", 3)])
def test_tokens_that_come_in_one_event_are_one_arrival(usage, arrivals):
    """3, 3 and 1 of 7 tokens: three arrivals, two times between them, and a TPOT by the tokens."""
    server = FakeServer(each_s=0.06, per_event=3, usage=usage, writes=3)
    found = measured(server, options(1, output=7, ignore_eos=True))
    assert found["failed"] == 0
    # Without any usage each arrival counts as a token.
    assert found["total_output_tokens"] == (arrivals if usage == "none" else 7)
    tokens_after_the_first = found["total_output_tokens"] - 1
    assert found["mean_itl_ms"] * 2 == pytest.approx(found["mean_e2el_ms"] - found["mean_ttft_ms"])
    assert found["mean_tpot_ms"] * tokens_after_the_first == pytest.approx(
        found["mean_e2el_ms"] - found["mean_ttft_ms"]
    )


def test_failures_are_counted_by_status_and_belong_to_no_figure():
    fails = {0: 429, 1: "close", 2: "no end", 3: "error", 4: 500, 5: 429}
    server = FakeServer(each_s=0.01, fails=fails)
    found = measured(server, options(10), max_concurrency=1)
    assert (found["completed"], found["failed"]) == (4, 6)
    assert found["failed_by_status"] == {"429": 2, "connection": 1, "stream": 2, "500": 1}
    messages = {entry["index"]: entry["error"] for entry in found["errors"]}
    assert messages[0] == "429: no 429"
    assert messages[2] == "stream: it ended before [DONE]"
    assert messages[3] == "stream: broken"
    assert found["total_output_tokens"] == 16


def test_too_few_tokens_are_a_failure_only_where_all_were_asked_for():
    short = FakeServer(tokens=2)
    assert measured(short, options(2, ignore_eos=False))["total_output_tokens"] == 4
    assert "ignore_eos" not in short.requests[0][0]
    with pytest.raises(RunError, match="all 2 requests failed: 2 tokens, expected 4"):
        measured(short, options(2, ignore_eos=True))
    assert short.requests[-1][0]["ignore_eos"] is True


def test_goodput_counts_requests_within_the_bounds():
    # One at a time: none but the first two, which fail, is late.
    server = FakeServer(first_s=0.01, each_s=0.01, fails={0: 500, 1: 500})
    metrics = MetricOptions(goodput_ms={"ttft": 1000.0 * (0.01 + SLACK), "tpot": 1e6})
    found = measured(server, options(6), max_concurrency=1, metrics=metrics)
    assert found["request_goodput"] * found["duration"] == pytest.approx(4)
    tight = MetricOptions(goodput_ms={"ttft": 9.0})
    assert measured(server, options(6), metrics=tight)["request_goodput"] == 0


def test_concurrency_is_kept_and_the_wait_for_it_is_no_part_of_a_requests_time():
    server = FakeServer(first_s=0.05)
    found = measured(server, options(9), max_concurrency=3)
    assert server.most == found["max_concurrent_requests"] == found["max_concurrency"] == 3
    assert found["duration"] >= 3 * 0.05
    assert 49 <= found["median_ttft_ms"] <= 1000 * (0.05 + SLACK)


def test_requests_leave_at_the_rate_asked_for():
    server = FakeServer()
    drawn = options(20, request_rate=50.0, burstiness=2.0, seed=3)
    found = measured(server, drawn)
    arrivals = make_workload(drawn, 100).arrivals_s
    sent = [at for _, at in server.requests]
    for came, wanted in zip(sent, arrivals):
        assert came - sent[0] >= wanted - arrivals[0] - 0.02
    assert found["duration"] >= arrivals[-1] == pytest.approx(20 / 50)
    assert found["request_throughput"] <= 50


def test_each_request_goes_to_its_adapter_with_the_tokens_drawn_for_it():
    server, drawn = FakeServer(), options(12, adapter_distribution="zipf", seed=1)
    measured(server, drawn)
    workload = make_workload(drawn, 100, (), ("a", "b", "c"))
    sent = {(body["model"], tuple(body["prompt"])) for body, _ in server.requests}
    assert sent == {(one.adapter, one.prompt_token_ids) for one in workload.requests}
    body = server.requests[0][0]
    assert body.keys() == {
        "model", "prompt", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos"
    }  # fmt: skip
    assert (body["temperature"], body["stream_options"]) == (0, {"include_usage": True})
    measured(server, options(1), adapters=())
    assert server.requests[-1][0]["model"] == "base"  # The first that the server has.


@pytest.fixture(scope="module")
def server():
    fake = FakeServer(each_s=0.001, api_key="key")
    with fake.in_thread() as url:
        fake.url = url
        yield fake


def run(server, *words):
    done = CliRunner().invoke(
        app, ["--base-url", server.url, "--api-key", "key", *map(str, words)]
    )  # fmt: skip
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


SMALL = ("--num-prompts", 4, "--random-input-len", 3, "--random-output-len", 5)


def test_a_result_has_vllms_keys(server, tmp_path):
    output = tmp_path / "r.json"
    done = run(server, *SMALL, "--model", "base", "--lora-modules", "a", "--lora-modules", "b",
               "--ignore-eos", "--max-concurrency", 2, "--goodput", "e2el:60000",
               "--metric-percentiles", "50,99", "--output", output)  # fmt: skip
    result = json.loads(output.read_text())
    statistics = {
        f"{name}_{metric}_ms"
        for name in ("mean", "median", "std", "p50", "p99")
        for metric in METRICS
    }
    assert {key for key in result if key.endswith("_ms")} == statistics
    assert {
        "date", "model_id", "endpoint", "num_prompts", "request_rate", "burstiness",
        "max_concurrency", "duration", "completed", "failed", "total_input_tokens",
        "total_output_tokens", "request_throughput", "request_goodput", "output_throughput",
        "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests", "errors",
        "command", "machine", "versions", "client_cores", "failed_by_status", "base_url", "workload",
    } == result.keys() - statistics  # fmt: skip
    assert (result["completed"], result["total_output_tokens"]) == (4, 20)
    assert (result["request_rate"], result["max_concurrency"]) == ("inf", 2)
    assert result["request_goodput"] == result["request_throughput"]
    assert "TTFT" in done.output


def test_only_the_metrics_asked_for_are_reported(server, tmp_path):
    run(server, *SMALL, "--percentile-metrics", "e2el,ttft", "--output", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    metrics = {key.split("_")[1] for key in result if key.endswith("_ms")}
    assert metrics == {"ttft", "e2el"}


def test_save_result_names_the_file_as_vllm_does(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(server, *SMALL, "--model", "base", "--save-result", "--max-concurrency", 2)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("openai-infqps-concurrency2-base-")
    assert json.loads(path.read_text())["completed"] == 4


def test_drawn_lengths_are_those_of_the_benchmark_in_process(server):
    before = len(server.requests)
    run(server, "--num-prompts", 5, "--scale", 0.05, "--seed", 7, "--num-warmups", 0)
    drawn = make_workload(WorkloadOptions(5, scale=0.05, seed=7), 1000)
    lengths = {(len(body["prompt"]), body["max_tokens"]) for body, _ in server.requests[before:]}
    assert lengths == {
        (len(one.prompt_token_ids), one.sampling_params.max_tokens) for one in drawn.requests
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "other"], "--model is 'other', expected one of the server's: base, a, b, c"),
        (["--lora-modules", "d"], "--lora-modules is 'd', expected one of the server's"),
        (["--lora-modules", "a", "--lora-modules", "a"], "--lora-modules has 'a' twice"),
        (["--api-key", "other"], "answers 401, expected an --api-key it takes"),
        (["--base-url", "http://127.0.0.1:1"], "127.0.0.1:1, and no server answers there"),
        (["--base-url", "127.0.0.1"], "--base-url is '127.0.0.1', expected http://"),
        (["--endpoint", "/v1/embeddings"], "--endpoint is '/v1/embeddings', expected one of"),
        (["--random-input-len", "3"], "--random-input-len is 3 and --random-output-len None"),
        (
            ["--adapter-distribution", "distinct", "--lora-modules", "a"],
            "has 1 names, expected one",
        ),
        (["--adapter-distribution", "normal"], "--adapter-distribution is normal, expected one of"),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics has 'x', expected some of"),
        (["--max-concurrency", "0"], "--max-concurrency is 0, expected at least 1"),
        (["--num-prompts", "0"], "--num-prompts is 0, expected at least 1"),
        (["--request-rate", "trace"], "--lengths is None, expected a file with arrival times"),
        (["--random-input-len", "3", "--random-output-len", "0"], "--random-output-len is 0"),
        (
            ["--random-input-len", "3", "--random-output-len", "3", "--scale", "0.5"],
            "--scale is 0.5",
        ),
    ],
)
def test_bad_input_is_one_error_with_what_was_found(words, message, server):
    with pytest.raises(InputError, match=message):
        run(server, *words)


def test_the_command_needs_no_jax_and_ends_with_one_line_where_no_server_is():
    code = (
        "import sys; from flora_jax.cli import main\n"
        "sys.argv = ['flora-jax', 'bench', 'serve', '--base-url', 'http://127.0.0.1:1']\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, *({'jax', 'jaxlib', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2\n"
    assert len(done.stderr.splitlines()) == 1
    assert "no server answers there" in done.stderr


def test_the_arrivals_of_a_seed_are_those_of_the_benchmark_in_process():
    drawn = options(50, request_rate=3.0, seed=9)
    assert all(a <= b for a, b in itertools.pairwise(make_workload(drawn, 100).arrivals_s))
