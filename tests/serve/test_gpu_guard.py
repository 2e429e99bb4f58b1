"""Real programs of StarCoder 15B, and of two that share keys among fewer queries, compiled for an H100
ahead of time: launches, memory, donation.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from flora_jax.errors import InputError
from flora_jax.mixing.bank import Count, empty_layers, patch, write
from flora_jax.models.family import presets
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.plan import memory, programs, roofline, summary
from flora_jax.plan.ahead import compile_lowered, one_device
from flora_jax.plan.cards import CARDS
from flora_jax.plan.launches import Program
from flora_jax.plan.memory import cache_bytes_per_position
from flora_jax.plan.setting import Setting
from flora_jax.serve.ahead import lower_for
from tests.helpers.gpu_target import placed_on_h100

pytestmark = pytest.mark.usefixtures("optimised")
TARGET = "attn.c_attn"
MIB = 1 << 20
WHOLE = 40
# By kind and rank the most launches of a decode step: 40 layers, 32 rows, 2,048 positions.
MOST = {("none", 0): 620, ("flora", 8): 680, ("lora", 8): 720}
# By preset the layers, and the most launches of a decode step in which 32 rows each have a LoRA of rank 8
# on q_proj and v_proj.
KIN = {"llama-3-8b": (32, 800), "qwen2.5-7b": (28, 700)}
CUDNN = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"


def setting(layers, kind, rank):
    """The 15B shape on an H100: 32 rows of 2,048 positions, as many adapters on ``c_attn``."""
    config = dataclasses.replace(PRESETS["15b"], n_layer=layers)
    return Setting(
        "15b", config, CARDS["h100"], kind=kind, rank=rank, max_num_seqs=32, max_model_len=2048
    )


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        summary.check_compiling()
    except InputError as error:
        pytest.skip(str(error))


def cache_bytes(own):
    return cache_bytes_per_position(own) * own.max_num_seqs * own.context


def assert_is_lean(found, own, gathered=0):
    assert found["donated"] >= cache_bytes(own)
    assert found["copies_of_weights"] == 0
    assert found["loops_in_a_step"] == 0
    assert found["temporaries"] <= gathered + 64 * MIB
    assert found["arguments"] + found["temporaries"] < own.card.memory_bytes


@pytest.mark.parametrize("kind, rank", MOST)
def test_a_decode_step_has_few_launches_and_no_loop(kind, rank):
    """Counted at 2 and 4 layers; the others add as many each. Sampling is a program of its own."""
    few, more = (summary.compile_decode(setting(n, kind, rank)) for n in (2, 4))
    assert_is_lean(more, setting(4, kind, rank))
    launches = few["launches"] + (more["launches"] - few["launches"]) / 2 * (WHOLE - 2)
    print(kind, rank, launches, more)
    assert 12 * WHOLE < launches <= MOST[kind, rank]


@pytest.mark.slow
@pytest.mark.parametrize("kind, rank", MOST)
def test_all_forty_layers_have_as_few(kind, rank):
    own = setting(WHOLE, kind, rank)
    found = summary.compile_decode(own)
    assert_is_lean(found, own)
    assert 12 * WHOLE < found["launches"] <= MOST[kind, rank]


def kin(preset, layers):
    """The same rows under adapters on a model of the Llama family."""
    config = dataclasses.replace(presets()[preset], num_hidden_layers=layers, windows=())
    return Setting(
        preset, config, CARDS["h100"],
        dtype="bfloat16", kind="lora", rank=8, max_num_seqs=32, max_model_len=2048,
    )  # fmt: skip


def gathered_bytes(own):
    """Keys and values of all rows of one layer, which attention puts in a row before it reads them."""
    return cache_bytes(own) // own.config.n_layer


@pytest.mark.parametrize("preset", KIN)
def test_models_with_several_key_heads_fit_and_copy_no_weight(preset):
    """Compiled at 2 layers; the others add as much each. What the plan says of all is held to that."""
    layers, most = KIN[preset]
    own, whole = kin(preset, 2), kin(preset, layers)
    found = summary.compile_decode(own)
    print(preset, found)
    assert_is_lean(found, own, gathered_bytes(own))
    modelled, _ = roofline.launches(own, own.context, roofline.whole_work(own, 32))
    assert modelled == pytest.approx(found["launches"], rel=0.1)
    once = own.family.launches.other
    assert once + (found["launches"] - once) / 2 * layers <= most
    held = memory.needed(own)
    assert found["arguments"] == pytest.approx(held.weights + held.cache + held.bank, rel=0.01)
    assert found["temporaries"] <= held.temporaries
    assert memory.fits(whole)


@pytest.mark.parametrize(
    "kind, rank", [("flora", 8), pytest.param("lora", 8, marks=pytest.mark.slow)]
)
def test_two_cards_share_a_model_by_two_all_reduces_a_layer(kind, rank):
    """And for the one key and value an all-gather; beside the layers the embedding's and the logits'."""
    own = dataclasses.replace(setting(2, kind, rank), devices=2)
    found = summary.compile_decode(own)
    print(kind, rank, found)
    assert_is_lean(found, own)
    assert found["collectives"] == {"all-reduce": 2 * 2 + 1, "all-gather": 2 + 1}
    held = memory.needed(own)
    assert found["arguments"] == pytest.approx(held.weights + held.cache + held.bank, rel=0.01)
    one = memory.needed(setting(2, kind, rank))
    positions = 2 * own.config.n_positions * own.config.hidden_size  # Whole on either card.
    assert held.weights == pytest.approx((one.weights + positions) / 2, rel=0.001)


@pytest.mark.slow
def test_two_cards_share_several_key_heads_without_an_all_gather():
    own = dataclasses.replace(kin("llama-3-8b", 2), devices=2)
    found = summary.compile_decode(own)
    print(found)
    assert_is_lean(found, own, gathered_bytes(own))
    assert found["collectives"] == {"all-reduce": 2 * 2 + 1, "all-gather": 1}


@pytest.mark.slow
@pytest.mark.parametrize("preset", KIN)
def test_all_their_layers_fit(preset):
    layers, most = KIN[preset]
    own = kin(preset, layers)
    found = summary.compile_decode(own)
    assert_is_lean(found, own, gathered_bytes(own))
    assert 12 * layers < found["launches"] <= most


def compiled_prompts(layers, kind, rank, monkeypatch):
    """The program for four pieces of 512 tokens under adapters, and its text."""
    monkeypatch.setattr(CUDNN, lambda: 91200)
    lowered = lower_for(programs.device_of(setting(layers, kind, rank)), one_device(CARDS["h100"]))
    (*_, name) = (name for name in lowered if name.startswith("prefill 4 x 512"))
    return compile_lowered(lowered[name])


@pytest.mark.parametrize("kind, rank", MOST)
def test_2048_tokens_of_prompts_need_little_memory_and_no_scores(kind, rank, monkeypatch):
    """No array of scores, [.., 512, 2048] for every head, is left: flash attention under a mask."""
    found = compiled_prompts(2, kind, rank, monkeypatch)
    program = Program(found.text)
    print(kind, rank, found.temporaries / MIB, program.launches())
    assert found.donated >= cache_bytes(setting(2, kind, rank))
    assert program.copies_of(programs.weight_shapes(setting(2, kind, rank))) == []
    assert found.text.count("__cudnn$fmha") >= 2
    scores = 4 * 48 * 512 * 2048
    assert all(size < scores for size in array_sizes(program))
    more = compiled_prompts(4, kind, rank, monkeypatch)
    # No layer adds to what another needs.
    assert more.temporaries <= found.temporaries + 8 * MIB
    assert found.temporaries <= 480 * MIB


def array_sizes(program):
    """Numbers of values of the arrays that a program's kernels write."""
    made = (one.shape for one in program.computations[program.entry] if one.op != "parameter")
    arrays = (re.findall(r"\[([\d,]+)\]", shape) for shape in made)
    return [math.prod(map(int, dims.split(","))) for found in arrays for dims in found]


def test_sampling_and_beginning_need_no_sort_and_no_branch():
    """A branch would make the host wait for the device."""
    lowered = lower_for(programs.device_of(setting(1, "none", 0)), one_device(CARDS["h100"]))
    names = [name for name in lowered if name.startswith(("draw", "begin"))]
    assert len(names) == 4
    for name in names:
        text = compile_lowered(lowered[name]).text
        assert " sort(" not in text, name
        assert " conditional(" not in text, name
        assert not Program(text).launches().loops, name


def test_writing_an_adapter_donates_the_bank():
    room = {TARGET: Count(2 + 32 * 8, 1, 1)}
    most = {TARGET: Count(8, 0, 0)}
    config = PRESETS["15b"]
    make = functools.partial(empty_layers, room, config.projections(), WHOLE, jnp.float16)
    layers = jax.eval_shape(make)
    values, slots = patch(None, {}, room, most, config.projections(), WHOLE)
    program = write.lower(*placed_on_h100((layers, values, slots))).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    assert program.memory_analysis().alias_size_in_bytes >= held
    assert program.memory_analysis().temp_size_in_bytes <= 64 * MIB
