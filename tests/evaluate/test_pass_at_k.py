"""pass@k and its errors against what they estimate, enumerated."""

import math
import random
from itertools import combinations
from statistics import fmean, pstdev

import pytest

from flora_jax.errors import InputError
from flora_jax.evaluate.pass_at_k import (
    bootstrap,
    compare,
    interval,
    pass_at_k,
    sampling_error,
    standard_error,
)
from flora_jax.evaluate.results import Result, compare_results, summarise


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples):
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            chosen = list(combinations(range(samples), k))
            share = sum(min(subset) < correct for subset in chosen) / len(chosen)
            assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_equals_the_product_of_chen_et_al():
    for correct in range(0, 201, 7):
        for k in (1, 10, 100):
            product = math.prod(1 - k / i for i in range(200 - correct + 1, 201))
            expected = 1.0 if 200 - correct < k else 1 - product
            assert pass_at_k(200, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("samples, correct, k", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_impossible_counts_are_refused(samples, correct, k):
    with pytest.raises(ValueError, match=f"samples={samples}"):
        pass_at_k(samples, correct, k)


def test_bootstrap_has_the_spread_of_the_mean():
    draw = random.Random(0)
    values = [draw.random() for _ in range(50)]
    means = bootstrap(values, resamples=4000)
    expected = pstdev(values) / math.sqrt(50)
    assert pstdev(means) == pytest.approx(expected, rel=0.05)
    low, high = interval(means)
    assert (low + high) / 2 == pytest.approx(fmean(values), abs=0.2 * expected)
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.06)
    assert bootstrap(values, 3) == bootstrap(values, 3) != bootstrap(values, 4)


def test_one_problem_has_no_error_over_problems():
    assert standard_error([0.5]) is None
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)


def test_sampling_error_is_that_of_repeated_sampling():
    chances, draw = [0.0, 0.2, 0.5, 0.9, 1.0], random.Random(1)
    runs = []
    for _ in range(3000):
        runs.append([sum(draw.random() < chance for _ in range(20)) for chance in chances])
    spread = pstdev([fmean(count / 20 for count in run) for run in runs])
    estimates = [sampling_error([(20, count) for count in run]) for run in runs]
    assert math.sqrt(fmean(one**2 for one in estimates)) == pytest.approx(spread, rel=0.05)
    assert sampling_error([(1, 1), (20, 3)]) is None


def test_summary_leaves_out_a_k_beyond_the_fewest_samples():
    results = [
        Result("a", "pl", ("OK",) * 10),
        Result("b", "pl", ("OK",) * 5 + ("Exception",) * 6 + ("Timeout",)),
    ]
    (summary,) = summarise(results).values()
    assert summary["pass@1"] == pytest.approx((1 + 5 / 12) / 2)
    assert summary["pass@10"] == pytest.approx(1)
    assert "pass@100" not in summary
    assert (summary["problems"], summary["samples"]) == (2, 22)
    assert summary["stderr"] == pytest.approx(7 / 24)
    assert summary["statuses"] == {"Exception": 6, "OK": 15, "Timeout": 1}


def test_pairing_sees_a_difference_that_the_spread_of_problems_hides():
    draw = random.Random(2)
    first = [draw.random() * 0.9 for _ in range(40)]
    second = [value + 0.05 for value in first]
    found = compare(first, second)
    assert found.difference == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05)
    assert found.stderr < 1e-12 < standard_error(first)
    assert (found.better, found.worse, found.problems) == (40, 0, 40)


def test_no_difference_has_an_interval_around_zero():
    draw = random.Random(3)
    pairs = [(draw.random(), draw.random()) for _ in range(60)]
    found = compare([a for a, _ in pairs], [b for _, b in pairs])
    assert found.low < 0 < found.high


def test_results_of_other_problems_are_not_compared():
    one, two = (Result(name, "pl", ("OK", "Timeout")) for name in "ab")
    assert set(compare_results([one], [one])) == {"pl", "all"}
    with pytest.raises(InputError, match="not the same problems: b in pl"):
        compare_results([one], [one, two])
    with pytest.raises(InputError, match="-k is 3, expected 1 to 2"):
        compare_results([one], [one], 3)
