"""The engine that a load is measured on."""

import numpy as np

from flora_jax.bench.serving import setup
from flora_jax.models.model import init_model
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from tests.helpers.requests import make_request
from tests.helpers.tiny_engine import CONFIG, OPTIONS


def test_a_rehearsal_leaves_none_of_the_measured_prompts_in_the_cache():
    prompts = np.random.default_rng(0).integers(1, 97, (3, 21)).tolist()
    requests = [make_request(0, prompt, max_tokens=2, ignore_eos=True) for prompt in prompts]
    with Engine(init_model(CONFIG, 5), options=OPTIONS) as engine:
        setup.rehearse(engine, requests)
        rehearsed = engine.stats
        list(generate(engine, requests))
        stats = engine.stats
        list(generate(engine, requests))
        again = engine.stats
    assert rehearsed.prefix_queries > 0
    assert stats.prefix_queries - rehearsed.prefix_queries == 3 * 21
    assert stats.prefix_hits == rehearsed.prefix_hits == 0
    assert again.prefix_hits > 0
