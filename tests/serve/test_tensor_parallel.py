"""Devices that share a model give the tokens of one device, and send what they must and no more."""

import json
import os
import subprocess
import sys

import pytest

from flora_jax.errors import InputError
from flora_jax.models.family import changed, check_parts, presets
from flora_jax.models.splits import tensor_mesh

CASES = ("starcoder", "llama int4")


@pytest.fixture(scope="module")
def found():
    """Of :mod:`tests.helpers.tensor_parallel`, which has eight devices."""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.tensor_parallel"],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_random_schedule_of_every_kind_gives_one_devices_tokens(case, found):
    """But for near ties, which are counted and rare."""
    own = found[case]
    assert own["tokens"] > 4 * own["requests"]
    assert own["differing"] == 0
    assert own["near_ties"] <= 1


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_after_the_warm_up_and_no_array_moves(case, found):
    assert found[case]["compilations"] == 0
    assert found[case]["misplaced"] == []


def test_the_schedules_preempt_and_evict(found):
    assert found["llama int4"]["preemptions"] > 0
    assert all(found[case]["evictions"] > 0 for case in CASES)


def test_a_layer_has_two_all_reduces_whatever_the_adapters(found):
    """Beside them one for the embedding and one all-gather of the logits; the one key and value of a
    multi-query model is an all-gather more. A vocabulary that is whole on each device needs neither.
    """
    assert found["starcoder"]["collectives"] == {"all-reduce": 2 * 2 + 1, "all-gather": 2 + 1}
    assert found["llama int4"]["collectives"] == {"all-reduce": 2}


def test_kernels_are_cut_and_keys_are_where_their_heads_are(found):
    assert [found[case]["kernel_share"] for case in CASES] == [1 / 8, 1 / 2]
    assert [found[case]["kv_heads"] for case in CASES] == [1, 2]


def test_a_product_of_parts_is_the_product_however_the_weight_is_held(found):
    assert len(found["projections"]) == 6
    assert all(error < 2e-6 for error in found["projections"].values()), found["projections"]


@pytest.mark.parametrize(
    "preset, size, quantize, message",
    [
        ("164m", 5, None, "expected a number that divides the model's 12 heads"),
        ("llama-3-8b", 16, None, "expected a number that divides the model's 8 heads of keys and values"),
        ("mini", 0, None, "tensor_parallel_size is 0, expected at least 1"),
        ("mini", 4, None, "tensor_parallel_size is 4, expected at most 1, the devices that JAX sees"),
        ("3b", 22, None, "expected a number that divides the 3072 outputs of h.0.attn.c_attn.kernel"),
        ("15b", 48, "int4", "expected a number that divides the 6400 outputs of h.0.attn.c_attn.kernel"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name(preset, size, quantize, message, monkeypatch):
    if "JAX sees" not in message:
        monkeypatch.setattr("jax.devices", lambda: [None] * 64)
    with pytest.raises(InputError, match=message):
        tensor_mesh(presets()[preset], size, quantize)


def test_groups_of_int4_stay_on_one_device(monkeypatch):
    monkeypatch.setattr("jax.devices", lambda: [None] * 4)
    config = changed(presets()["mini"], n_embd=96)
    check_parts(config, 2, lambda path, inputs: 2)
    with pytest.raises(InputError, match="divides the 2 groups of inputs of h"):
        tensor_mesh(config, 4, "int4")
