"""Conversions between kinds against explicit weights, made with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.adapters import fits
from flora_jax.adapters.dora import DoRA
from flora_jax.adapters.ia3 import IA3
from flora_jax.adapters.kind import kind_of
from flora_jax.adapters.lora import LoRA
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.adapters.registry import convertible
from flora_jax.errors import InputError
from flora_jax.peft.convert import Base, convert
from tests.helpers.random_adapters import projections_of, random_projection

I, O = 12, 18  # noqa: E741
TARGET = "attn.c_attn"


def base_of(seed=0, bias=True):
    rng = np.random.default_rng(seed)
    W_IO = rng.normal(0, 1, (I, O)).astype(np.float32)
    bias_O = rng.normal(0, 1, O).astype(np.float32) if bias else None
    return Base(lambda layer, target: jnp.asarray(W_IO), lambda layer, target: bias_O), W_IO, bias_O


def adapter_of(params):
    kind = kind_of(params).name
    return ModelAdapter(kind, ({TARGET: params},), projections=projections_of({TARGET: (I, O)}))


def outputs(params, x_XI, W_IO, bias_O):
    """What one adapter makes of inputs, in float64, by its explicit weight."""
    own_IO, own_O = kind_of(params).merge(params, jnp.asarray(W_IO), bias_O)
    y_XO = x_XI.astype(np.float64) @ np.asarray(own_IO, np.float64)
    return y_XO if own_O is None else y_XO + np.asarray(own_O, np.float64)


def assert_same(found, source, W_IO, bias_O):
    x_XI = np.random.default_rng(9).normal(0, 1, (7, I))
    expected = outputs(source, x_XI, W_IO, bias_O)
    np.testing.assert_allclose(
        outputs(found, x_XI, W_IO, bias_O), expected, atol=2e-5 * np.abs(expected).max()
    )


EXACT = [
    ("hira", {"rank": 3}, "flora", 4, True),
    ("flora", {"rank": 3}, "hira", 4, True),
    ("flora", {"rank": 3, "reduction": "sum"}, "hira", 4, True),
    ("flora", {"rank": 1}, "hira", 2, True),
    ("lora", {"rank": 3, "alpha": 5.0}, "dora", 3, True),
    ("ia3", {"rank": 1, "side": "input"}, "flora", 1, True),
    ("ia3", {"rank": 1, "side": "input"}, "hira", 1, True),
    ("ia3", {"rank": 1}, "flora", 1, False),
    ("ia3", {"rank": 1}, "hira", 1, False),
    ("ia3", {"rank": 1}, "dora", 1, False),
]


@pytest.mark.parametrize("kind, options, to, rank, bias", EXACT)
def test_what_can_be_the_same_is_the_same(kind, options, to, rank, bias):
    base, W_IO, bias_O = base_of(bias=bias)
    source = random_projection(kind, 3, I, O, **options)
    found = convert(adapter_of(source), to, base)
    made = found.adapter.layers[0][TARGET]
    assert found.adapter.kind == to
    assert kind_of(made).rank(made) == rank
    assert_same(made, source, W_IO, bias_O)
    assert found.exact == {(0, TARGET)}
    (difference,) = found.differences.values()
    assert difference.weight < 1e-5
    assert difference.bias == 0
    assert found.total < 1e-5


def test_a_component_of_ones_is_what_a_hira_has_already():
    base, W_IO, bias_O = base_of()
    source = random_projection("flora", 3, I, O, rank=3)
    # The mean of three: a first component of threes is the matrix of ones.
    source = type(source)(source.down_RI.at[0].set(1.0), source.up_RO.at[0].set(3.0))
    made = convert(adapter_of(source), "hira", base).adapter.layers[0][TARGET]
    assert len(made.down_RI) == 2
    assert_same(made, source, W_IO, bias_O)
    half = type(source)(source.down_RI, source.up_RO.at[0].set(1.5))
    made = convert(adapter_of(half), "hira", base).adapter.layers[0][TARGET]
    assert len(made.down_RI) == 3
    assert_same(made, half, W_IO, bias_O)


def test_a_hira_comes_back_from_flora_as_it_was():
    base, _, _ = base_of()
    source = random_projection("hira", 3, I, O, rank=2)
    there = convert(adapter_of(source), "flora", base).adapter
    back = convert(there, "hira", base).adapter.layers[0][TARGET]
    np.testing.assert_array_equal(back.down_RI, source.down_RI)
    np.testing.assert_array_equal(back.up_RO, source.up_RO)


@pytest.mark.parametrize(
    "kind, options, to, reason",
    [
        ("lora", {"rank": 2}, "flora", "it adds to the weight, and a FLoRA only multiplies it"),
        ("lora", {"rank": 2}, "hira", "it adds to the weight, and a HiRA only multiplies it"),
        ("flora", {"rank": 2}, "lora", "it multiplies the weight, and a LoRA only adds to it"),
        ("dora", {"rank": 2}, "lora", "it multiplies the weight"),
        ("flora", {"rank": 2}, "dora", "it scales inputs, and a DoRA scales outputs alone"),
        ("ia3", {"rank": 1}, "flora", "it scales the bias, and a flora leaves it"),
        ("ia3", {"rank": 1}, "hira", "it scales the bias, and a hira leaves it"),
    ],
)  # fmt: skip
def test_what_cannot_be_the_same_is_refused_with_its_reason(kind, options, to, reason):
    base, _, _ = base_of()
    source = random_projection(kind, 3, I, O, **options)
    with pytest.raises(InputError, match=rf"^layer 0 {TARGET}: no {to} is the same: {reason}"):
        convert(adapter_of(source), to, base)


def test_a_bias_that_is_lost_is_measured():
    base, _, bias_O = base_of()
    source = random_projection("ia3", 3, I, O, rank=1)
    found = convert(adapter_of(source), "flora", base, approximate=True)
    (difference,) = found.differences.values()
    assert found.exact == set()
    assert difference.weight < 1e-5
    lost = np.linalg.norm((np.asarray(source.l) - 1) * bias_O) / np.linalg.norm(bias_O)
    np.testing.assert_allclose(difference.bias, lost, rtol=1e-5)


def test_a_smaller_rank_is_refused_unless_the_nearest_is_asked_for():
    base, _, _ = base_of()
    source = random_projection("hira", 3, I, O, rank=3)
    with pytest.raises(InputError, match="that has rank 4, at most 2 is asked for"):
        convert(adapter_of(source), "flora", base, rank=2)
    found = convert(adapter_of(source), "flora", base, rank=2, approximate=True)
    assert len(found.adapter.layers[0][TARGET].down_RI) == 2
    assert 0.01 < found.total < 1.5
    with pytest.raises(InputError, match="kind 'ia3': expected one of lora, flora, hira, dora"):
        convert(adapter_of(source), "ia3", base)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 15])
def test_the_nearest_lora_is_the_truncated_singular_value_decomposition(rank, weighted):
    base, W_IO, _ = base_of()
    source = random_projection("flora", 3, I, O, rank=6)
    moments_I = np.random.default_rng(2).uniform(0.1, 4, I).astype(np.float32)
    root_I1 = np.sqrt(moments_I)[:, None] if weighted else np.ones((I, 1))
    moments = (lambda: {(0, TARGET): jnp.asarray(moments_I)}) if weighted else None
    found = convert(adapter_of(source), "lora", base, rank=rank, approximate=True, moments=moments)
    made = found.adapter.layers[0][TARGET]
    own_IO = np.asarray(kind_of(source).merge(source, jnp.asarray(W_IO), None)[0], np.float64)
    change_IO = root_I1 * (own_IO - W_IO)
    left_IO = root_I1 * (W_IO + np.asarray(made.down_RI).T @ np.asarray(made.up_RO) - own_IO)
    values_K = np.linalg.svd(change_IO, compute_uv=False)
    expected = np.sqrt(np.sum(values_K[rank:] ** 2) / np.sum(values_K**2))
    share = np.linalg.norm(left_IO) / np.linalg.norm(change_IO)
    np.testing.assert_allclose(share, expected, atol=2e-6)
    np.testing.assert_allclose(found.total, expected, atol=2e-5)


@pytest.mark.parametrize("zeros", [0.0, 0.2])
def test_a_flora_is_found_again_although_some_weights_are_zero(zeros):
    """Where the weight is zero no multiplicative adapter can be seen, and nothing is divided by it."""
    rng = np.random.default_rng(0)
    W_IO = rng.normal(0, 1, (40, 60)) * (rng.random((40, 60)) >= zeros)
    W_IO = jnp.asarray(W_IO, jnp.float32)
    down_RI, up_RO = (jnp.asarray(rng.normal(0, 1, (2, n)), jnp.float32) for n in (40, 60))
    wanted_IO = W_IO * (down_RI.T @ up_RO)
    fit = fits.product_of(W_IO, wanted_IO, 2, jnp.ones(40), key=jax.random.key(0))
    assert fit.left < 1e-6
    np.testing.assert_allclose(
        np.asarray(W_IO * (fit.down_RI.T @ fit.up_RO)), np.asarray(wanted_IO), atol=5e-3
    )


def test_of_a_weight_with_more_zeros_than_others_a_fit_is_found():
    rng = np.random.default_rng(3)
    W_IO = jnp.asarray(rng.normal(0, 1, (40, 60)) * (rng.random((40, 60)) < 0.4), jnp.float32)
    down_RI, up_RO = (jnp.asarray(rng.normal(1, 0.3, (1, n)), jnp.float32) for n in (40, 60))
    wanted_IO = W_IO * (down_RI.T @ up_RO)
    for starts in (1, 3):
        fit = fits.product_of(
            W_IO, wanted_IO, 1, jnp.ones(40), key=jax.random.key(0), starts=starts
        )
        assert fit.left < 1e-6
    nothing = fits.product_of(0.0 * W_IO, wanted_IO, 2, jnp.ones(40), key=jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in nothing)


def test_more_components_than_a_change_has_do_no_harm_and_can_still_be_trained():
    """Inputs of very different sizes: the equations of many components are close to singular."""
    rng = np.random.default_rng(3)
    sizes_I = np.exp(2 * rng.normal(0, 1, (64, 1)))
    W_IO = jnp.asarray(rng.normal(0, 1, (64, 96)) * sizes_I, jnp.float32)
    down_RI, up_RO = (jnp.asarray(rng.normal(0, 0.1, (1, n)), jnp.float32) for n in (64, 96))
    wanted_IO = W_IO * (1.0 + down_RI.T @ up_RO)
    fit = {
        rank: fits.product_of(W_IO, wanted_IO, rank, jnp.ones(64), key=jax.random.key(0))
        for rank in (2, 4, 8)
    }
    assert fit[8].left <= fit[4].left <= fit[2].left < 1e-6
    made_IO = W_IO * (fit[8].down_RI.T @ fit[8].up_RO)
    share = jnp.sum(jnp.square(made_IO - wanted_IO)) / jnp.sum(jnp.square(wanted_IO))
    np.testing.assert_allclose(float(share), float(fit[8].left), atol=1e-7)
    # A component of zeros on both sides would have no gradient.
    assert (jnp.abs(fit[8].up_RO).max(axis=1) > 0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_neither_side_of_a_fit_can_be_bettered(weighted):
    """Each side is the least squares of its own, solved by NumPy output by output."""
    rng = np.random.default_rng(1)
    W_IO, wanted_IO = rng.normal(0, 1, (2, 10, 14))
    moments_I = rng.uniform(0.1, 4, 10) if weighted else np.ones(10)
    fit = fits.product_of(
        jnp.asarray(W_IO, jnp.float32), jnp.asarray(wanted_IO, jnp.float32), 2,
        jnp.asarray(moments_I, jnp.float32), key=jax.random.key(0),
    )  # fmt: skip
    down_RI, up_RO = np.asarray(fit.down_RI, np.float64), np.asarray(fit.up_RO, np.float64)
    root_I = np.sqrt(moments_I)

    def left(own_RO):
        return np.sum(moments_I[:, None] * (W_IO * (down_RI.T @ own_RO) - wanted_IO) ** 2)

    best_RO = np.stack(
        [
            np.linalg.lstsq(
                (root_I * W_IO[:, o] * down_RI).T, root_I * wanted_IO[:, o], rcond=None
            )[0]
            for o in range(14)
        ],
        axis=1,
    )
    assert left(up_RO) <= 1.0001 * left(best_RO)
    total = np.sum(moments_I[:, None] * wanted_IO**2)
    np.testing.assert_allclose(float(fit.left), left(up_RO) / total, rtol=1e-4)
    single = fits.product_of(
        jnp.asarray(W_IO, jnp.float32), jnp.asarray(wanted_IO, jnp.float32), 2,
        jnp.asarray(moments_I, jnp.float32), key=jax.random.key(0), starts=1,
    )  # fmt: skip
    assert fit.left <= single.left


@pytest.mark.parametrize("to", convertible())
def test_the_nearest_of_a_kind_gets_nearer_with_its_rank(to):
    base, _, _ = base_of()
    source = random_projection("lora", 3, I, O, rank=6, alpha=12.0)
    if to in ("lora", "dora"):
        source = random_projection("flora", 3, I, O, rank=6)
    left = [
        convert(adapter_of(source), to, base, rank=rank, approximate=True).total
        for rank in (1, 3, 6)
    ]
    assert sorted(left, reverse=True) == left
    assert left[-1] < 0.8 * left[0]


def test_a_dora_has_the_best_lengths_for_its_directions():
    base, _, _ = base_of()
    source = random_projection("flora", 3, I, O, rank=6)
    found = {
        to: convert(adapter_of(source), to, base, rank=2, approximate=True).total
        for to in ("lora", "dora")
    }
    assert found["dora"] < found["lora"]


def low_rank(rng, sizes):
    """Factors of so many components, each of its own size."""
    down_RI, up_RO = (rng.normal(0, 1, (len(sizes), n)) for n in (I, O))
    return jnp.asarray(down_RI * np.array(sizes)[:, None], jnp.float32), jnp.asarray(
        up_RO, jnp.float32
    )


def test_a_dora_of_less_rank_keeps_its_scales_and_loses_its_smallest_component():
    base, W_IO, _ = base_of()
    rng = np.random.default_rng(4)
    down_RI, up_RO = low_rank(rng, (0.1, 0.01))
    norm_O = np.linalg.norm(W_IO + np.asarray(down_RI).T @ np.asarray(up_RO), axis=0)
    magnitude_O = jnp.asarray(norm_O * rng.normal(1, 0.1, O), jnp.float32)
    source = DoRA(down_RI, up_RO, magnitude_O)
    truncated = DoRA(down_RI[:1], up_RO[:1], magnitude_O)
    (own_IO, _), (part_IO, _) = (
        kind_of(one).merge(one, jnp.asarray(W_IO)) for one in (source, truncated)
    )
    truncated_left = np.linalg.norm(part_IO - own_IO) / np.linalg.norm(own_IO - W_IO)
    found = convert(adapter_of(source), "dora", base, rank=1, approximate=True)
    assert found.total < truncated_left < 0.2
    # Before that the best LoRA of the whole change was taken, scales and all.
    best = convert(adapter_of(source), "lora", base, rank=1, approximate=True).total
    assert best > 2 * truncated_left


def test_an_output_that_is_scaled_by_zero_is_one_of_length_zero():
    base, W_IO, _ = base_of(bias=False)
    scales_O = np.random.default_rng(5).normal(1, 0.2, O).astype(np.float32)
    scales_O[3] = 0
    found = convert(adapter_of(IA3(jnp.asarray(scales_O), "output")), "dora", base)
    assert found.exact == {(0, TARGET)}
    made = found.adapter.layers[0][TARGET]
    np.testing.assert_allclose(
        np.asarray(kind_of(made).merge(made, jnp.asarray(W_IO))[0]),
        W_IO * scales_O[None],
        atol=1e-5,
    )
    # A DoRA with such an output is itself again, and one that adds to it is none.
    assert convert(found.adapter, "dora", base).exact == {(0, TARGET)}


def test_an_adapter_that_moves_nothing_is_met_by_any_kind():
    base, _, _ = base_of()
    none = LoRA(jnp.asarray(low_rank(np.random.default_rng(6), (1.0,))[0]), jnp.zeros((1, O)))
    for to in convertible():
        found = convert(adapter_of(none), to, base)
        assert found.exact == {(0, TARGET)}
        (difference,) = found.differences.values()
        assert difference.weight == 0
    found = convert(adapter_of(none), "flora", base, rank=1, approximate=True)
    assert found.total == 0


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2])
def test_a_flora_of_a_small_change_is_no_further_than_the_hira_of_a_rank_less(size):
    base, _, _ = base_of()
    down_RI, up_RO = low_rank(np.random.default_rng(7), (size,))
    source = adapter_of(LoRA(down_RI, up_RO))
    left = {
        (to, rank): convert(source, to, base, rank=rank, approximate=True).total
        for to, rank in (("flora", 4), ("hira", 3))
    }
    assert left["flora", 4] <= 1.01 * left["hira", 3]


def test_no_fit_has_more_components_than_the_weight_has_directions():
    base, _, _ = base_of()
    source = random_projection("lora", 3, I, O, rank=2)
    for to in ("flora", "hira"):
        made = convert(adapter_of(source), to, base, rank=500, approximate=True).adapter
        assert kind_of(made.layers[0][TARGET]).rank(made.layers[0][TARGET]) == min(I, O)
