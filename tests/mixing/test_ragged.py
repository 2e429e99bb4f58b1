"""Kinds and ranks mixed in one batch, against explicit weights and against each row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters import apply
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.mixing.bank import build_bank
from flora_jax.mixing.pairs import (
    Groups,
    form,
    group_bucket,
    group_lattice,
    list_pairs,
    pair_lattice,
    row_components,
)
from flora_jax.mixing.ragged import GROUP, Ragged, RowWise
from tests.helpers import oracles
from tests.helpers.random_adapters import KINDS, random_adapter, random_projection

TARGET = "attn.c_attn"
SIZES = {TARGET: (24, 40), "mlp.c_fc": (24, 32)}


def _adapters(seed, ranks=(1, 2, 5, 16), targets=(TARGET,)):
    made = {}
    for kind in KINDS:
        for rank in ranks if kind != "ia3" else (1,):
            made[f"{kind}{rank}"] = random_adapter(
                kind, seed * 100 + rank, SIZES, rank=rank, targets=targets
            )
    made["ia3-input"] = random_adapter(
        "ia3", seed, SIZES, targets=targets, feedforward=(TARGET, "mlp.c_fc")
    )
    return made


def _inputs(seed, batch, tokens, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(batch, tokens, 24)), dtype),
        jnp.asarray(rng.normal(size=(24, 40)), dtype),
        jnp.asarray(rng.normal(size=40), dtype),
    )


def _expected(adapters, names, x, W, bias):
    own = [None if name is None else adapters[name].layers[0].get(TARGET) for name in names]
    return np.stack([oracles.project(p, row, W, bias) for p, row in zip(own, x)])


TOLERANCES = [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_batch_equals_explicit_weights_row_by_row(seed, dtype, tolerance):
    adapters = _adapters(seed)
    bank = build_bank(adapters, SIZES, 1)
    rng = np.random.default_rng(seed)
    for batch, tokens in [(1, 3), (7, 1), (16, 4)]:
        names = [rng.choice([None, *adapters]) for _ in range(batch)]
        x, W, bias = _inputs(seed, batch, tokens, dtype)
        hook = Ragged(bank.layers[0][TARGET], list_pairs(bank, names)[TARGET])
        found = jax.jit(apply)(hook, x, W, bias)
        expected = _expected(adapters, names, x, W, bias)
        assert (
            np.abs(np.asarray(found, np.float64) - expected).max()
            < tolerance * np.abs(expected).max()
        )


def test_high_ranks_equal_explicit_weights():
    adapters = _adapters(0, ranks=(1, 27))
    bank, names = build_bank(adapters, SIZES, 1), [None, *adapters]
    x, W, bias = _inputs(0, len(names), 2)
    hook = Ragged(bank.layers[0][TARGET], list_pairs(bank, names)[TARGET])
    expected = _expected(adapters, names, x, W, bias)
    assert np.abs(jax.jit(apply)(hook, x, W, bias) - expected).max() < 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(3))
def test_a_single_row_equals_the_explicit_weight_in_its_own_form(seed):
    adapters = _adapters(seed)
    bank = build_bank(adapters, SIZES, 1)
    x, W, bias = _inputs(seed, 1, 6)
    run = jax.jit(apply)
    for name in [None, *adapters]:
        expected = _expected(adapters, [name], x, W, bias)
        shape = form(bank, name)
        for merged in (False, True):
            own = row_components(bank, [name], shape._replace(merged=merged))[TARGET]
            found = run(RowWise(bank.layers[0][TARGET], own), x, W, bias)
            assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()
        # Two or more multiplicative components; HiRA of rank 1 has its frozen ones and another.
        assert own.merged == (name in ("flora2", "flora5", "flora16") or "hira" in str(name))


def test_ranks_and_targets_may_differ_by_layer():
    """Rank 4 in one layer, 1 in another, none in a third; IA3 on outputs here, on inputs there."""
    flora = [random_projection("flora", n, 24, 40, rank) for n, rank in enumerate((4, 1))]
    lora = [random_projection("lora", n, 24, 40, rank) for n, rank in enumerate((1, 3))]
    ia3 = [
        random_projection("ia3", n, 24, 40, 1, side=side)
        for n, side in enumerate(("output", "input"))
    ]
    adapters = {
        kind: ModelAdapter(kind, ({TARGET: own[0]}, {TARGET: own[1]}, {}), projections=SIZES)
        for kind, own in {"flora": flora, "lora": lora, "ia3": ia3}.items()
    }
    bank = build_bank(adapters, SIZES, 3)
    names = [None, *adapters]
    x, W, bias = _inputs(0, 4, 2)
    run = jax.jit(apply)
    for layer in range(3):
        resident = bank.layers[layer][TARGET]
        own = [adapters[name].layers[layer].get(TARGET) if name else None for name in names]
        expected = np.stack([oracles.project(p, row, W, bias) for p, row in zip(own, x)])
        together = run(Ragged(resident, list_pairs(bank, names)[TARGET]), x, W, bias)
        alone = [
            run(
                RowWise(resident, row_components(bank, [name], form(bank, name))[TARGET]),
                x[row, None],
                W,
                bias,
            )[0]
            for row, name in enumerate(names)
        ]
        for found in (together, np.stack(alone)):
            assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(3))
def test_an_adapter_may_change_inside_an_example(seed):
    adapters = _adapters(seed)
    bank = build_bank(adapters, SIZES, 1)
    rng = np.random.default_rng(seed)
    batch, tokens = 3, 5
    names = [rng.choice([None, *adapters]) for _ in range(batch * tokens)]
    x, W, bias = _inputs(seed, batch, tokens)
    hook = Ragged(bank.layers[0][TARGET], list_pairs(bank, names)[TARGET], per_token=True)
    found = jax.jit(apply)(hook, x, W, bias)
    expected = _expected(adapters, names, x.reshape(-1, 1, 24), W, bias).reshape(found.shape)
    assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()


def test_the_product_has_as_many_rows_as_the_sum_of_the_ranks():
    """One rank-16 adapter among 31 of rank 1 costs 47 rows, not 32 · 16."""
    adapters = {"high": random_adapter("flora", 0, SIZES, rank=16)} | {
        f"low{n}": random_adapter("flora", n, SIZES, rank=1) for n in range(31)
    }
    bank = build_bank(adapters, SIZES, 1)
    pairs = list_pairs(bank, list(adapters))[TARGET]
    assert 15 <= pairs.row_P.shape[0] <= 32
    x, W, bias = _inputs(0, 32, 1)
    lowered = jax.jit(apply).lower(Ragged(bank.layers[0][TARGET], pairs), x, W, bias)
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 1
    assert "tensor<64x1x24xf32>" in products[0]


def test_additive_components_beyond_a_group_cost_their_own_rows_alone():
    """One rank-32 LoRA among 31 of rank 1: a group in every row's place, and three more in all."""
    adapters = {"high": random_adapter("lora", 0, SIZES, rank=32)} | {
        f"low{n}": random_adapter("lora", n, SIZES, rank=1) for n in range(31)
    }
    bank = build_bank(adapters, SIZES, 1)
    pairs = list_pairs(bank, list(adapters))[TARGET]
    assert pairs.add_slot_BJ.shape == (32, GROUP)
    assert 3 <= pairs.more_row_A.shape[0] <= 32
    few = list_pairs(bank, ["low0"] * 32)[TARGET]
    assert (few.add_slot_BJ.shape, few.more_row_A.shape[0]) == ((32, 1), 0)


