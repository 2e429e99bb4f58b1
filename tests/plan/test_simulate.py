"""Serving on a simulated clock: the real scheduler, every request its tokens, times from the roofline."""

import random

import pytest

from flora_jax.errors import InputError
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.plan import prompts, roofline
from flora_jax.plan.cards import CARDS
from flora_jax.plan.setting import Setting
from flora_jax.plan.simulate import Arrival, Simulation
from flora_jax.platforms import GPU


def simulation(kind="none", rank=0, preset="1b", rows=4, context=256, ways=None, **options):
    own = Setting(preset, PRESETS[preset], CARDS["h100"], kind=kind, rank=rank, max_num_seqs=rows,
                  max_model_len=context)  # fmt: skip
    return Simulation(own, ways or roofline.Ways(), max_num_batched_tokens=2048, **options)


def arrivals(seed, count=40, rate=None):
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate) if rate else 0.0
        prompt = rng.randint(1, 200)
        found.append(Arrival(at_s, prompt, rng.randint(1, 256 - prompt)))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind, rank", [("none", 0), ("flora", 8), ("lora", 20), ("ia3", 1)])
@pytest.mark.parametrize("rate", [None, 50.0])
def test_every_request_gets_exactly_its_tokens(seed, kind, rank, rate):
    asked = arrivals(seed, rate=rate)
    own = simulation(kind, rank)
    found = own.run(asked)
    assert [one.arrival for one in found.served] == sorted(asked)
    assert all(one.drawn == one.arrival.output for one in found.served)
    assert all(one.arrival.at_s < one.first_s <= one.end_s for one in found.served)
    total = sum(one.output for one in asked)
    assert found.output_throughput == pytest.approx(total / found.duration_s)
    # Nothing is left behind: every row and page is free again.
    assert len(own.scheduler.free_rows) == 4
    assert own.scheduler.blocks.available == own.scheduler.bounds.blocks
    assert not own.scheduler.has_work


def test_a_small_cache_sets_sequences_aside_and_loses_no_token():
    asked = arrivals(0)
    found = simulation(cache_tokens=320).run(asked)
    assert found.preemptions > 0
    assert [one.drawn for one in found.served] == [one.output for one in sorted(asked)]
    assert found.duration_s > simulation().run(asked).duration_s


def test_one_request_takes_what_the_roofline_says():
    own = simulation(rows=1, context=256)
    found = own.run([Arrival(0.0, 5, 40)])
    step_ms = roofline.total(roofline.decode(own.setting, 1, 256))
    prompt_ms = roofline.total(prompts.prefill(own.setting, 1, 256, 256))
    # The first token is read with those of the steps that were dispatched beside the prompt.
    assert found.steps == 39
    assert 1e3 * found.duration_s == pytest.approx(prompt_ms + found.steps * step_ms)
    assert found.ttft_ms == pytest.approx(prompt_ms + GPU.steps_while_waiting * step_ms)
    after = 39 - GPU.steps_while_waiting
    assert found.tpot_ms == pytest.approx(after * step_ms / 39)


def test_more_expensive_adapters_serve_fewer_tokens():
    asked = arrivals(1, count=60)
    rates = [
        simulation(kind, rank, rows=32, ways=roofline.Ways(lora=lora)).run(asked).output_throughput
        for kind, rank, lora in (
            ("none", 0, "fused"), ("flora", 1, "fused"), ("flora", 16, "fused"),
            ("flora", 64, "fused"),
        )
    ]  # fmt: skip
    assert rates == sorted(rates, reverse=True)
    fused, products = (
        simulation("lora", 16, rows=32, ways=roofline.Ways(lora=lora)).run(asked).tpot_ms
        for lora in ("fused", "bmm")
    )
    assert fused < products


def test_a_slow_host_bounds_every_step():
    asked = arrivals(2, count=20)
    idle, busy = (simulation(host_ms=host_ms).run(asked) for host_ms in (0.0, 500.0))
    prefills = busy.duration_s / 0.5 - busy.steps
    assert 0 < prefills <= busy.dispatches
    assert prefills == pytest.approx(round(prefills))
    assert idle.duration_s < busy.duration_s / 100
    # A host that is faster than the device is hidden behind it.
    hidden = simulation(host_ms=0.01).run(asked)
    assert hidden.duration_s == pytest.approx(idle.duration_s, rel=0.02)


def test_times_of_arrival_are_kept():
    found = simulation().run([Arrival(100.0, 4, 2), Arrival(0.0, 4, 2)])
    assert [one.arrival.at_s for one in found.served] == [0.0, 100.0]
    assert found.served[0].end_s < 1 < 100 < found.served[1].first_s < 101


@pytest.mark.parametrize("asked", [[], [Arrival(0.0, 0, 4)], [Arrival(0.0, 4, 0)],
                                   [Arrival(0.0, 200, 57)]])  # fmt: skip
def test_what_cannot_be_served_is_refused(asked):
    with pytest.raises(InputError):
        simulation().run(asked)
