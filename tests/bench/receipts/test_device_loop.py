"""Timing on a device: a run makes all its calls, each from the one before, over different arrays."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.bench.layer import programs as layer_programs
from flora_jax.bench.layer.measure import measure, print_tables
from flora_jax.bench.layer.options import LayerOptions
from flora_jax.bench.layer.programs import TARGET, Programs
from flora_jax.bench.receipts import device_loop, machine
from flora_jax.bench.receipts.random_arrays import draw, fill, random_model
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.platforms import CPU, GPU
from flora_jax.weights.product import explicit as explicit_weight
from tests.helpers import oracles
from tests.helpers.gpu_target import placed_on_h100

SIZES = dict(inputs=16, outputs=24, batch=3, length=2, ranks=(1, 3), repeats=2)


def as_on_a_gpu(monkeypatch, sets, calls, moved):
    """A platform that takes so many sets of a weight of 1,536 bytes, and calls of these bytes."""
    found = dataclasses.replace(CPU, timed_bytes=sets * 1536, timed_seconds=calls * moved / 3e12)
    monkeypatch.setattr(layer_programs, "platform", lambda: found)
    return found


def follow(x, y):
    """In NumPy: the next input, in float32."""
    width = x.shape[-1]
    padded = np.zeros_like(x)
    padded[..., : min(width, y.shape[-1])] = y[..., :width]
    return x + padded / 16


@pytest.mark.parametrize("outputs", [5, 8, 13])
@pytest.mark.parametrize("sets, rounds", [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_every_call_of_a_loop_is_made_with_its_own_arguments(sets, rounds, outputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 8)).astype(np.float32)
    own = [(rng.normal(size=(8, outputs)).astype(np.float32),) for _ in range(sets)]
    program = jax.jit(device_loop.looped(lambda x, W: jnp.tanh(x @ W), rounds))
    found = program(x, own)
    y = np.zeros((4, outputs), np.float32)
    for _ in range(rounds):
        for (W,) in own:
            y = np.tanh(follow(x, y) @ W)
    assert found.shape == y.shape
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
    if rounds * sets > 1:
        # One call fewer is another result: none was left out.
        fewer = jax.jit(device_loop.looped(lambda x, W: jnp.tanh(x @ W), 1))(x, own[:1])
        assert np.abs(found - fewer).max() > 1e-4


def test_products_stay_inside_the_loop_and_whole(optimised):
    shape = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    sets = [(jax.ShapeDtypeStruct((64, 80), jnp.float32),)] * 3
    program = jax.jit(device_loop.looped(lambda x, W: x @ W, 5)).lower(shape, sets).compile()
    text = program.as_text()
    body = text[text.index("body=") :].split()[0].removeprefix("body=").rstrip(",")
    inside = text[text.index(f"\n{body} ") :]
    inside = inside[: inside.index("\n}")]
    # All columns of all three products, none of them outside.
    products = [line for line in text.splitlines() if " dot(" in line or "matmul" in line]
    assert len(products) >= 3
    assert sum("[32,80]" in line for line in inside.splitlines() if "dot" in line) >= 3


@pytest.mark.parametrize("sets, calls", [(2, 6), (1, 3)])
def test_a_case_in_a_loop_computes_its_calls_under_its_own_explicit_weights(
    sets, calls, monkeypatch
):
    options = LayerOptions(**SIZES, measure_limits=False, forms=("einsum", "ragged"))
    moved = layer_programs.work(("base", "plain", None), options)[0]
    as_on_a_gpu(monkeypatch, sets, calls, moved)
    made = Programs(options)
    assert made.sets == sets
    x = np.asarray(made.base[0])
    different = set()
    for kind, form, rank in options.cases():
        program = made.program((kind, form, rank))
        own = [None] * options.batch
        if rank is not None:
            own = [a.layers[0][TARGET] for a in made.adapters(kind, rank).values()]
        y = np.zeros((options.batch, options.length, options.outputs), np.float32)
        for number in range(program.calls):
            W, bias = made._bases[number % sets]
            rolled = device_loop.several(own, sets)[number % sets]
            W = explicit_weight(W, jnp.float32)
            different.add(np.asarray(W).tobytes())
            rows = follow(x, y)
            y = np.stack([oracles.project(p, row, W, bias) for p, row in zip(rolled, rows)])
        assert np.abs(program.run() - y).max() < 1e-4 * np.abs(y).max(), (kind, form, rank)
        if rank is None:
            assert program.calls == calls
    assert len(different) == sets


def test_a_measurement_says_how_many_calls_a_run_had(monkeypatch):
    options = LayerOptions(
        **SIZES, measure_limits=False, kinds=("base", "flora"), forms=("einsum", "merged")
    )
    as_on_a_gpu(monkeypatch, 2, 50, layer_programs.work(("base", "plain", None), options)[0])
    measured = measure(options)
    calls = {(row["kind"], row["form"], row["rank"]): row["calls"] for row in measured["results"]}
    assert calls["base", "plain", None] == 50
    # A call that has more to do is made less often, by whole rounds.
    assert 2 <= calls["flora", "einsum", 3] < 50
    assert calls["flora", "einsum", 3] % 2 == 0
    assert all(row["seconds"] > 0 for row in measured["results"])
    assert measured["overhead_seconds"] > 0
    assert measured["from_cache"] is False


def test_weights_too_small_to_leave_the_cache_are_said(monkeypatch, capsys):
    options = LayerOptions(**SIZES, measure_limits=False, kinds=("base",))
    as_on_a_gpu(monkeypatch, 1000, 50, layer_programs.work(("base", "plain", None), options)[0])
    measured = measure(options)
    assert measured["from_cache"] is True
    print_tables(measured)
    assert "weights from the cache" in capsys.readouterr().out


def test_on_a_gpu_all_products_are_in_one_loop_of_known_length(optimised):
    half = dict(dtype=jnp.float16)
    x, W = jax.ShapeDtypeStruct((32, 2048), **half), jax.ShapeDtypeStruct((2048, 2304), **half)
    placed = placed_on_h100((x, [(W,)] * 3))
    program = jax.jit(device_loop.looped(lambda x, W: x @ W, 700)).lower(*placed).compile()
    text = program.as_text()
    assert text.count(" while(") == 1
    # The host need not ask the device before every round.
    assert '"known_trip_count":{"n":"700"}' in text
    assert text.count("kind=kCustom") + text.count('custom_call_target="__cublas') >= 3
    assert not re.search(r"= f16\[2048,2304\]\S* (copy|transpose)\(", text)


def test_a_gpu_takes_turns_over_more_than_its_cache_and_runs_for_ten_milliseconds():
    weight = 2 * 2048 * 2304
    sets = device_loop.sets_of(GPU, weight)
    assert sets * weight > 3 * 50e6
    calls = sets * device_loop.rounds_of(GPU, sets, weight, 0)
    assert calls * weight / 3e12 >= 0.01
    # A program of a thousand calls would compile for minutes.
    assert device_loop.sets_of(GPU, 1000) == 32
    assert (device_loop.sets_of(CPU, weight), device_loop.rounds_of(CPU, 1, weight, 0)) == (1, 1)


@pytest.mark.parametrize("seconds", [0.0, 5e-6])
def test_limits_are_found_with_and_without_a_loop(seconds, monkeypatch):
    own = dataclasses.replace(CPU, timed_seconds=seconds, timed_bytes=40_000 * (seconds > 0))
    monkeypatch.setattr("flora_jax.platforms.platform", lambda: own)
    assert 1e6 < machine.memory_bandwidth(megabytes=4, repeats=2) < 1e14
    assert 1e6 < machine.product_rate(sizes=(64,), repeats=2) < 1e16
    least, median = machine.product_seconds(3, 32, 48, "float16", repeats=3)
    assert 0 < least <= median


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_arrays_have_the_moments_asked_for_and_differ(dtype):
    first = np.asarray(draw((300, 400), dtype, 0, mean=1.0, scale=0.5), np.float32)
    assert first.mean() == pytest.approx(1, abs=0.01)
    assert first.std() == pytest.approx(0.5, rel=0.01)
    # Neighbours and rows know nothing of each other.
    assert abs(np.corrcoef(first[:, 1:].ravel(), first[:, :-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(first[1:].ravel(), first[:-1].ravel())[0, 1]) < 0.01
    again = np.asarray(draw((300, 400), dtype, 0, mean=1.0, scale=0.5), np.float32)
    other = np.asarray(draw((300, 400), dtype, 1, mean=1.0, scale=0.5), np.float32)
    assert (first == again).all()
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.01
    leaves = jax.tree.leaves(fill([jax.ShapeDtypeStruct((50, 60), dtype)] * 3, 0))
    assert len({np.asarray(leaf).tobytes() for leaf in leaves}) == 3


def test_a_random_model_keeps_its_activations_finite_and_no_two_arrays_are_alike():
    config = dataclasses.replace(PRESETS["mini"], n_layer=2)
    model = random_model(config, "float16")
    leaves = jax.tree.leaves(model.params)
    assert len({np.asarray(leaf).tobytes() for leaf in leaves}) == len(leaves)
    assert all(np.asarray(leaf, np.float32).std() > 0 for leaf in leaves)
    from flax import nnx

    tokens = np.arange(1, 17, dtype=np.int32)[None]
    run = jax.jit(lambda params: nnx.merge(model.graph, params)(tokens))
    logits = np.asarray(run(model.params))
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
