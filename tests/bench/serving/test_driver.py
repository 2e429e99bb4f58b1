"""The driver of a load, against a fake engine that moves a fake clock."""

import random
from types import SimpleNamespace

import pytest

from flora_jax.bench.serving.drive import (
    Clock,
    MetricOptions,
    drive,
    most_at_once,
    run_latency,
    run_throughput,
)
from flora_jax.errors import InputError, RunError
from tests.helpers.requests import make_request, with_settings

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
        self.count = 100
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
        if request.fold_in in self.refuses:
            raise InputError(f"request {request.fold_in}: refused")
        self.count += 1
        self.live[self.count] = [request, 0]
        return self.count

    def wait(self, timeout=None):
        return True

    def step(self):
        self.now += self.seconds
        self.stats.preemptions += 1
        self.batches.append([request.fold_in for request, _ in self.live.values()])
        updates = []
        for ticket, entry in list(self.live.items()):
            request, drawn = entry
            new = min(self.per_step, request.sampling_params.max_tokens - drawn)
            entry[1] = drawn + new
            error = "broken" if self.fails.get(request.fold_in, 10**9) <= entry[1] else None
            ended = entry[1] == request.sampling_params.max_tokens or request.fold_in in self.short
            if error or ended or request.fold_in in self.loses:
                del self.live[ticket]
            if request.fold_in in self.loses:
                continue
            updates.append(
                SimpleNamespace(
                    request_id=ticket, token_ids=(1,) * new, error=error,
                    completion="done" if ended and not error else None,
                )
            )  # fmt: skip
        return updates

    def latency(self, requests, arrivals, **asked):
        limit = asked.pop("max_concurrency", None)
        return run_latency(
            self, requests, arrivals, clock=Clock(self.clock, self.sleep), max_concurrency=limit,
            metrics=MetricOptions(**asked),
        )  # fmt: skip

    def drive(self, requests, arrivals, **asked):
        return drive(self, requests, arrivals, clock=Clock(self.clock, self.sleep), **asked)


def requests(*outputs, adapters=None, prompt=3):
    return [
        make_request(n, (1,) * prompt, adapters[n] if adapters else f"a{n}", max_tokens=output,
                ignore_eos=True)
        for n, output in enumerate(outputs)
    ]  # fmt: skip


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
        assert record.output_tokens == request.sampling_params.max_tokens
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
        engine, requests(2, 2, 2), clock=Clock(engine.clock), one_adapter_at_a_time=True
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
    found = run_throughput(engine, requests(3, 3, 3, 3), clock=Clock(engine.clock))
    assert (found["completed"], found["failed"]) == (1, 3)
    assert found["errors"] == [
        {"index": 1, "error": "broken"},
        {"index": 2, "error": "request 2: refused"},
        {"index": 3, "error": "1 tokens, expected 3"},
    ]
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (3, 3)


def test_a_request_with_other_stops_may_end_early():
    stopping = [with_settings(requests(5)[0], stop_token_ids=(1,))]
    engine = FakeEngine(short={0})
    assert run_throughput(engine, stopping, clock=Clock(engine.clock))["completed"] == 1


def test_a_run_in_which_all_fail_is_an_error_with_a_reason():
    engine = FakeEngine(refuses={0, 1})
    with pytest.raises(RunError, match=r"all 2 requests failed: request \d: refused"):
        run_throughput(engine, requests(1, 1), clock=Clock(engine.clock))


def test_a_request_that_gets_lost_is_an_error_not_a_hang():
    engine = FakeEngine(loses={1})
    with pytest.raises(RunError, match="nothing to do, but 1 requests have not ended"):
        run_throughput(engine, requests(2, 2), clock=Clock(engine.clock))
