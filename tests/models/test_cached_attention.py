"""Every implementation of attention over the cache against plain NumPy, and what a row never sees."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models import attention
from flora_jax.models.attention_trial import fails_on_cache
from flora_jax.models.cache import NOWHERE, LayerCache, Paging
from flora_jax.models.cached_attention import IMPLEMENTATIONS, attend_cached
from flora_jax.models.starcoder.config import PRESETS

HEADS, HEAD_DIM, PAGE, WIDTH = 6, 8, 4, 70
ON_A_CPU = [name for name in IMPLEMENTATIONS if not name.startswith("cudnn")]


def config_with(groups, **changes):
    return dataclasses.replace(
        PRESETS["mini"], n_embd=HEADS * HEAD_DIM, n_head=HEADS, multi_query=groups == 1, **changes
    )


def random_case(seed, groups, length, dtype):
    """Queries, a cache whose pages lie in any order, and tokens at the end of rows of any length."""
    rng = np.random.default_rng(seed)
    rows = 3
    pool = rng.permutation(rows * WIDTH + 5)[: rows * WIDTH].reshape(rows, WIDTH).astype(np.int32)
    k, v = (
        rng.normal(size=(rows * WIDTH + 5, PAGE, groups, HEAD_DIM)).astype(dtype) for _ in range(2)
    )
    q = rng.normal(size=(rows, length, HEADS, HEAD_DIM)).astype(dtype)
    last = rng.integers(length, WIDTH * PAGE, rows)
    positions = (last[:, None] - np.arange(length)[None, ::-1]).astype(np.int32)
    return q, k, v, pool, positions


def explicit(q, k, v, table, positions, window=None):
    """Token by token and head by head, in float64, over the positions that it may see alone."""
    rows, length, heads, dim = q.shape
    groups = k.shape[2]
    out = np.zeros((rows, length, heads, dim))
    for row in range(rows):
        keys, values = (pool[table[row]].reshape(-1, groups, dim) for pool in (k, v))
        for token in range(length):
            end = positions[row, token] + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            for head in range(heads):
                group = head * groups // heads
                scores = keys[seen, group].astype(np.float64) @ q[row, token, head] / dim**0.5
                share = np.exp(scores - scores.max())
                out[row, token, head] = share @ values[seen, group] / share.sum()
    return out.reshape(rows, length, -1)


@pytest.mark.parametrize("how", ON_A_CPU)
@pytest.mark.parametrize("groups", [1, HEADS])
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_attention_over_what_a_token_may_see(how, groups, length, seed):
    case = random_case(seed, groups, length, np.float32)
    np.testing.assert_allclose(attended(how, case), explicit(*case), atol=3e-6, rtol=0)


def attended(how, case, window=None):
    @jax.jit
    def run(q, k, v, table, positions):
        paging = Paging(table, attention=how)
        return attend_cached(
            q, LayerCache(k, v), paging, positions, config_with(k.shape[2]), window
        )

    return run(*case)


@pytest.mark.parametrize("how", ON_A_CPU)
@pytest.mark.parametrize("window", [3, 150])
def test_a_window_bounds_what_a_token_sees_of_the_cache(how, window):
    case = random_case(2, 1, 9, np.float32)
    np.testing.assert_allclose(
        attended(how, case, window), explicit(*case, window), atol=3e-6, rtol=0
    )


def test_stretches_before_every_window_are_left_out_and_change_no_bit():
    """With a short row in its batch the loop begins at the first stretch, else at the second: there
    nothing of the first is looked at, not even what is no number.
    """
    q, k, v, table, positions = random_case(4, 1, 2, np.float32)
    positions[:] = [[200, 201], [150, 151], [3, 4]]
    run = jax.jit(
        lambda k, v, table, positions: attend_cached(
            q,
            LayerCache(k, v),
            Paging(table, jnp.int32(3), attention="loop"),
            positions,
            config_with(1),
            20,
        )
    )
    # Waited for: on a CPU JAX may read these very arrays, which change below.
    beside = np.array(run(k, v, table, positions))
    q[2], table[2], positions[2] = q[1], table[1], positions[1]
    for pool in (k, v):
        pool[table[:, : 128 // PAGE]] = np.nan
    np.testing.assert_array_equal(run(k, v, table, positions)[:2], beside[:2])


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("name", ["einsum", "cudnn"])
def test_a_window_bounds_what_tokens_of_a_batch_see_of_one_another(monkeypatch, name, segmented):
    here = partial(attention.fused_attention, implementation="xla")
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "cudnn", here)
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.normal(size=(2, 12, heads, HEAD_DIM)).astype(np.float32) for heads in (HEADS, 2, 2)
    )
    segments = np.repeat([[1, 2 if segmented else 1], [1, 1]], 6, axis=1).astype(np.int32)
    positions = np.stack([np.arange(12) % (6 if segmented else 12), np.arange(12)]).astype(np.int32)

    @jax.jit
    def run(q, k, v):
        seen = attention.visible(positions, segments if segmented else None, name)
        return attention.attend_visible(q, k, v, seen, config_with(HEADS), 4)

    found = run(q, k, v)
    for row, segment in [(0, 1), (0, segments[0, -1]), (1, 1)]:
        own = np.ix_([row], np.flatnonzero(segments[row] == segment))
        alone = explicit(q[own], k[own], v[own], np.array([[0]]), positions[own], 4)
        np.testing.assert_allclose(found[own], alone, atol=3e-6, rtol=0)


@pytest.mark.parametrize("how", ON_A_CPU)
def test_nothing_behind_a_row_or_of_others_is_ever_multiplied(how):
    """NaN and infinity in every position that no token may see, and in pages of others, change no bit."""
    q, k, v, table, positions = random_case(3, 1, 2, np.float32)
    positions[2] = NOWHERE
    config = config_with(1)
    whole = np.full(k.shape[0] * PAGE, True)
    for row in range(2):
        own = (table[row][:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        whole[own[: positions[row].max() + 1]] = False
    spoilt_k, spoilt_v = k.reshape(-1, 1, HEAD_DIM).copy(), v.reshape(-1, 1, HEAD_DIM).copy()
    spoilt_k[whole], spoilt_v[whole] = np.nan, np.inf
    run = jax.jit(
        lambda k, v: attend_cached(
            jnp.array(q),
            LayerCache(k, v),
            Paging(jnp.array(table), attention=how),
            jnp.array(positions),
            config,
        )
    )
    clean = np.asarray(run(k, v))
    spoilt = np.asarray(run(spoilt_k.reshape(k.shape), spoilt_v.reshape(v.shape)))
    assert np.isfinite(spoilt).all()
    np.testing.assert_array_equal(clean[:2], spoilt[:2])


def test_what_does_not_work_here_is_told_before_it_is_used(monkeypatch):
    config, size = config_with(1), (8, 64, PAGE)
    assert fails_on_cache("loop", config, np.float32, *size) is None
    gather = IMPLEMENTATIONS["gather"]
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", lambda *arguments: 1.1 * gather(*arguments))
    assert "away from gather's" in fails_on_cache("wrong", config, np.float32, *size)
    assert fails_on_cache("cudnn", config, np.float16, *size) not in (None, "")


def test_an_unknown_implementation_is_an_error():
    q, k, v, table, positions = random_case(0, 1, 1, np.float32)
    with pytest.raises(KeyError, match="ring"):
        attend_cached(
            q, LayerCache(k, v), Paging(table, attention="ring"), positions, config_with(1)
        )
