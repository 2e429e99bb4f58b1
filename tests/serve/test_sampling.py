"""What is drawn from a row's logits, against NumPy, and that no other row has a say in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.serve.sampling import Sampling, keep_likely, sample

ROWS, VOCABULARY = 6, 53
DRAWS = 20_000
LOGITS = np.float32([2.0, 1.5, 1.2, 0.3, 0.0, -0.4, -1.0, -3.0, 0.9])
keep = jax.jit(keep_likely)
draw = jax.jit(sample)


def random_logits(seed, rows=ROWS):
    return 3 * np.random.default_rng(seed).standard_normal((rows, VOCABULARY)).astype(np.float32)


def settings_of(temperature, top_k, top_p, seeds):
    return Sampling(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.stack([jax.random.key(seed) for seed in seeds]),
    )


def draw_steps(logits_V, seed, draws, temperature=1.0, top_k=0, top_p=1.0):
    """The tokens of a row's consecutive steps."""
    same = settings_of([temperature] * draws, [top_k] * draws, [top_p] * draws, [seed])
    same = dataclasses.replace(same, key_B=jnp.broadcast_to(same.key_B, draws))
    logits_NV = np.broadcast_to(logits_V, (draws, len(logits_V)))
    return np.asarray(draw(logits_NV, same, jnp.arange(draws)))


def softmax(logits_V):
    weights_V = np.exp(logits_V.astype(np.float64) - np.max(logits_V))
    return weights_V / weights_V.sum()


def kept_by_numpy(logits_V, top_k, top_p):
    """Adds the likeliest tokens one by one until either limit is reached, then their ties."""
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    probabilities = softmax(logits_V[order])
    count, total = 0, 0.0
    while count < len(order) and (top_p >= 1 or total < top_p):
        total += probabilities[count]
        count += 1
    return logits_V >= logits_V[order[max(count, 1) - 1]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cut", ["top_k", "top_p", "both"])
def test_the_kept_set_is_that_of_numpy(seed, cut):
    rng = np.random.default_rng(100 + seed)
    logits_BV = random_logits(seed)
    top_k_B = rng.integers(1, 2 * VOCABULARY, ROWS) if cut != "top_p" else np.zeros(ROWS, int)
    top_p_B = rng.uniform(0.05, 0.999, ROWS) if cut != "top_k" else np.ones(ROWS)
    found_BV = np.asarray(keep(logits_BV, jnp.int32(top_k_B), jnp.float32(top_p_B)))
    for logits_V, found_V, top_k, top_p in zip(logits_BV, found_BV, top_k_B, top_p_B):
        expected_V = np.where(kept_by_numpy(logits_V, top_k, top_p), logits_V, -np.inf)
        np.testing.assert_array_equal(found_V, expected_V.astype(np.float32))


@pytest.mark.parametrize(
    "logits, top_k, top_p, kept",
    [
        ([1, 3, 3, 3, 0], 2, 1.0, [1, 2, 3]),
        ([1, 3, 3, 3, 0], 1, 1.0, [1, 2, 3]),
        ([1, 3, 3, 3, 0], 0, 0.5, [1, 2, 3]),
        ([2, 2, 2, 2, 2], 1, 0.1, [0, 1, 2, 3, 4]),
        ([4, 3, 2, 1, 0], 99, 1.0, [0, 1, 2, 3, 4]),
        ([4, 3, 2, 1, 0], 5, 1.0, [0, 1, 2, 3, 4]),
        ([0, 1, 2, 3, 4], 1, 1.0, [4]),
        ([0, 1, 2, 3, 4], 0, 1e-30, [4]),
        ([0, 1, 2, 3, 4], 3, 1e-30, [4]),
    ],
)
def test_ties_stay_and_at_least_one_is_kept(logits, top_k, top_p, kept):
    found_BV = keep(jnp.float32([logits]), jnp.int32([top_k]), jnp.float32([top_p]))
    assert np.flatnonzero(np.isfinite(np.asarray(found_BV)[0])).tolist() == kept


@pytest.mark.parametrize("seed", range(3))
def test_settings_that_are_off_leave_the_logits_bit_for_bit(seed):
    logits_BV = random_logits(seed) * 20
    logits_BV[0, :7] = [-np.inf, -0.0, 0.0, 1e-42, -3e38, 3e38, 5]
    found_BV = np.asarray(keep(logits_BV, jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS)))
    np.testing.assert_array_equal(found_BV.view(np.int32), logits_BV.view(np.int32))


