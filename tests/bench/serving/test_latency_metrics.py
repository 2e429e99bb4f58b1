"""Latencies, rates and goodput against numbers computed by hand."""

import random

import pytest

from flora_jax.bench.serving.latency_metrics import (
    Record,
    is_good,
    latency,
    parse_goodput,
    throughput,
)
from flora_jax.errors import InputError

SEEDS = range(5)
# One request of 4 tokens that starts at 1 s: the first two come at 3 s, the other two at 5 s.
TWICE = Record(0, 10, 1.0, [(3.0, 2), (5.0, 2)], 5.0)
# One of a single token, at once; one of three, one by one; one that failed.
SINGLE = Record(1, 20, 2.0, [(2.5, 1)], 2.5)
THREE = Record(2, 30, 0.0, [(1.0, 1), (2.0, 1), (4.0, 1)], 4.0)
FAILED = Record(3, 40, 0.0, [(1.0, 5)], 2.0, "broken")


def test_latencies_are_those_computed_by_hand():
    found = latency([TWICE, SINGLE, THREE, FAILED], 10.0, percentiles=(50, 100, 99.9))
    # TTFT 2, 0.5, 1; E2EL 4, 0.5, 4; TPOT 2/3, -, 3/2; ITL 2, -, 1 2.
    assert found["mean_ttft_ms"] == pytest.approx(3500 / 3)
    assert found["median_ttft_ms"] == found["p50_ttft_ms"] == 1000
    assert found["p100_ttft_ms"] == 2000
    assert found["p99.9_ttft_ms"] == pytest.approx(1998)
    assert found["std_ttft_ms"] == pytest.approx((7 / 18) ** 0.5 * 1000)
    assert found["mean_tpot_ms"] == pytest.approx(1000 * (2 / 3 + 3 / 2) / 2)
    assert found["mean_itl_ms"] == pytest.approx(5000 / 3)
    assert found["p100_itl_ms"] == 2000
    assert found["mean_e2el_ms"] == pytest.approx(8500 / 3)


def test_tokens_that_come_together_are_one_arrival():
    assert TWICE.itls_s == [2.0]
    assert THREE.itls_s == [1.0, 2.0]
    assert Record(0, 1, 0.0, [(1.0, 1), (4.0, 3), (4.5, 1)], 4.5).itls_s == [3.0, 0.5]
    assert SINGLE.itls_s == []


def test_counts_and_rates_leave_failures_out_but_list_them():
    found = throughput([TWICE, SINGLE, THREE, FAILED], 10.0)
    assert found == {
        "num_prompts": 4, "duration": 10.0, "completed": 3, "failed": 1,
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


def test_the_best_second_is_that_with_the_most_tokens_of_requests_that_completed():
    # 1 at 1 s, 1 at 2 s and another half a second later, 2 at 3 s, 1 at 4 s, 2 at 5 s.
    assert latency([TWICE, SINGLE, THREE, FAILED], 10.0)["max_output_tokens_per_s"] == 2
    late = Record(4, 1, 0.0, [(3.1, 1), (3.9, 4), (4.0, 5)], 4.0)
    assert latency([TWICE, SINGLE, THREE, late], 10.0)["max_output_tokens_per_s"] == 7
    assert latency([FAILED], 10.0)["max_output_tokens_per_s"] == 0


def test_without_bounds_there_is_no_goodput():
    assert latency([TWICE], 10.0)["request_goodput"] is None


@pytest.mark.parametrize("seed", SEEDS)
def test_inter_token_latencies_add_up_to_the_time_after_the_first_token(seed):
    draw = random.Random(seed)
    time, arrived = 0.0, []
    for _ in range(draw.randint(1, 20)):
        time += draw.random()
        arrived.append((time, draw.randint(1, 9)))
    record = Record(0, 1, -draw.random(), arrived, time)
    assert len(record.itls_s) == len(arrived) - 1
    assert sum(record.itls_s) == pytest.approx(record.e2el_s - record.ttft_s)
    if record.output_tokens > 1:
        assert record.tpot_s == pytest.approx(sum(record.itls_s) / (record.output_tokens - 1))


def test_goodput_bounds_are_read_as_vllm_writes_them():
    expected = {"ttft": 500.0, "tpot": 50.5}
    for texts in (["ttft:500", "tpot:50.5"], ["ttft:500 tpot:50.5"], ["ttft:500,tpot:50.5"]):
        assert parse_goodput(texts) == expected
    assert parse_goodput([]) == {}


@pytest.mark.parametrize("text", ["ttft", "itl:5", "ttft:x", "ttft:0", "ttft:inf", "ttft:1 ttft:2"])
def test_a_bad_goodput_bound_is_named(text):
    with pytest.raises(InputError, match=r"--goodput (is|gives) .*expected"):
        parse_goodput([text])
