"""The serving benchmarks: metrics against hand-computed numbers, the driver against a fake engine that
moves a fake clock, and the commands on a tiny model.
"""

import collections
import dataclasses
import functools
import json
import random
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from flora_jax.bench import machine
from flora_jax.bench.collected import append_line, by_preset, find, read_lines
from flora_jax.bench.latency_metrics import Record, is_good, latency, parse_goodput, throughput
from flora_jax.bench.serving import drive, most_at_once, run_latency, run_throughput
from flora_jax.cli import bench_serving
from flora_jax.errors import InputError, RunError
from flora_jax.serve.request import Request

SEEDS = range(5)


class FakeEngine:
    """Draws ``per_step`` tokens for every request it has, in ``seconds`` of a clock of its own.

    ``fails`` maps the index of a request to the number of tokens after which it fails, ``refuses`` has
    those that are not taken, ``loses`` those whose end never comes, ``short`` those that end early.
    """

    def __init__(self, seconds=1.0, per_step=1, fails=(), refuses=(), loses=(), short=()):
        self.now = 0.0
        self.seconds, self.per_step = seconds, per_step
        self.fails, self.refuses = dict(fails), set(refuses)
        self.loses, self.short = set(loses), set(short)
        self.live = {}
        self.slept = []
        self.batches = []
        self.tickets = 100
        self.stats = SimpleNamespace(preemptions=3, adapter_loads=5, adapter_evictions=7)
        self.compilations = SimpleNamespace(count=2)

    def clock(self):
        return self.now

    def sleep(self, seconds):
        assert not self.live
        self.slept.append(seconds)
        self.now += seconds

    @property
    def has_work(self):
        return bool(self.live)

    def add(self, request):
        if request.index in self.refuses:
            raise InputError(f"request {request.index}: refused")
        self.tickets += 1
        self.live[self.tickets] = [request, 0]
        return self.tickets

    def step(self):
        self.now += self.seconds
        self.stats.preemptions += 1
        self.batches.append([request.index for request, _ in self.live.values()])
        updates = []
        for ticket, entry in list(self.live.items()):
            request, drawn = entry
            new = min(self.per_step, request.max_tokens - drawn)
            entry[1] = drawn + new
            error = "broken" if self.fails.get(request.index, 10**9) <= entry[1] else None
            ended = entry[1] == request.max_tokens or request.index in self.short
            if error or ended or request.index in self.loses:
                del self.live[ticket]
            if request.index in self.loses:
                continue
            updates.append(
                SimpleNamespace(
                    ticket=ticket, token_ids=(1,) * new, error=error,
                    completion="done" if ended and not error else None,
                )
            )  # fmt: skip
        return updates

    def latency(self, requests, arrivals, **asked):
        return run_latency(self, requests, arrivals, clock=self.clock, sleep=self.sleep, **asked)

    def drive(self, requests, arrivals, **asked):
        return drive(self, requests, arrivals, clock=self.clock, sleep=self.sleep, **asked)


def requests(*outputs, adapters=None, prompt=3):
    return [
        Request(n, (1,) * prompt, adapters[n] if adapters else f"a{n}", max_tokens=output,
                ignore_eos=True)
        for n, output in enumerate(outputs)
    ]  # fmt: skip


# One request of 4 tokens that starts at 1 s: the first two come at 3 s, the other two at 5 s.
TWICE = Record(0, 10, 1.0, [(3.0, 2), (5.0, 2)], 5.0)
# One of a single token, at once; one of three, one by one; one that failed.
SINGLE = Record(1, 20, 2.0, [(2.5, 1)], 2.5)
THREE = Record(2, 30, 0.0, [(1.0, 1), (2.0, 1), (4.0, 1)], 4.0)
FAILED = Record(3, 40, 0.0, [(1.0, 5)], 2.0, "broken")


