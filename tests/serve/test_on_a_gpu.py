"""The choices for a GPU, run on a CPU: the same tokens, no neighbour matters, few programs and copies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.mixing.bank import Count
from flora_jax.models.model import abstract_model, init_model
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.platforms import CPU, GPU, platform
from flora_jax.serve import device, steps
from flora_jax.serve.ahead import Compilations, abstract_device, programs
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from tests.helpers.random_adapters import random_adapter
from tests.helpers.requests import make_request
from tests.helpers.tiny_engine import (
    CONFIG,
    CONTENTS,
    NAMES,
    OPTIONS,
    Alone,
    make_engine,
    random_request,
    run_schedule,
    unscored,
)

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def engine():
    return make_engine(platform=GPU)


@pytest.fixture(scope="module")
def alone():
    return Alone(platform=GPU)


def test_any_schedule_gives_every_request_its_tokens_alone(engine, alone):
    """With dispatches that nobody has read when the next one leaves; bits are equal."""
    before, completions = engine.stats, 0
    for seed in range(120):
        for request, content, completion in run_schedule(engine, 9000 + seed):
            assert completion == alone(request, content), (seed, request)
            completions += 1
    after = engine.stats
    assert completions > 500
    assert after.preemptions > before.preemptions
    assert after.adapter_evictions > before.adapter_evictions + 25
    assert (after.running, after.waiting, after.cache_usage) == (0, 0, 0.0)


def test_without_batch_invariance_small_models_differ_nowhere_either(alone):
    engine = make_engine(platform=GPU, batch_invariant=False)
    found = [result for seed in range(25) for result in run_schedule(engine, seed)]
    assert len(found) > 100
    assert all(
        unscored(completion) == unscored(alone(request, content))
        for request, content, completion in found
    )


def test_the_tokens_are_those_of_a_cpus_choices(alone):
    """Greedy and sampled; in float32 the two differ by roundings, so by a near tie at most."""
    other = Alone(platform=CPU)
    requests = [random_request(seed) for seed in range(40)]
    equal = sum(unscored(alone(request, 0)) == unscored(other(request, 0)) for request in requests)
    assert equal >= 39


def test_nothing_is_compiled_after_the_warm_up():
    """Another model than the other tests', so that nothing is compiled yet."""
    config = dataclasses.replace(CONFIG, n_embd=24, vocab_size=101)
    adapters = {
        f"{kind}{rank}": random_adapter(kind, rank, config.projections(), 2, rank=rank)
        for kind in ("lora", "flora")
        for rank in (1, 3)
    }
    options = dataclasses.replace(
        OPTIONS, max_num_seqs=3, batch_invariant=False, host_adapter_bytes=0, cache_tokens=100
    )
    new = random_adapter("flora", 9, config.projections(), 2, rank=2)
    engine = Engine(init_model(config, 0), adapters, options=options, platform=GPU)
    counter, seen = Compilations(), []
    engine.warm_up(lambda name, done, total: seen.append((name, done, total)))
    assert seen[-1][1] == seen[-1][2] == len(seen) == len({name for name, _, _ in seen})
    assert counter.count >= len(seen)
    requests = [
        dataclasses.replace(random_request(seed), adapter=[*adapters, None][seed % 5])
        for seed in range(40)
    ]
    assert len(list(generate(engine, requests))) == 40
    engine.register("new", new)
    late = dataclasses.replace(requests[0], adapter="new")
    assert len(list(generate(engine, [late]))) == 1
    assert engine.stats.adapter_evictions
    assert engine.stats.preemptions
    assert engine.compilations.count == 0


def test_mixed_kinds_up_to_rank_8_need_at_most_16_programs():
    """15B, 32 rows, 2,048 positions; all kinds on all targets, HiRA's further component included."""
    options = EngineOptions(max_num_seqs=32, max_model_len=2048)
    model = abstract_model(PRESETS["15b"], jnp.float16)
    most = dict.fromkeys(model.config.projections(), Count(9, 8, 1))
    mixed = programs(abstract_device(model, options, GPU, most, 32))
    assert len(mixed) <= 16
    assert len({program.name for program in mixed}) == len(mixed)
    base = programs(abstract_device(model, options, GPU, {}, 0))
    assert len(base) <= 10  # The copy of a shared prompt's last block among them.


