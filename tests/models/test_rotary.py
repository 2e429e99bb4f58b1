"""Rotary settings by every way that a config.json says them, and their numbers against transformers'."""

import numpy as np
import pytest

from flora_jax.errors import InputError
from flora_jax.models.rotary import (
    SCALINGS,
    Dynamic,
    Linear,
    Llama3,
    Rotary,
    Scaling,
    Yarn,
    read_rotary,
)

CONTEXT = "original_max_position_embeddings"
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
YARN = dict(factor=4.0, original_max_position_embeddings=32768)
ODD_YARN = dict(
    factor=2.5, original_max_position_embeddings=60, beta_fast=16.0, beta_slow=2.0,
    mscale=0.7, mscale_all_dim=1.1, truncate=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({}, Rotary(10000.0)),
        ({"rope_theta": 500000}, Rotary(500000.0)),
        ({"rope_theta": 1e6, "rope_scaling": None}, Rotary(1e6)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rotary(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rotary(scaling=Linear(4.0))),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, Rotary(scaling=Linear(4.0))),
        (
            {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}},
            Rotary(scaling=Dynamic(2.0, 131072)),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            Rotary(5e5, Llama3(**LLAMA3)),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
            Rotary(1e6, Yarn(**YARN)),
        ),
        # The context before scaling beside the scaling, as some models have it.
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, CONTEXT: 64},
            Rotary(scaling=Yarn(2.0, 64)),
        ),
        (
            {"rope_scaling": {"type": "yarn", CONTEXT: 65536}},
            Rotary(scaling=Yarn(2.0, 65536)),
        ),
        (
            {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1.0}},
            Rotary(),
        ),
    ],
)
def test_settings_are_read_from_either_field(raw, expected):
    found = read_rotary(raw, 131072)
    assert found == expected
    assert hash(found) == hash(expected)
    assert read_rotary(found.to_dict(), 131072) == expected


def scaled(kind, **fields):
    return {"rope_scaling": {"rope_type": kind, **fields}}


@pytest.mark.parametrize(
    "raw, said",
    [
        (scaled("longrope"), "rope_scaling.rope_type is 'longrope', expected one of"),
        (scaled("linear"), "rope_scaling.factor is missing, expected for linear"),
        (scaled("linear", factor="2"), "rope_scaling.factor is '2', expected a number above 0"),
        (scaled("linear", factor=0), "rope_scaling.factor is 0, expected a number above 0"),
        (scaled("linear", factor=2, beta_fast=3), "unknown effect under linear: beta_fast=3"),
        ({"rope_scaling": [2]}, r"rope_scaling is \[2\], expected an object"),
        (scaled("yarn", type="linear"), "type is 'linear', expected the same"),
        (
            scaled("linear", factor=2) | {"rope_parameters": {"type": "linear", "factor": 4}},
            "rope_scaling.factor is 2, but rope_parameters has 4",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0 but"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, only 1.0"),
        (scaled("llama3", **LLAMA3 | {"high_freq_factor": 1.0}), "high_freq_factor is 1.0"),
        (scaled("yarn", **YARN, truncate=1), "truncate is 1, expected true or false"),
        (scaled("dynamic", factor=2.0, **{CONTEXT: 0}), "positive integer"),
    ],
)
def test_what_cannot_be_honoured_is_named(raw, said):
    with pytest.raises(InputError, match=said):
        read_rotary(raw, 131072)


def test_the_longest_sequence_follows_from_the_scaling():
    assert (
        Scaling().longest(4096)
        == Linear(4.0).longest(4096)
        == Llama3(**LLAMA3).longest(4096)
        == 4096
    )
    assert Dynamic(2.0, 2048).longest(4096) == 2048
    assert Dynamic(2.0, 4096).longest(4096) == 4096
    assert Yarn(**YARN).longest(32768) == Yarn(**YARN).longest(131072) == 131072


@pytest.mark.parametrize("dim", [8, 80, 128])
@pytest.mark.parametrize(
    "scaling",
    [Scaling(), Linear(3.0), Dynamic(2.0, 2048), Llama3(**LLAMA3), Yarn(**YARN), Yarn(**ODD_YARN)],
    ids=lambda scaling: scaling.rope_type,
)
def test_frequencies_are_those_of_transformers(dim, scaling, caplog):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for base in (10000.0, 500000.0, 1e6):
        rotary = Rotary(base, scaling)
        config = LlamaConfig(
            hidden_size=2 * dim, num_attention_heads=2, max_position_embeddings=2048,
            rope_parameters=rotary.to_dict()["rope_parameters"],
        )  # fmt: skip
        theirs = LlamaRotaryEmbedding(config)
        found = rotary.frequencies(dim)
        assert found.dtype == np.float32
        # Two units in the last place, the most that a sum of two products differs.
        np.testing.assert_allclose(found, theirs.inv_freq.numpy(), rtol=3e-7)
        assert scaling.amplitude() == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_every_scaling_is_in_the_table():
    assert set(SCALINGS) == {"default", "linear", "dynamic", "llama3", "yarn"}
