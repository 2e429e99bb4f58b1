"""A row's tokens do not depend on its company or its position."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from random_adapters import KINDS, random_adapter

from flora_jax.adapters.pairs import one_row
from flora_jax.errors import InputError
from flora_jax.serve import steps
from flora_jax.serve.generate import Generator, Shape
from flora_jax.serve.request import Request
from flora_jax.starcoder.config import StarCoderConfig
from flora_jax.starcoder.model import init_model

pytestmark = pytest.mark.usefixtures("optimised")
CONFIG = StarCoderConfig(
    vocab_size=97, n_positions=96, n_embd=32, n_layer=2, n_head=4, n_inner=48,
    eos_token_ids=(0,), initializer_range=0.3,
)  # fmt: skip
# One padded shape for (almost) all tests: programs take longer to compile than to run.
SHAPE = Shape(rows=16, length=96, level=4)
TARGETS = ("attn.c_attn", "mlp.c_proj")


@pytest.fixture(scope="module")
def generator():
    adapters = {
        f"{kind}{rank}": random_adapter(
            kind, rank, CONFIG.projections(), 2, rank=rank, targets=targets
        )
        for kind in KINDS
        for rank, targets in [(1, TARGETS), (5, TARGETS)]
        if kind != "ia3" or rank == 1
    }
    return Generator(init_model(CONFIG, 5), adapters, chunk=16, block=8)


def random_requests(generator, seed, count=16):
    """Greedy and seeded rows, all sampling settings, base and every adapter."""
    rng = np.random.default_rng(seed)
    names = [name for name in generator.bank.slots if name] + [None]
    requests = []
    for index in range(count):
        warm = bool(rng.integers(2))
        requests.append(
            Request(
                index,
                tuple(rng.integers(1, 97, int(rng.integers(1, 50))).tolist()),
                adapter=names[rng.integers(len(names))],
                max_tokens=int(rng.integers(1, 24)),
                temperature=float(rng.choice([0.3, 1.0, 2.0])) if warm else 0.0,
                top_k=int(rng.choice([0, 5])) if seed % 2 else 0,
                top_p=float(rng.choice([1.0, 0.8])) if seed % 2 else 1.0,
                seed=int(rng.integers(1000)) if rng.integers(2) else None,
                ignore_eos=bool(rng.integers(2)),
            )
        )
    return requests


@pytest.mark.parametrize("seed", range(20))
def test_a_row_has_the_same_tokens_alone_and_among_fifteen_others_in_any_position(generator, seed):
    requests = random_requests(generator, seed)
    together = list(generator.generate(requests, shape=SHAPE))
    rng = np.random.default_rng(seed)
    order = rng.permutation(16)
    shuffled = list(generator.generate([requests[i] for i in order], shape=SHAPE))
    assert shuffled == [together[i] for i in order]
    for row in rng.choice(16, 4, replace=False):
        (alone,) = generator.generate([requests[row]], shape=SHAPE)
        assert alone == together[row]


def test_in_another_padded_shape_only_near_ties_differ(generator):
    """Batches of 1 and of 16 round differently: differences are counted, and rare."""
    differing = 0
    for seed in range(3):
        requests = random_requests(generator, seed)
        together = list(generator.generate(requests, shape=SHAPE))
        for request, expected in zip(requests, together):
            shape = generator.shape([request])._replace(length=SHAPE.length)
            (alone,) = generator.generate([request], shape=shape)
            differing += alone.token_ids != expected.token_ids
    assert differing == 0


def test_what_else_is_resident_changes_no_bit_of_a_prefill(generator):
    """The form of a prompt's pass follows from its own adapter."""
    request = Request(0, tuple(range(1, 40)), adapter="flora5", max_tokens=1)
    large = random_adapter("flora", 9, CONFIG.projections(), 2, rank=40, targets=TARGETS)
    flora5 = random_adapter("flora", 5, CONFIG.projections(), 2, rank=5, targets=TARGETS)
    model = init_model(CONFIG, 5)
    caches = []
    for adapters in ({"flora5": flora5}, {"large": large, "flora5": flora5}):
        alone = Generator(model, adapters, chunk=16)
        settings = alone._settings(request)
        state = steps.init_state(CONFIG, 1, 64, jnp.float32)
        state = steps.prefill(
            model.graph, model.params, alone.bank.layers, one_row(alone.bank, "flora5"), state,
            jnp.int32(0), jnp.asarray(request.token_ids[:16]), jnp.int32(0), jnp.int32(16),
            settings, mode="greedy",
        )  # fmt: skip
        caches.append(np.asarray(state.cache[1].k_BSGK))
    np.testing.assert_array_equal(*caches)
    assert np.any(caches[0])


