"""An engine over a tiny random model with adapters of all kinds, two contents for each name."""

import dataclasses

import numpy as np
import pytest

from flora_jax.errors import InputError
from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from tests.helpers.random_adapters import KINDS, random_adapter
from tests.helpers.requests import make_request

CONFIG = StarCoderConfig(
    vocab_size=97, n_positions=96, n_embd=16, n_layer=2, n_head=2, n_inner=32,
    eos_token_ids=(0,), initializer_range=0.4,
)  # fmt: skip
TARGETS = ("attn.c_attn", "mlp.c_proj")
OPTIONS = EngineOptions(
    max_num_seqs=4, max_num_batched_tokens=40, chunk=8, prefill_chunks=2, block_size=4, cache_tokens=128,
    decode_steps=5, resident_adapters=2, host_adapter_bytes=20_000, batch_invariant=True,
    max_logprobs=2,
)  # fmt: skip
# Two contents for each name: schedules replace one by the other.
CONTENTS = {
    (f"{kind}{rank}", content): random_adapter(
        kind, 10 * content + rank, CONFIG.projections(), 2, rank=rank, targets=targets
    )
    for kind in (*KINDS, "dora")
    for rank, targets in [(1, TARGETS), (4, TARGETS), (3, TARGETS[:1])]
    for content in range(2)
    if kind != "ia3" or rank == 1
}
NAMES = sorted({name for name, _ in CONTENTS})


def make_engine(content=0, platform=None, **changes):
    first = {name: CONTENTS[name, content] for name in NAMES}
    options = dataclasses.replace(OPTIONS, **changes)
    return Engine(init_model(CONFIG, 5), first, options=options, platform=platform)


# What many prompts begin with, so that they can share blocks.
BEGINNINGS = np.random.default_rng(97).integers(1, 97, (2, 59))


def random_request(seed, sample=0):
    """One of many kinds: greedy and seeded, all sampling settings, log probabilities or none, base and
    every adapter, prompts that begin alike; ``sample``: another of the same prompt.
    """
    rng = np.random.default_rng(seed)
    warm = bool(rng.integers(2))
    prompt = rng.integers(1, 97, int(rng.integers(1, 60)))
    if seed % 3:
        shared = int(rng.integers(len(prompt) + 1))
        prompt[:shared] = BEGINNINGS[seed % 2][:shared]
    own = int(rng.integers(1000)) + sample if rng.integers(2) else None
    return make_request(
        seed + 10_000 * sample,
        tuple(prompt.tolist()),
        adapter=[*NAMES, None][rng.integers(len(NAMES) + 1)],
        max_tokens=int(rng.integers(1, 30)),
        temperature=float(rng.choice([0.3, 1.0, 2.0])) if warm else 0.0,
        top_k=int(rng.choice([0, 5])) if seed % 2 else 0,
        top_p=float(rng.choice([1.0, 0.8])) if seed % 2 else 1.0,
        seed=own,
        ignore_eos=bool(rng.integers(2)),
        logprobs=seed % 4 - 1 if seed % 4 else None,
        prompt_logprobs=1 if seed % 10 == 5 else None,
    )


def without_id(completion):
    """What two runs of a request have in common."""
    return dataclasses.replace(completion, request_id=None)


def unscored(completion):
    """What is the same to the token where shapes, and so the last bits, differ."""
    return dataclasses.replace(without_id(completion), logprobs=None, prompt_logprobs=None)


class Alone:
    """Completions of single rows, each run by itself in an engine of its own that shares no blocks."""

    def __init__(self, **changes):
        changes = {"prefix_caching": False} | changes
        self.engines = {content: make_engine(content, **changes) for content in range(2)}
        self.known = {}

    def __call__(self, request, content):
        key = request.fold_in, content
        if key not in self.known:
            (completion,) = generate(self.engines[content], [request])
            self.known[key] = without_id(completion)
        return self.known[key]


ACTIONS = (
    *["add"] * 6, "samples", *["cancel", "replace"] * 2, *["step"] * 4, "unload",
)  # fmt: skip


def run_schedule(engine, seed, requests=150):
    """Arrivals of prompts and of several samples of one, cancellations, replacements, unloaded adapters
    and steps in a random order, then to the end.

    Returns the completions with the content that each was admitted under, and how many failed.
    """
    rng = np.random.default_rng(seed)
    current = {}
    for name in NAMES:
        current[name] = int(rng.integers(2))
        engine.register(name, CONTENTS[name, current[name]])
    live, results = {}, []

    def step():
        for update in engine.step():
            assert update.error is None
            if update.completion is not None:
                completion = without_id(update.completion)
                results.append((*live.pop(update.request_id), completion))

    for _ in range(int(rng.integers(4, 14))):
        action = rng.choice(
            ["add"] * 6 + ["samples"] + ["cancel", "replace"] * 2 + ["step"] * 4 + ["unload"]
        )
        if action in ("add", "samples"):
            seed_of = rng.integers(requests)
            for sample in range(int(rng.integers(1, 4))):
                if action == "add":
                    seed_of, sample = rng.integers(requests), 0
                request = random_request(int(seed_of), sample)
                content = current.get(request.adapter, 0)
                if request.adapter is not None and request.adapter not in current:
                    with pytest.raises(InputError, match="unknown adapter"):
                        engine.add(request)
                    continue
                live[engine.add(request)] = request, content
        elif action == "cancel" and live:
            ticket = int(rng.choice(list(live)))
            engine.cancel(ticket)
            del live[ticket]
        elif action == "replace":
            name = NAMES[rng.integers(len(NAMES))]
            current[name] = 1 - current.get(name, 0)
            engine.register(name, CONTENTS[name, current[name]])
        elif action == "unload":
            name = NAMES[rng.integers(len(NAMES))]
            if current.pop(name, None) is not None:
                engine.unregister(name)
        else:
            step()
    while engine.has_work:
        engine.wait()
        step()
    assert not live
    return results
