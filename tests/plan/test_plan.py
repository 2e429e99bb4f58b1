"""A plan's arithmetic: bytes against the engine's own trees, what fits, and the modelled times."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from flora_jax.adapters.model_adapter import init_adapter
from flora_jax.errors import InputError
from flora_jax.models.attention import cudnn_refuses
from flora_jax.models.model import abstract_model
from flora_jax.models.quantize import quantize_abstract
from flora_jax.models.starcoder import FAMILY
from flora_jax.models.starcoder.config import PRESETS, StarCoderConfig
from flora_jax.plan import memory, prompts, roofline, setting
from flora_jax.plan.cards import CARDS, MATRIX_UNITS, card
from flora_jax.plan.setting import Setting
from flora_jax.platforms import GPU
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.registry import version
from flora_jax.serve.residency import make_residency
from flora_jax.serve.state import init_state

ALL = tuple(PRESETS["mini"].projections())
TINY = StarCoderConfig(
    vocab_size=80, n_positions=40, n_embd=32, n_layer=3, n_head=4, n_inner=48, multi_query=False,
    tie_word_embeddings=False,
)  # fmt: skip


def plan_of(preset="15b", gpu="h100", **changes):
    config = PRESETS[preset] if isinstance(preset, str) else preset
    values = {"max_num_seqs": 32, "max_model_len": min(2048, config.n_positions)} | changes
    return Setting(str(preset), config, CARDS[gpu], **values)


def bytes_of(tree):
    leaves = [
        jax.eval_shape(jax.random.key_data, leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("config", [*PRESETS.values(), TINY], ids=[*PRESETS, "tiny"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_what_the_model_adds_up_to(config, dtype, quantize):
    shallow = dataclasses.replace(config, n_layer=3)
    model = abstract_model(shallow, jnp.dtype(dtype))
    if quantize != "none":
        model = quantize_abstract(model, quantize)
    found = memory.weights_bytes(plan_of(shallow, dtype=dtype, quantize=quantize))
    assert found == bytes_of(model.params)


@pytest.mark.parametrize(
    "config", [PRESETS["15b"], PRESETS["mini"], TINY], ids=["15b", "mini", "t"]
)
@pytest.mark.parametrize("rows, context", [(1, 17), (5, 40), (32, 16)])
def test_the_cache_is_what_the_state_adds_up_to(config, rows, context):
    own = plan_of(config, max_num_seqs=rows, max_model_len=context)
    state = jax.eval_shape(
        functools.partial(
            init_state, config, rows, memory.blocks(own), own.block_size, jnp.dtype(own.dtype)
        )
    )
    assert memory.cache_bytes(own) == bytes_of(state)


@pytest.mark.parametrize("kind, rank", [("flora", 3), ("lora", 4), ("hira", 2), ("ia3", 1)])
@pytest.mark.parametrize("targets", [("attn.c_attn",), ALL])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bank_is_what_the_pool_makes_of_such_adapters(kind, rank, targets, dtype):
    own = plan_of(TINY, dtype=dtype, kind=kind, rank=rank, targets=targets, max_num_seqs=4,
                  resident_adapters=3)  # fmt: skip
    adapter = init_adapter(
        jax.random.key(0), kind, TINY.projections(), TINY.n_layer, rank=rank, targets=targets
    )
    known = version("a", adapter)
    prepared = known.read(TINY)
    assert {target: own.count(target) for target in targets} == prepared.counts
    options = EngineOptions(max_num_seqs=4, max_model_len=16, resident_adapters=3)
    pool = make_residency({known: prepared}, TINY, options, GPU.additive(dtype))
    assert memory.bank_bytes(own) == bytes_of(pool.layers)
    pool.close()


def test_a_base_alone_has_no_bank():
    assert memory.bank_bytes(plan_of()) == 0


def test_the_engines_words_are_the_plans():
    for size, dtype in itertools.product((36, 64, 128, 136, 256), setting.ITEMSIZE):
        config = dataclasses.replace(TINY, n_embd=4 * size)
        taken = cudnn_refuses(config, dtype, 512) is None
        assert (plan_of(config, dtype=dtype).prompt_attention == "cudnn") is taken


def test_devices_share_weights_and_heads_evenly():
    one, two = plan_of(TINY), plan_of(TINY, devices=2)
    leaves = {1: memory.weights_bytes(one), 2: memory.weights_bytes(two)}
    assert leaves[1] / 2 < leaves[2] < leaves[1]
    # Keys and values of many heads are split, a single one is whole on each.
    assert memory.cache_bytes_per_position(two) == memory.cache_bytes_per_position(one) // 2
    wide = plan_of("15b", devices=2)
    assert memory.cache_bytes_per_position(wide) == memory.cache_bytes_per_position(plan_of("15b"))


def test_split_weights_are_what_the_sharding_table_says():
    from jax.sharding import AbstractMesh

    from flora_jax.models.sharding import MESH_AXES, partition_specs

    model = abstract_model(PRESETS["3b"], jnp.float16)
    mesh = AbstractMesh((2,), ("tensor",))
    specs = partition_specs(model.params, FAMILY.axes)

    def own_bytes(leaf, spec):
        size = leaf.size * leaf.dtype.itemsize
        cut = [n for n, axis in zip(leaf.shape, spec) if axis in mesh.shape and n % 2 == 0]
        return size // 2 if cut else size

    assert "tensor" in MESH_AXES.values()
    sizes = jax.tree.map(own_bytes, model.params, specs)
    assert memory.weights_bytes(plan_of("3b", devices=2)) == sum(jax.tree.leaves(sizes))


def test_what_is_largest_fits_and_one_more_does_not():
    for own in (plan_of(kind="flora", rank=8), plan_of("1b", "l4"), plan_of("3b", "a100")):
        most, positions = memory.largest(own)
        assert memory.fits(dataclasses.replace(own, max_num_seqs=most))
        assert not memory.fits(dataclasses.replace(own, max_num_seqs=most + 1))
        beside = memory.needed(own).peak - memory.cache_bytes(own)
        room = memory.usable_bytes(own) - beside
        each = memory.cache_bytes_per_position(own)
        assert 0 <= room - positions * each < own.block_size * each + 1024 * own.max_num_seqs


def test_what_does_not_fit_says_so():
    own = plan_of("15b", "l4")
    assert not memory.fits(own)
    assert memory.largest(own) == (0, 0)
    assert memory.fits(plan_of("15b", "l4", quantize="int4", max_num_seqs=4))


@pytest.mark.parametrize(
    "name, values",
    [("max_num_seqs", (1, 7, 32, 300)), ("max_model_len", (16, 512, 2048, 8192)),
     ("rank", (1, 2, 8, 64)), ("resident_adapters", (1, 40, 500))],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["flora", "lora", "hira"])
def test_more_of_anything_needs_no_less(name, values, kind):
    base = plan_of(kind=kind, rank=4)
    peaks, steps, prefills = [], [], []
    for value in values:
        own = dataclasses.replace(base, **{name: value})
        peaks.append(memory.needed(own).peak)
        steps.append(roofline.total(roofline.decode(own, own.max_num_seqs, own.context)))
        prefills.append(roofline.total(prompts.prefill(own, 4, 128, own.context)))
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == len(values)
    assert steps == sorted(steps)
    assert prefills == sorted(prefills)


def test_faster_cards_are_not_slower():
    times = [roofline.total(roofline.decode(plan_of(gpu=name), 32, 2048))
             for name in ("h200", "h100", "a100", "l4")]  # fmt: skip
    assert times == sorted(times)
    quantised = [roofline.decode(plan_of(quantize=q), 32, 2048)["weights"]
                 for q in ("int4", "int8", "none")]  # fmt: skip
    assert quantised == sorted(quantised)


def test_fused_lora_is_not_slower_than_two_batched_products():
    own = plan_of(kind="lora", rank=8)
    fused, products = (
        roofline.total(roofline.decode(own, 32, 2048, ways=roofline.Ways(lora=lora)))
        for lora in ("fused", "bmm")
    )
    assert fused < products


def test_devices_exchange_what_one_does_not():
    one, four = plan_of(), plan_of(devices=4)
    assert roofline.decode(one, 32, 2048)["links"] == 0
    shared = roofline.decode(four, 32, 2048)
    assert shared["links"] > 0
    assert shared["weights"] < roofline.decode(one, 32, 2048)["weights"] / 3


# Worked out by hand from counts on programs compiled for an H100: launches of 2 µs, graphs of 4, bytes
# at 3.0 TB/s, products at 600 to 700 TFLOP/s. Milliseconds.
STEPS = [
    ("15b", 512, "loop", False, 15.4), ("15b", 2048, "loop", False, 25.9),
    ("15b", 512, "gather", False, 12.1), ("15b", 2048, "gather", False, 13.6),
    ("15b", 512, "fused", False, 11.6), ("15b", 2048, "fused", False, 12.0),
    ("15b", 512, "fused", True, 11.2), ("15b", 2048, "fused", True, 11.6),
    ("3b", 512, "loop", False, 6.6), ("3b", 512, "gather", False, 3.7),
    ("3b", 512, "fused", True, 2.8), ("3b", 2048, "loop", False, 16.1),
    ("3b", 2048, "gather", False, 4.9), ("3b", 2048, "fused", True, 3.1),
    ("1b", 512, "loop", False, 3.8), ("1b", 512, "gather", False, 1.9),
    ("1b", 512, "fused", True, 1.3), ("1b", 2048, "loop", False, 10.1),
    ("1b", 2048, "gather", False, 2.7), ("1b", 2048, "fused", True, 1.5),
]  # fmt: skip


@pytest.mark.parametrize("preset, span, attention, rounded, expected", STEPS)
def test_a_modelled_step_is_what_was_worked_out(preset, span, attention, rounded, expected):
    ways = roofline.Ways(attention=attention, rounded_results=rounded)
    found = roofline.total(roofline.decode(plan_of(preset), 32, span, ways=ways))
    assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    "kind, rank, more",
    [("flora", 1, 0.0), ("flora", 8, 0.8), ("flora", 16, 2.3), ("flora", 64, 11.0),
     ("lora", 8, 0.3), ("lora", 64, 0.8)],
)  # fmt: skip
def test_what_adapters_add_to_a_step_is_what_was_worked_out(kind, rank, more):
    ways = roofline.Ways(attention="gather", rounded_results=False)
    base = roofline.total(roofline.decode(plan_of(), 32, 2048, ways=ways))
    own = plan_of(kind=kind, rank=rank)
    found = roofline.total(roofline.decode(own, 32, 2048, ways=ways))
    assert found == pytest.approx(13.6 + more, rel=0.15)
    assert found - base == pytest.approx(more, abs=0.2, rel=0.35)


@pytest.mark.parametrize(
    "tokens, span, attention, expected",
    [(2048, 2048, "loop", 190.0), (2048, 2048, "gather", 130.0), (2048, 2048, "cudnn", 109.0),
     (512, 512, "loop", 35.0), (256, 2048, "gather", 18.0)],
)  # fmt: skip
def test_a_modelled_prefill_is_what_was_worked_out(tokens, span, attention, expected):
    ways = roofline.Ways(prompt_attention=attention, rounded_results=False)
    found = roofline.total(prompts.prefill(plan_of(), 1, tokens, span, ways))
    assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    "span, attention, rounded, kernels, graphs",
    [(512, "loop", False, 2255, 200), (2048, "loop", False, 6575, 680),
     (2048, "gather", False, 816, 1), (2048, "fused", False, 736, 1),
     (2048, "fused", True, 536, 1)],
)  # fmt: skip
def test_modelled_launches_are_those_counted(span, attention, rounded, kernels, graphs):
    ways = roofline.Ways(attention=attention, rounded_results=rounded)
    found = roofline.launches(plan_of(), span, roofline.Work({}, {}), ways)
    assert found == pytest.approx((kernels, graphs), rel=0.1)


@pytest.mark.parametrize(
    "kind, rank, kernels",
    [("none", 0, 14), ("flora", 1, 15), ("flora", 8, 15.5), ("lora", 8, 16), ("flora", 64, 32.5)],
)
def test_modelled_kernels_of_a_layer_are_those_of_the_engines_program(kind, rank, kernels):
    """Counted at 15B's shape, 32 rows, as the difference of 4 and 2 layers."""
    own = plan_of(kind=kind, rank=rank)
    found = roofline.kernels_a_layer(own, roofline.whole_work(own, 32), roofline.DEFAULT)
    assert found == pytest.approx(kernels, abs=0.5)


