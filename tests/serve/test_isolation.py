"""A request's tokens do not depend on its neighbours, its place, or what the engine does meanwhile."""

import dataclasses
import itertools
import json
import os
import time

import jax.numpy as jnp
import pytest

from flora_jax.errors import InputError
from flora_jax.peft.read import write_adapter
from flora_jax.serve.generate import generate
from tests.helpers.random_adapters import random_adapter
from tests.helpers.requests import make_request, with_settings
from tests.helpers.tiny_engine import (
    CONFIG,
    CONTENTS,
    NAMES,
    TARGETS,
    Alone,
    make_engine,
    random_request,
    run_schedule,
    unscored,
    without_id,
)

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def alone():
    return Alone()


@pytest.mark.parametrize("block", range(8))
def test_any_schedule_gives_every_request_its_tokens_alone(engine, alone, block):
    """2,000 schedules with evictions, preemptions and shared beginnings, samples of one prompt, adapters
    that come and go, log probabilities; bits are equal, so nothing is excused.
    """
    before = engine.stats
    completions = 0
    for seed in range(250):
        for request, content, completion in run_schedule(engine, 1000 * block + seed):
            assert completion == alone(request, content), (block, seed, request)
            completions += 1
    after = engine.stats
    assert completions > 1000
    assert after.preemptions > before.preemptions
    assert after.adapter_evictions > before.adapter_evictions + 100
    assert after.prefix_hits > before.prefix_hits + 1000
    assert (after.running, after.waiting, after.cache_usage) == (0, 0, 0.0)


@pytest.mark.slow
def test_hours_of_schedules(engine, alone):
    """For SCHEDULE_MINUTES, 120 unless told, from SCHEDULE_SEED on; of 10,000 requests to be drawn."""
    end = time.monotonic() + 60 * float(os.environ.get("SCHEDULE_MINUTES", "120"))
    first = int(os.environ.get("SCHEDULE_SEED", "1000000"))
    completions = 0
    for seed in itertools.count(first):
        for request, content, completion in run_schedule(engine, seed, requests=5000):
            assert completion == alone(request, content), (seed, request)
            completions += 1
        if time.monotonic() > end:
            break
    print(f"{seed - first + 1} schedules, {completions} completions")
    assert completions


@pytest.mark.parametrize("merge_prompts", [True, False])
def test_in_the_smallest_shapes_only_near_ties_differ(merge_prompts, alone):
    """Without batch invariance rows are padded as others ask: differences are counted, and rare."""
    engine = make_engine(batch_invariant=False, merge_prompts=merge_prompts)
    found = [result for seed in range(40) for result in run_schedule(engine, seed)]
    differing = sum(
        unscored(completion) != unscored(alone(request, content))
        for request, content, completion in found
    )
    assert len(found) > 200
    assert differing == 0


def test_a_row_whose_logits_are_not_finite_fails_and_harms_nobody(engine, alone):
    """Its pages go to others afterwards, with what it has left there."""
    config = dataclasses.replace(CONFIG)
    sick = random_adapter("lora", 3, config.projections(), 2, rank=1, targets=TARGETS)
    sick.layers[1]["attn.c_attn"].__dict__["up_RO"] = jnp.full_like(
        sick.layers[1]["attn.c_attn"].up_RO, jnp.nan
    )
    run_schedule(engine, 0)
    engine.register("lora1", sick)
    bad = make_request(7, range(1, 50), "lora1", request_id=7, max_tokens=4)
    reason = r"request 7 \(adapter 'lora1': the logits after 0 tokens are not finite in float32\)"
    with pytest.raises(InputError, match=reason):
        list(generate(engine, [bad]))
    for request, content, completion in run_schedule(engine, 1):
        assert completion == alone(request, content)


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_alone(alone, tmp_path):
    engine = make_engine()
    run_schedule(engine, 0)
    folder = tmp_path / "changing"
    write_adapter(CONTENTS["flora1", 0], folder)
    engine.register("changing", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    large = random_adapter("flora", 0, CONFIG.projections(), 2, rank=9, targets=TARGETS)
    engine.register("large", large)
    content = 0
    engine.register("flora4", CONTENTS["flora4", content])
    good = dataclasses.replace(random_request(4), fold_in=10**6, adapter="flora4")
    good = with_settings(good, seed=1)
    tickets = {
        name: engine.add(dataclasses.replace(good, adapter=name))
        for name in ("changing", "flora4", "large")
    }
    ended = {}
    while engine.has_work:
        ended |= {u.request_id: u for u in engine.step() if u.completion or u.error}
    assert "changed since it was registered" in ended[tickets["changing"]].error
    assert "at most" in ended[tickets["large"]].error
    assert without_id(ended[tickets["flora4"]].completion) == alone(good, content)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 16, "prefill_chunks": 3},
        {"block_size": 16},
        {"decode_steps": 1},
        {"decode_seconds": 2e-3},
    ],
)
def test_the_layout_does_not_change_what_a_prompt_means(alone, changes):
    engine = make_engine(**changes)
    requests = [random_request(seed) for seed in range(30)]
    requests = [r for r in requests if not r.sampling_params.temperature]
    for name in NAMES:
        engine.register(name, CONTENTS[name, 0])
    for request, completion in zip(requests, generate(engine, requests), strict=True):
        assert unscored(completion) == unscored(alone(request, 0))