def test_a_row_whose_logits_are_not_finite_is_an_error(generator):
    sick = dataclasses.replace(CONFIG, n_embd=16, n_head=2)
    model = init_model(sick, 0)
    model.params["ln_f"]["bias"] = model.params["ln_f"]["bias"].replace(jnp.full(16, jnp.nan))
    request = Request(3, (5, 6), max_tokens=4)
    with pytest.raises(InputError, match=r"request 3 \(no adapter\): the logits after 0 tokens"):
        list(Generator(model, {}, chunk=16).generate([request]))


def test_requests_that_do_not_fit_are_refused(generator):
    with pytest.raises(InputError, match="unknown adapter 'nobody'"):
        list(generator.generate([Request(0, (1,), adapter="nobody")]))
    with pytest.raises(InputError, match="token ids 1 to 97, the vocabulary has 0 to 96"):
        list(generator.generate([Request(0, (1, 97))]))
    with pytest.raises(ValueError, match=r"the batch needs Shape\(rows=1, length=64"):
        list(generator.generate([Request(0, (1,), max_tokens=40)], shape=Shape(1, 16, 0)))


def test_seeds_decide_and_indices_stand_in_for_them(generator):
    base = Request(0, (5, 6, 7), max_tokens=20, temperature=1.5, ignore_eos=True)

    def run(**changes):
        request = dataclasses.replace(base, **changes)
        return next(generator.generate([request], shape=SHAPE)).token_ids

    assert run(seed=3) == run(seed=3, index=9)
    assert run(seed=3) != run(seed=4)
    assert run() == run()
    assert run() != run(index=1)


def test_programs_stay_within_the_known_bound():
    """Another model than the other tests', so that nothing is compiled yet."""
    config = dataclasses.replace(CONFIG, n_embd=16, n_head=2)
    adapters = {
        f"{kind}{rank}": random_adapter(kind, rank, config.projections(), 2, rank=rank)
        for kind in ("lora", "flora", "hira")
        for rank in (1, 4)
    }
    generator = Generator(init_model(config, 0), adapters, rows=4, chunk=16, block=8)
    before = steps.prefill._cache_size() + steps.decode._cache_size()
    for seed in range(3):
        requests = [
            dataclasses.replace(r, max_tokens=12, token_ids=r.token_ids[:20])
            for r in random_requests(generator, seed)
        ]
        assert len(list(generator.generate(requests))) == 16
    compiled = steps.prefill._cache_size() + steps.decode._cache_size() - before
    assert compiled <= generator.most_programs()
    again = list(generator.generate(requests))
    assert len(again) == 16
    assert steps.prefill._cache_size() + steps.decode._cache_size() - before == compiled


def test_prompts_up_to_the_context_are_cut_with_reason_length(generator):
    for length, expected in [(95, 1), (96, 0), (90, 6)]:
        request = Request(0, tuple(range(1, length + 1)), max_tokens=50, ignore_eos=True)
        request = dataclasses.replace(
            request, token_ids=tuple(t % 96 + 1 for t in request.token_ids)
        )
        (completion,) = generator.generate([request], shape=SHAPE)
        assert len(completion.token_ids) == expected
        assert completion.finish_reason == "length"


def test_a_chunk_length_does_not_change_what_a_prompt_means(generator):
    requests = [r for r in random_requests(generator, 3) if not r.temperature]
    expected = [c.token_ids for c in generator.generate(requests, shape=SHAPE)]
    other = Generator(init_model(CONFIG, 5), {}, chunk=64)
    other.bank = generator.bank
    assert [c.token_ids for c in other.generate(requests, shape=SHAPE)] == expected