@pytest.mark.parametrize("choices, copies", [(CPU, 1), (GPU, 2)])
def test_a_decode_dispatch_copies_its_small_arguments_at_once(choices, copies, monkeypatch):
    """However many rows, steps and targets there are: one array, and the numbers of the rows where the
    host dispatches every step.
    """
    engine = make_engine(platform=choices)
    found = []

    def hosted(tree):
        return sum(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(tree))

    put, run = jax.device_put, device.Call.run

    def counted_put(tree, *rest):
        found.append(hosted(tree))
        return put(tree, *rest)

    def counted_run(call):
        found.append(hosted(call.arguments))
        return run(call)

    engine.preload(NAMES[:3])
    for n in range(3):
        engine.add(make_request(n, (5, 6, 7), adapter=NAMES[n], max_tokens=20, ignore_eos=True))
    while engine.stats.running < 3 or any(s.stage != "decode" for s in engine.scheduler.running):
        engine.wait()
        engine.step()
    decode = engine.scheduler.plan(engine.residency).decode
    assert (len(decode.sequences), decode.steps) == (3, 5)
    monkeypatch.setattr(device.jax, "device_put", counted_put)
    monkeypatch.setattr(device.Call, "run", counted_run)
    engine.device.decode(decode)
    assert sum(found) == copies


@pytest.mark.parametrize("choices", [CPU, GPU])
def test_the_next_decode_leaves_before_the_last_ones_tokens_are_read(choices, monkeypatch):
    engine, order = make_engine(platform=choices), []
    decode, read = engine.device.decode, device.Flight.read
    monkeypatch.setattr(
        engine.device, "decode", lambda *a, **k: order.append("decode") or decode(*a, **k)
    )
    monkeypatch.setattr(device.Flight, "read", lambda self: order.append("read") or read(self))
    engine.add(make_request(0, (5, 6, 7), max_tokens=25, ignore_eos=True))
    completions = []
    while engine.has_work:
        completions += [u.completion for u in engine.step() if u.completion]
    assert len(completions[0].token_ids) == 25
    if choices.pipelined:
        assert order[:4] == ["decode", "decode", "read", "decode"]
        assert order[-1] == "read"
    else:
        assert order == ["decode", "read"] * (len(order) // 2)


def test_what_is_under_way_for_a_cancelled_request_reaches_nobody(engine, alone):
    first = engine.add(make_request(0, tuple(range(1, 40)), max_tokens=30, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.cancel(first)
    for name in NAMES:
        engine.register(name, CONTENTS[name, 0])
    requests = [random_request(seed) for seed in range(20, 28)]
    for request, completion in zip(requests, generate(engine, requests), strict=True):
        assert unscored(completion) == unscored(alone(request, 0))


def test_sixteen_bits_for_additive_vectors_keep_the_logits(monkeypatch):
    """LoRA of rank 8 in float16: within 2e-3 of the largest logit, as much as half precision rounds."""
    config = dataclasses.replace(CONFIG, n_embd=64, n_head=4, n_inner=256, initializer_range=0.1)
    adapter = random_adapter("lora", 3, config.projections(), 2, rank=8, targets=("attn.c_attn",))
    model = init_model(config, 5, jnp.float16)
    options = EngineOptions(max_num_seqs=2, max_model_len=64, block_size=4)
    logits, seen, forward = {}, [], steps.forward

    def recorded(*arguments, **static):
        cache, logits_BV = forward(*arguments, **static)
        seen.append(np.asarray(logits_BV))
        return cache, logits_BV

    monkeypatch.setattr(steps, "forward", recorded)
    for additive in ("float32", "activations"):
        choices = dataclasses.replace(GPU, additive_dtype=additive, prompt_attention="gather")
        engine = Engine(model, {"a": adapter}, options=options, platform=choices)
        bank = engine.residency.layers[0]["attn.c_attn"]
        wanted = jnp.float32 if additive == "float32" else jnp.float16
        assert (bank.up_CO.dtype, bank.pre_CI.dtype) == (wanted, jnp.float32)
        engine.add(make_request(0, tuple(range(1, 30)), "a", max_tokens=4, ignore_eos=True))
        seen.clear()
        while engine.has_work:
            engine.step()
        logits[additive] = seen[0]
    wide, narrow = logits["float32"], logits["activations"]
    assert np.abs(wide[0]).max() > 0.1
    assert np.abs(wide - narrow)[0].max() <= 2e-3 * np.abs(wide[0]).max()


@pytest.mark.parametrize("dtype, reason", [(jnp.float32, "16-bit"), (jnp.float16, "cudnn_masked")])
def test_attention_over_prompts_falls_back_with_the_reason(dtype, reason):
    """float32 is refused by its name, float16 on a CPU by trying."""
    options = EngineOptions(max_num_seqs=2, max_model_len=64, block_size=4)
    engine = Engine(init_model(CONFIG, 5, dtype), options=options, platform=GPU)
    assert engine.device.prompt_attention == "gather"
    assert reason in engine.device.attention_note
    assert make_engine(platform=CPU).device.attention_note is None


def test_a_platform_that_the_table_does_not_know_gets_a_gpus_choices_without_cudnn():
    other = platform("tpu")
    assert (other.name, other.prompt_attention, other.few_shapes) == ("tpu", "gather", True)
    assert platform() is CPU