def test_latencies_are_those_computed_by_hand():
    found = latency([TWICE, SINGLE, THREE, FAILED], 10.0, percentiles=(50, 100, 99.9))
    # TTFT 2, 0.5, 1; E2EL 4, 0.5, 4; TPOT 2/3, -, 3/2; ITL 0 1 1, -, 1 2; gaps 2, -, 1 2.
    assert found["mean_ttft_ms"] == pytest.approx(3500 / 3)
    assert found["median_ttft_ms"] == found["p50_ttft_ms"] == 1000
    assert found["p100_ttft_ms"] == 2000
    assert found["p99.9_ttft_ms"] == pytest.approx(1998)
    assert found["std_ttft_ms"] == pytest.approx((7 / 18) ** 0.5 * 1000)
    assert found["mean_tpot_ms"] == pytest.approx(1000 * (2 / 3 + 3 / 2) / 2)
    assert found["mean_itl_ms"] == 1000
    assert found["p100_itl_ms"] == 2000
    assert found["mean_e2el_ms"] == pytest.approx(8500 / 3)
    assert found["mean_gap_ms"] == pytest.approx(5000 / 3)


def test_tokens_that_come_together_share_the_time_since_the_one_before():
    assert TWICE.itls_s == [0.0, 1.0, 1.0]  # The second one came with the first.
    assert THREE.itls_s == [1.0, 2.0]
    assert Record(0, 1, 0.0, [(1.0, 1), (4.0, 3), (4.5, 1)], 4.5).itls_s == [1.0, 1.0, 1.0, 0.5]
    assert SINGLE.itls_s == []


def test_counts_and_rates_leave_failures_out_but_list_them():
    found = throughput([TWICE, SINGLE, THREE, FAILED], 10.0)
    assert found == {
        "duration": 10.0, "completed": 3, "failed": 1,
        "errors": [{"index": 3, "error": "broken"}],
        "total_input_tokens": 60, "total_output_tokens": 8,
        "request_throughput": 0.3, "output_throughput": 0.8, "total_token_throughput": 6.8,
    }  # fmt: skip
    assert latency([FAILED], 1.0)["mean_ttft_ms"] is None


@pytest.mark.parametrize(
    "bounds, good",
    [
        ({"ttft": 2000}, [True, True, True, False]),
        ({"ttft": 1999}, [False, True, True, False]),
        ({"tpot": 700}, [True, True, False, False]),  # A single token has no TPOT to miss.
        ({"ttft": 1500, "tpot": 1500, "e2el": 4000}, [False, True, True, False]),
        ({"e2el": 100}, [False, False, False, False]),
    ],
)
def test_goodput_counts_what_is_within_all_bounds(bounds, good):
    records = [TWICE, SINGLE, THREE, FAILED]
    assert [is_good(record, bounds) for record in records] == good
    assert latency(records, 10.0, goodput_ms=bounds)["request_goodput"] == sum(good) / 10


def test_without_bounds_there_is_no_goodput():
    assert latency([TWICE], 10.0)["request_goodput"] is None


@pytest.mark.parametrize("seed", SEEDS)
def test_token_gaps_add_up_to_the_time_after_the_first_token(seed):
    draw = random.Random(seed)
    time, arrived = 0.0, []
    for _ in range(draw.randint(1, 20)):
        time += draw.random()
        arrived.append((time, draw.randint(1, 9)))
    record = Record(0, 1, -draw.random(), arrived, time)
    assert len(record.itls_s) == record.output_tokens - 1
    assert sum(record.itls_s) == pytest.approx(record.e2el_s - record.ttft_s)
    if record.output_tokens > 1:
        assert record.tpot_s == pytest.approx(sum(record.itls_s) / len(record.itls_s))


def test_goodput_bounds_are_read_as_vllm_writes_them():
    expected = {"ttft": 500.0, "tpot": 50.5}
    for texts in (["ttft:500", "tpot:50.5"], ["ttft:500 tpot:50.5"], ["ttft:500,tpot:50.5"]):
        assert parse_goodput(texts) == expected
    assert parse_goodput([]) == {}


@pytest.mark.parametrize("text", ["ttft", "itl:5", "ttft:x", "ttft:0", "ttft:inf", "ttft:1 ttft:2"])
def test_a_bad_goodput_bound_is_named(text):
    with pytest.raises(InputError, match=r"--goodput (is|gives) .*expected"):
        parse_goodput([text])


