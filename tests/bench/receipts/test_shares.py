"""The share of the machine's limit against numbers computed by hand."""

import pytest

from flora_jax.bench.receipts.shares import (
    least_decode_seconds,
    least_prefill_seconds,
    product_weights,
    share_of_limit,
)
from flora_jax.models.starcoder.config import StarCoderConfig

CONFIG = StarCoderConfig(vocab_size=100, n_positions=64, n_embd=8, n_layer=2, n_head=2, n_inner=20)
# c_attn 8 x (8 + 2 * 4), c_proj 8 x 8, c_fc and mlp.c_proj 8 x 20, in two layers; the head 8 x 100.
LAYERS, HEAD = 2 * (128 + 64 + 160 + 160), 800


def limits(bandwidth=1e30, rate=1e30):
    return {"bytes_per_second": bandwidth, "operations_per_second": rate}


def test_weights_are_counted():
    assert product_weights(CONFIG) == (LAYERS, HEAD)


def test_a_prompt_is_bound_by_arithmetic_and_a_step_of_few_rows_by_bytes():
    slow = limits(rate=10.0)
    assert least_prefill_seconds(slow, CONFIG, 7, 3, 4) == pytest.approx(
        2 * (7 * LAYERS + 3 * HEAD) / 10
    )
    narrow = limits(bandwidth=10.0)
    assert least_decode_seconds(narrow, CONFIG, 12, 4, 4) == pytest.approx(
        3 * 4 * (LAYERS + HEAD) / 10
    )
    assert least_decode_seconds(slow, CONFIG, 12, 4, 4) == pytest.approx(
        12 * 2 * (LAYERS + HEAD) / 10
    )


def test_the_share_is_the_least_time_over_the_measured_one():
    line = {
        "completed": 3, "total_input_tokens": 30, "total_output_tokens": 15, "duration": 2e5,
    }  # fmt: skip
    least = 2 * (30 * LAYERS + 3 * HEAD) + 2 * 12 * (LAYERS + HEAD)
    found = share_of_limit(limits(rate=1.0), CONFIG, 4, 4, line)
    assert found == pytest.approx(least / 2e5)
    assert share_of_limit(limits(rate=2.0), CONFIG, 4, 4, line) == pytest.approx(found / 2)