def test_a_target_that_a_row_does_not_adapt_costs_no_further_rows():
    adapters = {
        "both": random_adapter("flora", 0, SIZES, rank=2, targets=(TARGET, "mlp.c_fc")),
        "one": random_adapter("flora", 1, SIZES, rank=8, targets=(TARGET,)),
    }
    bank = build_bank(adapters, SIZES, 1)
    pairs = list_pairs(bank, ["one"] * 4)
    assert pairs[TARGET].row_P.shape[0] == 28
    assert pairs["mlp.c_fc"].row_P.shape[0] == 0
    assert set(build_bank({"one": adapters["one"]}, SIZES, 1).layers[0]) == {TARGET}


@pytest.mark.parametrize("seed", range(3))
def test_rows_have_the_same_bits_in_any_position_and_company_of_one_shape(seed):
    adapters = _adapters(seed)
    bank = build_bank(adapters, SIZES, 1)
    rng = np.random.default_rng(seed)
    names = [rng.choice([None, *adapters]) for _ in range(16)]
    x, W, bias = _inputs(seed, 16, 1)
    shape = {TARGET: (256, Groups(GROUP, 16))}
    run = jax.jit(apply)
    full = run(Ragged(bank.layers[0][TARGET], list_pairs(bank, names, shape)[TARGET]), x, W, bias)
    for row in rng.choice(16, 4, replace=False):
        place = int(rng.integers(16))
        alone = [None] * 16
        alone[place] = names[row]
        moved = jnp.zeros_like(x).at[place].set(x[row])
        hook = Ragged(bank.layers[0][TARGET], list_pairs(bank, alone, shape)[TARGET])
        np.testing.assert_array_equal(run(hook, moved, W, bias)[place], full[row])