def test_a_run_takes_the_times_of_the_clock():
    engine = FakeEngine()
    found = engine.latency(requests(2, 3), [0.0, 2.5], percentiles=(99,))
    # Steps end at 1, 2 (first request), 3.5, 4.5, 5.5 after a sleep of half a second.
    assert engine.slept == [0.5]
    assert found["duration"] == 5.5
    assert (found["completed"], found["failed"], found["iterations"]) == (2, 0, 5)
    assert found["mean_ttft_ms"] == found["mean_tpot_ms"] == found["mean_itl_ms"] == 1000
    assert found["mean_e2el_ms"] == 2500
    assert found["request_throughput"] == pytest.approx(2 / 5.5)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6, 5)
    assert found["max_concurrent_requests"] == 1
    # What the engine counted during the run, not before.
    assert (found["preemptions"], found["adapter_loads"], found["compilations"]) == (5, 0, 0)


def test_a_request_that_comes_during_an_iteration_waits_from_its_arrival():
    engine = FakeEngine(seconds=4.0)
    records = engine.drive(requests(2, 1), [0.0, 1.0]).records
    assert [record.ttft_s for record in records] == [4.0, 7.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_ends_once_and_none_before_it_arrived(seed):
    draw = random.Random(seed)
    arrivals = sorted(draw.uniform(0, 20) for _ in range(40))
    work = requests(*(draw.randint(1, 12) for _ in arrivals))
    engine, ended = FakeEngine(draw.uniform(0.1, 3), draw.randint(1, 5)), []
    driven = engine.drive(work, arrivals, on_end=lambda: ended.append(1))
    assert len(ended) == len(driven.records) == 40
    for record, request, arrival in zip(driven.records, work, arrivals):
        assert record.completed
        assert record.output_tokens == request.max_tokens
        assert record.start_s == arrival
        assert record.ttft_s > 0
    assert driven.duration_s == max(record.end_s for record in driven.records)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_at_most_so_many_are_in_the_engine_and_time_runs_from_when_they_are_let_in(limit):
    engine = FakeEngine()
    found = engine.drive(requests(*[2] * 6), [0.0] * 6, max_concurrency=limit)
    assert max(map(len, engine.batches)) == limit
    assert [record.ttft_s for record in found.records] == [1.0] * 6
    assert most_at_once(found.records) == limit
    free = FakeEngine()
    assert [r.ttft_s for r in free.drive(requests(*[2] * 6), [0.0] * 6).records] == [1.0] * 6
    assert max(map(len, free.batches)) == 6


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_who_came_while_the_engine_was_full_starts_when_a_place_became_free(seed, limit):
    draw = random.Random(seed)
    arrivals = sorted(draw.uniform(0, 20) for _ in range(40))
    engine = FakeEngine(draw.uniform(0.1, 3), draw.randint(1, 5))
    work = requests(*(draw.randint(1, 12) for _ in arrivals))
    found = engine.latency(work, arrivals, max_concurrency=limit)
    assert found["completed"] == 40
    assert max(map(len, engine.batches)) <= limit
    assert found["max_concurrent_requests"] <= limit
    again = FakeEngine(engine.seconds, engine.per_step)
    records = again.drive(work, arrivals, max_concurrency=limit).records
    ends = {record.end_s for record in records}
    for record, arrival in zip(records, arrivals, strict=True):
        assert record.start_s == arrival or (record.start_s > arrival and record.start_s in ends)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_adapter_at_a_time_never_mixes_and_keeps_the_order_of_turns(seed):
    draw = random.Random(seed)
    names = [draw.choice("abc") for _ in range(20)]
    work = requests(*(draw.randint(1, 4) for _ in names), adapters=names)
    engine = FakeEngine()
    driven = engine.drive(work, [0.0] * 20, one_adapter_at_a_time=True)
    turns = []
    for batch in engine.batches:
        (name,) = {names[index] for index in batch}
        turns += [name] if turns[-1:] != [name] else []
    assert turns == list(dict.fromkeys(names))  # All are there at once: a turn each.
    # Waiting for one's turn is part of one's time.
    assert max(record.ttft_s for record in driven.records) > 1.0
    assert all(record.start_s == 0 and record.completed for record in driven.records)


def test_distinct_adapters_one_at_a_time_are_a_batch_of_one():
    engine = FakeEngine()
    found = run_throughput(
        engine, requests(2, 2, 2), clock=engine.clock, one_adapter_at_a_time=True
    )
    assert engine.batches == [[0], [0], [1], [1], [2], [2]]
    assert found["output_throughput"] == 1.0


def test_the_adapter_whose_turn_it_is_takes_no_more_that_come_later():
    work = requests(3, 1, 1, adapters=["a", "b", "a"])
    engine = FakeEngine()
    engine.drive(work, [0.0, 0.5, 0.6], one_adapter_at_a_time=True)
    assert engine.batches == [[0], [0], [0], [1], [2]]


def test_failures_are_counted_with_their_reasons_and_nothing_is_dropped():
    engine = FakeEngine(fails={1: 2}, refuses={2}, short={3})
    found = run_throughput(engine, requests(3, 3, 3, 3), clock=engine.clock)
    assert (found["completed"], found["failed"]) == (1, 3)
    assert found["errors"] == [
        {"index": 1, "error": "broken"},
        {"index": 2, "error": "request 2: refused"},
        {"index": 3, "error": "1 tokens, expected 3"},
    ]
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (3, 3)


def test_a_request_with_other_stops_may_end_early():
    stopping = [dataclasses.replace(requests(5)[0], stop_token_ids=(1,))]
    engine = FakeEngine(short={0})
    assert run_throughput(engine, stopping, clock=engine.clock)["completed"] == 1


def test_a_run_in_which_all_fail_is_an_error_with_a_reason():
    engine = FakeEngine(refuses={0, 1})
    with pytest.raises(RunError, match=r"all 2 requests failed: request \d: refused"):
        run_throughput(engine, requests(1, 1), clock=engine.clock)


def test_a_request_that_gets_lost_is_an_error_not_a_hang():
    engine = FakeEngine(loses={1})
    with pytest.raises(RunError, match="nothing to do, but 1 requests have not ended"):
        run_throughput(engine, requests(2, 2), clock=engine.clock)


def test_collected_lines_are_found_by_their_key_and_stay(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    keys = [{"kind": kind, "targets": ("a", "b"), "rank": rank} for kind in "xy" for rank in (1, 2)]
    for number, key in enumerate(keys):
        append_line(path, key, {"value": number})
        assert [line["value"] for line in read_lines(path)] == list(range(number + 1))
    assert [find(path, key)["value"] for key in keys] == [0, 1, 2, 3]
    assert find(path, {"kind": "z"}) is None
    assert find(path, {"absent": None}) is None
    assert {"command", "date", "machine", "versions"} <= set(read_lines(path)[0])
    with pytest.raises(ValueError, match="JSON compliant"):
        append_line(path, {}, {"value": float("nan")})
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(InputError, match=r"lines\.jsonl, line 2: not JSON"):
        read_lines(path)


def test_a_line_of_another_machine_is_another_line(tmp_path, monkeypatch):
    path, key = tmp_path / "lines.jsonl", {"preset": "p"}
    own = machine.describe()
    append_line(path, key, {"value": 0})
    assert list(by_preset(read_lines(path))) == ["p"]
    for change in ({"cpu": "another"}, {"cores": 999}, {"devices": ["gpu: H100"]}):
        monkeypatch.setattr(machine, "describe", functools.partial(dict, own, **change))
        assert find(path, key) is None
    append_line(path, key, {"value": 1})
    assert find(path, key)["value"] == 1
    monkeypatch.setattr(machine, "describe", lambda: own | {"memory_gib": 1})
    assert find(path, key)["value"] == 0
    groups = by_preset(read_lines(path))
    assert [[line["value"] for line in group] for group in groups.values()] == [[0], [1]]
    assert all(title.startswith("p, ") for title in groups)
    assert list(groups)[1].endswith("gpu: H100")


def test_lines_of_other_settings_are_not_mixed():
    def line(preset, scale, seed, value):
        return {"preset": preset, "workload": {"scale": scale, "seed": seed}, "value": value}

    lines = [line("a", 1, 0, 0), line("a", 1, 1, 1), line("a", 0.5, 0, 2), line("b", 0.5, 0, 3)]
    groups = by_preset(lines)
    assert {title: [one["value"] for one in own] for title, own in groups.items()} == {
        "a, scale 1": [0, 1], "a, scale 0.5": [2], "b": [3]
    }  # fmt: skip


app = typer.Typer()
app.command()(bench_serving.throughput)
app.command()(bench_serving.latency)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from flora_jax.starcoder.checkpoint import save_hf
    from flora_jax.starcoder.config import StarCoderConfig
    from flora_jax.starcoder.model import init_model

    config = StarCoderConfig(vocab_size=80, n_positions=64, n_embd=16, n_layer=1, n_head=2,
                             n_inner=24, eos_token_ids=(0,))  # fmt: skip
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    save_hf(init_model(config), directory)
    return directory


@pytest.fixture
def program(monkeypatch, checkpoint):
    """Runs a verb on the tiny model."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")

    def run(verb, *words, model=checkpoint):
        fixed = [] if model is None else [str(model)]
        done = CliRunner().invoke(app, [verb, *fixed, *map(str, words)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done

    return run


SMALL = ["--num-prompts", 5, "--min-total", 12, "--max-total", 24, "--max-num-seqs", 2,
         "--max-num-batched-tokens", 80]  # fmt: skip


def check_receipt(result, benchmark):
    assert result["benchmark"] == benchmark
    assert {"command", "date", "machine", "versions", "workload", "engine"} <= set(result)
    assert (result["model"], result["weights"], result["dtype"]) == (
        "tiny",
        "checkpoint",
        "float32",
    )
    assert result["engine"]["max_num_seqs"] == 2


def test_throughput_has_a_line_for_each_rank(program, tmp_path):
    files = tmp_path / "t.json", tmp_path / "t.png"
    done = program("throughput", *SMALL, "--ranks", "1,2", "--output", files[0], "--plot", files[1])
    result = json.loads(files[0].read_text())
    check_receipt(result, "throughput")
    assert [(line["kind"], line["rank"]) for line in result["results"]] == [
        ("flora", 1),
        ("flora", 2),
    ]
    for line in result["results"]:
        assert (line["completed"], line["failed"], line["adapters"]) == (5, 0, 5)
        assert line["total_output_tokens"] == 5 * result["workload"]["mean_output_tokens"]
        assert line["output_throughput"] > 0
        assert 0 < line["share_of_limit"] < 1
        # All adapters lay on the device before, and all programs were compiled.
        assert (line["adapter_loads"], line["compilations"]) == (0, 0)
    assert "output tokens/s" in done.output
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_latency_has_vllms_keys(program, tmp_path):
    files = tmp_path / "l.json", tmp_path / "l.png"
    words = ["--kind", "lora", "--request-rate", 100, "--burstiness", 0.5, "--max-concurrency", 2]
    program("latency", *SMALL, *words, "--goodput", "ttft:60000 tpot:60000", "--resident-adapters",
            2, "--output", files[0], "--plot", files[1])  # fmt: skip
    result = json.loads(files[0].read_text())
    check_receipt(result, "latency")
    (line,) = result["results"]
    statistics = {
        f"{name}_{metric}_ms"
        for name in ("mean", "median", "std", "p90", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    }
    assert statistics <= set(line)
    assert (line["completed"], line["failed"]) == (5, 0)
    assert line["request_goodput"] == line["request_throughput"]
    assert (line["request_rate"], line["burstiness"], line["max_concurrency"]) == (100, 0.5, 2)
    assert line["max_concurrent_requests"] <= 2
    assert line["adapter_loads"] >= 3  # Room for two: the others come during the run.
    assert line["compilations"] == 0
    assert files[1].stat().st_size > 1000


def test_latency_is_drawn_for_whatever_percentiles_are_asked_for(program, tmp_path):
    done = program("latency", *SMALL, "--kind", "none", "--metric-percentiles", "50,90",
                   "--plot", tmp_path / "l.png")  # fmt: skip
    assert "p90 TTFT" in done.output
    assert (tmp_path / "l.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["none", "sequential", "unmerged"])
def test_the_baselines_run(kind, program, tmp_path):
    output = tmp_path / "t.json"
    program("throughput", *SMALL, "--kind", kind, "--no-limits", "--adapter-distribution", "uniform",
            "--num-adapters", 2, "--output", output)  # fmt: skip
    (line,) = json.loads(output.read_text())["results"]
    assert (line["completed"], line["failed"]) == (5, 0)
    assert (line["rank"], line["targets"]) == ((0, []) if kind == "none" else (1, ["c_attn"]))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kind", "dora"], "--kind is 'dora', expected one of flora, lora"),
        (["--rank", "0"], "--rank is 0, expected at least 1"),
        (["--kind", "ia3", "--rank", "2"], "--rank is 2, expected 1 with --kind ia3"),
        (["--kind", "none", "--rank", "2"], "--rank is 2, expected none with --kind none"),
        (["--rank", "1", "--ranks", "1,2"], "--rank is 1 and --ranks is 1,2, expected one"),
        (["--ranks", "1,x"], "--ranks is '1,x', expected numbers"),
        (["--targets", "c_out"], "target 'c_out'"),
        (["--dtype", "int8"], "--dtype is 'int8', expected float32"),
        (["--num-prompts", "0"], "--num-prompts is 0, expected at least 1"),
        (["--preset", "mini"], "expected exactly one of them"),
        (["--output", "absent/x.json"], "--output is absent/x.json, expected a file in"),
        (["--lengths", "absent.csv"], "--lengths absent.csv"),
        (["--max-total", "2000"], "--max-total is 2000, and the longest .* 64 positions"),
        (["--max-num-batched-tokens", "8"], "max_num_batched_tokens is 8, expected at least"),
        (["--request-rate", "fast"], "--request-rate is 'fast', expected a number above 0"),
        (["--max-concurrency", "0"], "--max-concurrency is 0, expected at least 1"),
        (["--metric-percentiles", "101"], "--metric-percentiles is '101', expected"),
        (["--goodput", "itl:5"], "--goodput is 'itl:5', expected NAME:MILLISECONDS"),
    ],
)
def test_bad_input_is_one_error_with_what_was_found(words, message, program):
    given = dict(zip(words[::2], words[1::2]))
    small = [word for pair in zip(SMALL[::2], SMALL[1::2]) if pair[0] not in given for word in pair]
    with pytest.raises(InputError, match=message):
        program("latency", *small, *words)


def test_a_preset_or_a_model_is_needed(program):
    with pytest.raises(InputError, match="MODEL is None, --preset is None, expected exactly one"):
        program("throughput", model=None)
    with pytest.raises(InputError, match="--preset is '7b', expected one of mini, 164m"):
        program("throughput", "--preset", "7b", model=None)


def test_a_preset_gets_the_positions_that_its_requests_need():
    from flora_jax.bench.serving_setup import find_base, plan_workload
    from flora_jax.bench.workload import WorkloadOptions

    base = find_base(None, "mini")
    workload, wide = plan_workload(base, WorkloadOptions(200), adapted=True)
    assert base.config.n_positions == 512 < wide.config.n_positions
    assert wide.config.n_positions == max(
        len(r.token_ids) + r.max_tokens for r in workload.requests
    )
    _, same = plan_workload(base, WorkloadOptions(20, scale=0.1), adapted=True)
    assert same == base


@pytest.mark.parametrize("kind", ["flora", "lora", "ia3", "hira", "sequential"])
def test_every_request_gets_other_factors(kind):
    import jax
    import numpy as np

    from flora_jax.bench.serving_setup import Contender, make_adapters
    from flora_jax.starcoder.config import PRESETS

    rank = 1 if kind == "ia3" else 3
    contender = Contender(kind, rank, ("c_attn", "mlp.c_proj"))
    made = make_adapters(PRESETS["mini"], contender, ["x", "y", "z"])
    first = collections.Counter(
        np.asarray(jax.tree.leaves(adapter.layers)[0]).tobytes() for adapter in made.values()
    )
    assert len(first) == 3
    assert {adapter.rank("attn.c_attn") for adapter in made.values()} == {rank}
    again = make_adapters(PRESETS["mini"], contender, ["x", "y", "z"])
    assert jax.tree.all(jax.tree.map(np.array_equal, made["y"].layers, again["y"].layers))
    assert make_adapters(PRESETS["mini"], Contender("none", 0), ["x"]) == {}