def test_cards_make_sense():
    for own in CARDS.values():
        assert card(own.name) is own
        clock = own.matrix_clock_ghz * 1e9
        peak = 2 * own.cores * MATRIX_UNITS * own.matrix_ops * clock
        assert peak == pytest.approx(own.peak_half, rel=0.02)
        assert 0 < own.bandwidth < own.peak_bandwidth
        assert 0 < own.products < own.peak_half
    with pytest.raises(InputError, match="--gpu is 'b1', expected one of h100, h200, a100, l4"):
        card("b1")


@pytest.mark.parametrize(
    "changes, message",
    [({"kind": "flora"}, "rank is 0"), ({"kind": "flora", "rank": -1}, "rank is -1"),
     ({"kind": "ia3", "rank": 2}, "expected 1"), ({"rank": 1}, "expected 0"),
     ({"kind": "vera", "rank": 1}, "kind is 'vera'"), ({"dtype": "float64"}, "dtype is 'float64'"),
     ({"quantize": "int2"}, "quantize is 'int2'"), ({"max_num_seqs": 0}, "max-num-seqs is 0"),
     ({"max_model_len": 0}, "max-model-len is 0"), ({"max_model_len": 9000}, "8192 positions"),
     ({"devices": 0}, "devices is 0"), ({"devices": 5}, "divides the model's 48 heads"),
     ({"resident_adapters": 3}, "none with --kind none"),
     ({"kind": "lora", "rank": 1, "resident_adapters": 0}, "resident-adapters is 0")],
)  # fmt: skip
def test_a_setting_that_no_engine_can_have_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        plan_of(**changes)


def test_int4_without_groups_is_refused():
    odd = dataclasses.replace(PRESETS["mini"], n_embd=36, n_head=4, n_inner=74)
    with pytest.raises(InputError, match="74 input features"):
        Setting("odd", odd, CARDS["l4"], quantize="int4")
    assert [setting.int4_group(n) for n in (64, 48, 128, 74)] == [64, 48, 64, 0]
