"""What regression.py runs in turns: engines with their adapters, and programs over them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flora_jax.bench.serving import setup
from flora_jax.bench.serving.drive import run_throughput
from flora_jax.bench.serving.workload import WorkloadOptions
from flora_jax.errors import RunError
from flora_jax.models.family import changed
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Request, SamplingParams

ROWS, LONG, FEW, MANY = (1, 16, 32), 512, 8, 512
CONTEXT = LONG + 128
# Rows that run at once under adapters, and requests of a load, which enter as others end.
BATCH, REQUESTS = 16, 48
CONTENDERS = {
    "flora 1": setup.Contender("flora", 1),
    "flora 8": setup.Contender("flora", 8),
    "lora 8": setup.Contender("lora", 8, ("c_fc",)),
}


def generate(
    engine: Engine, names: Sequence[str | None], prompt: int, new: int
) -> Callable[[], None]:
    """A program: a row for every name, all at once, with a prompt of random tokens."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, engine.config.vocab_size, (len(names), prompt)).tolist()

    def run() -> None:
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        for row, name in enumerate(names):
            engine.add(Request(prompts[row], params, name))
        while engine.has_work:
            engine.wait()
            for update in engine.step():
                if update.error is not None:
                    raise RunError(update.error)

    return run


def step_seconds(
    engine: Engine, names: Sequence[str], prompt: int, dispatches: int
) -> tuple[float, float]:
    """Seconds of a full dispatch of decoding, a row for every name: of the engine's whole iteration,
    and of the device's part alone, the arrays that it is handed and the tokens' way back included.

    Both over the same rows, prefilled before; they take turns, so that both see the same lengths.
    """
    steps = engine.options.decode_steps
    params = SamplingParams(max_tokens=2 * dispatches * steps + 8, ignore_eos=True)
    request_ids = [
        engine.add(Request((1 + row,) * prompt, params, name)) for row, name in enumerate(names)
    ]
    while engine.stats.running < len(names) or any(
        s.stage != "decode" for s in engine.scheduler.running
    ):
        engine.step()
    engine.step()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(dispatches):
        began = time.perf_counter()
        engine.step()
        seconds[0].append(time.perf_counter() - began)
        decode = engine.scheduler.plan(engine.residency).decode
        if decode is None or decode.steps < steps:
            raise RunError("the cache is too small for the bare loop")
        began = time.perf_counter()
        tokens_BN = np.asarray(engine.device.decode(decode).tokens_BN)
        seconds[1].append(time.perf_counter() - began)
        engine.scheduler.landed(decode)
        for sequence, own_N in zip(decode.sequences, tokens_BN, strict=True):
            sequence.stream.add(own_N.tolist())
            engine.scheduler.drew(sequence, sequence.drawn + steps)
    for request_id in request_ids:
        engine.cancel(request_id)
    engine.step()
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def build(preset: str, seed: int) -> tuple[Engine, Engine, dict[str, list[str]]]:
    """An engine without room for adapters, one with an adapter of every contender for each of
    ``REQUESTS``, and their names.
    """
    base = setup.find_base(None, preset)
    wide = changed(base.config, n_positions=max(base.config.n_positions, CONTEXT))
    model = setup.load_base(base._replace(config=wide), "float32", seed)
    adapters: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for title, contender in CONTENDERS.items():
        names[title] = [f"{title}, {n}" for n in range(REQUESTS)]
        adapters |= setup.make_adapters(model.config, contender, names[title], seed)
    # Every call of a program reads the same prompts.
    options = EngineOptions(
        max_num_seqs=BATCH, max_model_len=CONTEXT, row_buckets=(1, BATCH), prefix_caching=False
    )
    alone = dataclasses.replace(options, max_num_seqs=max(ROWS), row_buckets=ROWS)
    return Engine(model, {}, options=alone), Engine(model, adapters, options=options), names


def unmerged(engine: Engine, names: Sequence[str], seed: int) -> Engine:
    """The same with the FLoRAs of rank 8 alone, and no explicit weights in its prompts."""
    adapters = setup.make_adapters(engine.config, CONTENDERS["flora 8"], names, seed)
    options = dataclasses.replace(engine.options, merge_prompts=False)
    return Engine(engine.model, adapters, options=options)


def resident_programs(preset: str, prompt: int, new: int, seed: int) -> dict[str, Any]:
    """The same batch of 16 rows under 8 adapters, in a bank of 8 and among 512 that are there."""
    base = setup.find_base(None, preset)
    model = setup.load_base(base, "float32", seed)
    found = {}
    for resident in (FEW, MANY):
        named = [str(n) for n in range(resident)]
        adapters = setup.make_adapters(model.config, CONTENDERS["flora 8"], named, seed)
        options = EngineOptions(
            max_num_seqs=BATCH,
            max_model_len=prompt + new,
            row_buckets=(BATCH,),
            prefix_caching=False,
        )
        engine = Engine(model, adapters, options=options)
        engine.preload(named)
        rows = named[:FEW] * 2
        found[f"resident {resident}"] = generate(engine, rows, prompt, new)
        found[f"resident {resident} first"] = generate(engine, rows, prompt, 1)
    return found


def mixed(engine: Engine, names: Sequence[str], seed: int) -> Callable[[], Any]:
    """A program: a ShareGPT-like load at an eighth of its lengths, each request under an own adapter."""
    options = WorkloadOptions(num_prompts=len(names), scale=0.125, seed=seed)
    workload, _ = setup.plan_workload(setup.Base("", engine.config, None), options, adapted=False)
    requests = [
        dataclasses.replace(request, adapter=name)
        for request, name in zip(workload.requests, names, strict=True)
    ]

    def run() -> None:
        if run_throughput(engine, requests)["failed"]:
            raise RunError("a request of the load failed")

    return run
