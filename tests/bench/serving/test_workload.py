"""Workloads: the filter, clipping and scale hold, seeds reproduce, arrivals and adapters are as asked."""

import dataclasses
import math

import numpy as np
import pytest

from flora_jax.bench.serving.lengths import (
    clipped,
    passes_filter,
    read_lengths,
    scaled,
    sharegpt_like,
)
from flora_jax.bench.serving.workload import (
    WorkloadOptions,
    adapter_names,
    draw_adapters,
    draw_arrivals,
    draw_lengths,
    longest,
    make_workload,
)
from flora_jax.errors import InputError

SEEDS = range(5)


@pytest.fixture
def table(tmp_path):
    """Writes a CSV file and returns its path."""

    def write(text, name="lengths.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def random_table(table):
    def write(seed, timed=False):
        rng = np.random.default_rng(seed)
        pairs = rng.integers(0, 2500, (200, 2))
        times = np.sort(rng.uniform(5, 60, 200))
        if timed:
            rows = [f"{t:.6f},{p},{o}" for t, (p, o) in zip(times, np.maximum(pairs, 4))]
            return table("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
        return table("\n".join(["input_tokens,output_tokens", *(f"{p},{o}" for p, o in pairs)]))

    return write


@pytest.mark.parametrize("seed", SEEDS)
def test_only_what_passes_the_filter_is_drawn(seed, random_table):
    path = random_table(seed)
    rows = {tuple(map(int, line.split(","))) for line in path.read_text().splitlines()[1:]}
    kept = {(p, o) for p, o in rows if p >= 4 and o >= 4 and p <= 1024 and p + o <= 2048}
    assert {tuple(pair) for pair in read_lengths(path).pairs.tolist()} == kept
    options = WorkloadOptions(num_prompts=500, lengths=path, min_total=0, max_total=2048, seed=seed)
    drawn = {tuple(pair) for pair in draw_lengths(options).pairs.tolist()}
    assert drawn <= kept
    assert len(drawn) > len(kept) / 2  # Resampled, with replacement.


@pytest.mark.parametrize("seed", SEEDS)
def test_totals_are_clipped_at_the_longer_of_prompt_and_output(seed):
    rng = np.random.default_rng(seed)
    pairs = rng.integers(4, 1025, (300, 2))
    low, high = sorted(rng.integers(8, 1500, 2).tolist())
    result = clipped(pairs, low, high)
    for (prompt, output), (found_prompt, found_output) in zip(pairs.tolist(), result.tolist()):
        if prompt + output <= high:
            assert (found_prompt, found_output) == (prompt, max(output, low - prompt))
            continue
        assert found_prompt + found_output in (high, high - 1)
        shorter = min(prompt, output)
        assert sorted((found_prompt, found_output))[0] == min(shorter, high // 2)
        assert (found_prompt > found_output) <= (prompt > output)
        assert (found_prompt < found_output) <= (prompt <= output)


@pytest.mark.parametrize("scale", [0.001, 0.125, 0.25, 1.0, 3.0])
def test_scale_multiplies_both_lengths_with_a_floor(scale):
    pairs = np.random.default_rng(0).integers(4, 1025, (300, 2))
    result = scaled(pairs, scale)
    assert result[:, 0].min() >= 4
    assert result[:, 1].min() >= 1
    big = (pairs * scale > 5).all(axis=1)
    assert (np.abs(result - pairs * scale)[big] <= 0.5).all()
    if scale == 1:
        np.testing.assert_array_equal(result, pairs)


def test_the_fit_is_like_the_chats_it_was_made_from(shared_data):
    chats = read_lengths(shared_data / "lengths" / "sharegpt_gpt4_300_lengths.csv").pairs
    fitted = sharegpt_like(20_000, np.random.default_rng(0))
    assert passes_filter(fitted).all()
    np.testing.assert_allclose(fitted.mean(axis=0), chats.mean(axis=0), rtol=0.1)
    np.testing.assert_allclose(np.median(fitted, axis=0), np.median(chats, axis=0), rtol=0.2)
    for quantile in (25, 75, 90):
        expected = np.percentile(chats, quantile, axis=0)
        np.testing.assert_allclose(np.percentile(fitted, quantile, axis=0), expected, rtol=0.35)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("distribution", ["distinct", "uniform", "zipf"])
def test_a_seed_reproduces_the_workload_and_another_does_not(seed, distribution):
    options = WorkloadOptions(40, scale=0.1, adapter_distribution=distribution, request_rate=3,
                              seed=seed)  # fmt: skip
    once, again = (make_workload(options, 500, (), adapter_names(options)) for _ in range(2))
    assert once == again
    other = make_workload(dataclasses.replace(options, seed=seed + 1), 500)
    assert all(
        a.prompt_token_ids != b.prompt_token_ids for a, b in zip(once.requests, other.requests)
    )
    assert once.arrivals_s != other.arrivals_s


@pytest.mark.parametrize("seed", SEEDS)
def test_rate_and_adapters_leave_the_requests_as_they_are(seed):
    def prompts(**changed):
        options = dataclasses.replace(WorkloadOptions(30, scale=0.1, seed=seed), **changed)
        made = make_workload(options, 500, (), adapter_names(options))
        return [(r.prompt_token_ids, r.sampling_params.max_tokens) for r in made.requests]

    plain = prompts()
    assert prompts(request_rate=2.0, burstiness=0.3) == plain
    assert prompts(adapter_distribution="zipf", num_adapters=3) == plain
    assert prompts(num_prompts=60)[:30] == plain


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_end_after_exactly_their_output_and_avoid_special_tokens(seed):
    options = WorkloadOptions(50, scale=0.2, seed=seed)
    made = make_workload(options, 100, avoid={40, 99})
    lengths = draw_lengths(options).pairs.tolist()
    assert [
        [len(r.prompt_token_ids), r.sampling_params.max_tokens] for r in made.requests
    ] == lengths
    assert all(
        p.ignore_eos and not p.stop_token_ids and not p.stop
        for p in (r.sampling_params for r in made.requests)
    )
    used = {token for r in made.requests for token in r.prompt_token_ids}
    assert used == set(range(32, 100)) - {40, 99}
    assert longest(made.requests) == max(map(sum, lengths))
    assert [r.fold_in for r in made.requests] == list(range(50))


@pytest.mark.parametrize("seed", SEEDS)
def test_distinct_gives_every_request_its_own_adapter(seed):
    options = WorkloadOptions(25, scale=0.05, num_adapters=30, seed=seed)
    made = make_workload(options, 100, (), adapter_names(options))
    assert len(made.adapters) == 30
    assert len({r.adapter for r in made.requests} & set(made.adapters)) == 25
    alone = make_workload(WorkloadOptions(25, scale=0.05, seed=seed), 100)
    assert alone.adapters == []
    assert {r.adapter for r in alone.requests} == {None}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_adapters_come_as_often_as_their_distribution_says(seed, distribution):
    count, adapters = 20_000, 8
    options = WorkloadOptions(count, adapter_distribution=distribution, num_adapters=adapters,
                              seed=seed)  # fmt: skip
    weights = 1 / np.arange(1, adapters + 1) if distribution == "zipf" else np.ones(adapters)
    share = weights / weights.sum()
    found = np.bincount(draw_adapters(options), minlength=adapters) / count
    assert (np.abs(found - share) < 5 * np.sqrt(share * (1 - share) / count)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0, math.inf])
def test_arrivals_have_the_rate_and_the_burstiness(seed, burstiness):
    options = WorkloadOptions(5000, request_rate=4.0, burstiness=burstiness, seed=seed)
    times = draw_arrivals(options)
    gaps = np.diff(times, prepend=0.0)
    assert gaps.min() >= 0
    assert times[-1] == pytest.approx(5000 / 4.0)
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.15, abs=1e-6)


def test_of_a_trace_nothing_is_filtered_away(table):
    rows = ["0,3000,9", "1,2,1", "2,2100,1500", "3,0,5", "4,7,0"]
    path = table("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    found = read_lengths(path)
    assert found.pairs.tolist() == [[3000, 9], [2, 1], [2100, 1500]]
    assert found.file_rows == (5, 3)
    options = WorkloadOptions(3, lengths=path, request_rate="trace", min_total=0, max_total=4096)
    made = make_workload(options, 100)
    assert [(len(r.prompt_token_ids), r.sampling_params.max_tokens) for r in made.requests] == [
        (3000, 9), (4, 1), (2100, 1500),
    ]  # fmt: skip
    assert made.file_rows == (5, 3)


def test_exact_lengths_are_those_of_every_request():
    made = make_workload(WorkloadOptions(7, exact=(2, 3), ignore_eos=False), 100)
    assert {(len(r.prompt_token_ids), r.sampling_params.max_tokens) for r in made.requests} == {
        (2, 3)
    }
    assert {r.sampling_params.ignore_eos for r in made.requests} == {False}
    assert len({r.prompt_token_ids for r in made.requests}) > 1


def test_an_infinite_rate_is_all_at_once():
    assert draw_arrivals(WorkloadOptions(5)).tolist() == [0.0] * 5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_trace_keeps_its_order_and_times(seed, random_table):
    path = random_table(seed, timed=True)
    table = read_lengths(path)
    count = len(table.pairs) // 2
    options = WorkloadOptions(count, lengths=path, request_rate="trace", min_total=0,
                              max_total=5000, seed=seed)  # fmt: skip
    made = make_workload(options, 100)
    pairs = [[len(r.prompt_token_ids), r.sampling_params.max_tokens] for r in made.requests]
    assert pairs == table.pairs[:count].tolist()
    expected = table.arrivals_s[:count] - table.arrivals_s[0]
    np.testing.assert_allclose(made.arrivals_s, expected)
    resampled = make_workload(dataclasses.replace(options, request_rate=2.0), 100)
    assert resampled.arrivals_s[-1] == pytest.approx(count / 2)


def test_the_azure_trace_can_be_read(shared_data):
    path = shared_data / "lengths" / "splitwise_code.csv"
    options = WorkloadOptions(100, lengths=path, request_rate="trace", max_total=8192)
    made = make_workload(options, 100)
    assert made.file_rows == (8819, 8819)
    assert longest(made.requests) > 4096  # As it was, neither filtered nor cut.
    assert made.arrivals_s[0] == 0
    assert np.diff(made.arrivals_s).min() >= 0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_prompts": 0}, "--num-prompts is 0, expected at least 1"),
        ({"scale": 0.0}, "--scale is 0.0, expected above 0 and finite"),
        ({"scale": math.nan}, "--scale is nan"),
        ({"max_total": 49}, "--max-total is 49, expected at least 50"),
        ({"adapter_distribution": "even"}, "--adapter-distribution is even, expected one"),
        ({"num_prompts": 9, "num_adapters": 8}, "--num-adapters is 8, expected at least 9"),
        ({"adapter_distribution": "zipf", "num_adapters": 0}, "--num-adapters is 0, expected at"),
        ({"request_rate": 0.0}, "--request-rate is 0.0, expected above 0"),
        ({"request_rate": math.nan}, "--request-rate is nan"),
        ({"request_rate": "trace"}, "--lengths is None, expected a file with arrival times"),
        ({"burstiness": 0.0}, "--burstiness is 0.0, expected above 0"),
        ({"burstiness": 0.5}, "--burstiness is 0.5, expected none with --request-rate inf"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_a_bad_option_is_named_with_what_was_found_and_expected(values, message):
    with pytest.raises(InputError, match=message):
        WorkloadOptions(**values)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n", "columns a,b, expected input_tokens,output_tokens or num_prefill"),
        ("", "columns , expected"),
        ("input_tokens,output_tokens\n5,6\n5,x\n", "line 3: expected numbers"),
        ("input_tokens,output_tokens\n5\n", "line 2: expected numbers"),
        ("input_tokens,output_tokens\n3,9\n2000,9\n", "none of 2 rows has 4 to 1024 tokens"),
        ("input_tokens,output_tokens\n", "none of 0 rows"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\nnan,5,6\n", "line 2: arrived_at is nan"),
    ],
)
def test_a_bad_file_is_named_with_its_line(text, message, table):
    path = table(text)
    with pytest.raises(InputError, match=message) as caught:
        draw_lengths(WorkloadOptions(3, lengths=path))
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_trace_that_is_none_are_named(table, tmp_path):
    with pytest.raises(InputError, match=r"--lengths .*absent\.csv"):
        draw_lengths(WorkloadOptions(3, lengths=tmp_path / "absent.csv"))
    plain = table("input_tokens,output_tokens\n5,6\n")
    with pytest.raises(InputError, match="no column arrived_at"):
        draw_lengths(WorkloadOptions(1, lengths=plain, request_rate="trace"))
    short = table("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,6\n", "trace.csv")
    with pytest.raises(InputError, match="--num-prompts is 2, expected at most the 1 rows"):
        draw_lengths(WorkloadOptions(2, lengths=short, request_rate="trace"))