def test_a_row_of_nan_stays_in_its_row():
    adapters = _adapters(0)
    bank = build_bank(adapters, SIZES, 1)
    names = [None, "flora5", "lora2", "hira2", "ia31"]
    x, W, bias = _inputs(0, 5, 2)
    run = jax.jit(apply)
    for sick in range(5):
        hook = Ragged(bank.layers[0][TARGET], list_pairs(bank, names)[TARGET])
        found = run(hook, x.at[sick].set(jnp.nan), W, bias)
        healthy = [row for row in range(5) if row != sick]
        assert np.all(np.isnan(found[sick]))
        np.testing.assert_array_equal(
            found[np.array(healthy)], run(hook, x, W, bias)[np.array(healthy)]
        )


def test_an_adapter_that_is_not_resident_is_an_error():
    bank = build_bank(_adapters(0), SIZES, 1)
    with pytest.raises(KeyError, match="nobody"):
        list_pairs(bank, [None, "nobody"])


def test_an_adapter_of_another_width_is_refused():
    other = random_adapter("lora", 0, {TARGET: (24, 48)}, rank=2)
    with pytest.raises(ValueError, match="output width 48, the base model has 40"):
        build_bank({"x": other}, SIZES, 1)


def test_bucket_sizes_are_few_and_hold_everything():
    assert pair_lattice(16, 15) == (0, 16, 32, 64, 128, 240)
    assert pair_lattice(1, 0) == (0,)
    assert pair_lattice(4, 1) == (0, 4)
    assert group_lattice(16, 6) == ((0, 0), (1, 0), (2, 0), (4, 0), (8, 0))
    assert group_lattice(16, 20) == (*group_lattice(16, 8), (8, 16), (8, 32))
    assert group_lattice(4, 0) == ((0, 0),)


def test_rows_take_the_smallest_group_bucket():
    lattice = group_lattice(3, 32)
    assert group_bucket([0, 0, 0], lattice) == (0, 0)
    assert group_bucket([1, 0, 3], lattice) == (4, 0)
    assert group_bucket([9, 8, 0], lattice) == (8, 3)
    assert group_bucket([32, 32, 32], lattice) == (8, 9)
    with pytest.raises(ValueError, match="does not fit the largest bucket"):
        group_bucket([33, 32, 32], lattice)
