"""After the warm-up nothing is compiled, whatever comes."""

import dataclasses

import jax
import pytest

from flora_jax.models.model import init_model
from flora_jax.serve.ahead import Compilations
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from tests.helpers.random_adapters import random_adapter
from tests.helpers.tiny_engine import CONFIG, OPTIONS, random_request


@pytest.mark.parametrize("committed", [False, True])
def test_nothing_is_compiled_after_the_warm_up(committed):
    """Another model than the other tests', so that nothing is compiled yet. A checkpoint's parameters
    may be committed to a device.
    """
    config = dataclasses.replace(CONFIG, n_embd=24, vocab_size=99)
    adapters = {
        f"{kind}{rank}": random_adapter(kind, rank, config.projections(), 2, rank=rank)
        for kind in ("lora", "flora")
        for rank in (1, 3)
    }
    options = dataclasses.replace(
        OPTIONS, max_num_seqs=3, row_buckets=(3,), batch_invariant=False, host_adapter_bytes=0,
        cache_tokens=100,
    )  # fmt: skip
    new = random_adapter("flora", 9, config.projections(), 2, rank=2)
    model = init_model(config, 0)
    if committed:
        model = model._replace(params=jax.device_put(model.params, jax.devices()[0]))
    engine = Engine(model, adapters, options=options)
    counter = Compilations()
    told = []
    announced = engine.programs
    engine.warm_up(lambda name, done, total: told.append((done, total)))
    assert told == [(done, announced) for done in range(1, announced + 1)]
    assert counter.count > 0
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