@pytest.mark.parametrize("company", [0.0, 1.0])
def test_temperature_zero_is_the_largest_logit_whatever_others_ask_for(company):
    logits_BV = random_logits(0)
    logits_BV[1, [3, 9]] = 99  # A tie goes to the first.
    warm = [0.0] * (ROWS - 1) + [company]
    settings = settings_of(warm, [0, 5, 0, 1, 0, 2], [1, 1, 0.3, 1, 1, 0.9], range(ROWS))
    found_B = np.asarray(draw(logits_BV, settings, jnp.arange(ROWS)))
    np.testing.assert_array_equal(found_B[:-1], np.argmax(logits_BV, axis=-1)[:-1])
    assert found_B.dtype == np.int32


def mixed_case(seed):
    """Rows of every need: two greedy, two sampled, two filtered."""
    settings = settings_of(
        [0.0, 0.0, 0.7, 1.5, 1.0, 0.9], [0, 0, 0, 0, 9, 0], [1, 1, 1, 1, 0.8, 0.6],
        range(10 * seed, 10 * seed + ROWS),
    )  # fmt: skip
    return random_logits(seed), settings, jnp.asarray([0, 3, 0, 5, 2, 8])


@pytest.mark.parametrize("seed", range(5))
def test_a_rows_draw_does_not_depend_on_company_or_position(seed):
    logits_BV, settings, drawn_B = mixed_case(seed)
    together_B = np.asarray(draw(logits_BV, settings, drawn_B))
    order = np.random.default_rng(seed).permutation(ROWS)
    moved_B = draw(logits_BV[order], jax.tree.map(lambda a: a[order], settings), drawn_B[order])
    np.testing.assert_array_equal(moved_B, together_B[order])
    for row in range(ROWS):
        own = jax.tree.map(lambda a, row=row: a[row : row + 1], settings)
        alone = draw(logits_BV[row : row + 1], own, drawn_B[row : row + 1])
        assert alone[0] == together_B[row], row


def test_other_rows_logits_do_not_change_a_draw():
    logits_BV, settings, drawn_B = mixed_case(9)
    expected_B = np.asarray(draw(logits_BV, settings, drawn_B))
    for row in range(ROWS):
        others_BV = random_logits(77)
        others_BV[row] = logits_BV[row]
        assert draw(others_BV, settings, drawn_B)[row] == expected_B[row]


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_draws_differ_between_seeds_and_between_steps(top_p):
    first, second, again = (
        draw_steps(np.zeros(len(LOGITS), np.float32), seed, DRAWS, top_p=top_p)
        for seed in (1, 2, 1)
    )
    np.testing.assert_array_equal(first, again)
    for one, other in [(first, second), (first[1:], first[:-1])]:
        assert abs(np.mean(one == other) - 1 / len(LOGITS)) < 0.02


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.8), (6, 0.7)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax_over_the_kept_set(temperature, top_k, top_p):
    kept_V = kept_by_numpy(LOGITS / temperature, top_k, top_p)
    expected_V = softmax(np.where(kept_V, LOGITS / temperature, -np.inf))
    tokens_N = draw_steps(LOGITS, 5, DRAWS, temperature, top_k, top_p)
    counts_V = np.bincount(tokens_N, minlength=len(LOGITS))
    assert not counts_V[~kept_V].any()
    wanted = DRAWS * expected_V[kept_V]
    chi_square = np.sum((counts_V[kept_V] - wanted) ** 2 / wanted)
    # Of at most 8 degrees of freedom: above 32 once in ten thousand.
    assert chi_square < 32
