"""What an engine refuses, and what it does at the bounds of its sizes."""

import dataclasses

import numpy as np
import pytest

from flora_jax.errors import InputError, RunError
from flora_jax.models.model import init_model
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.request import Request
from tests.helpers.random_adapters import random_adapter
from tests.helpers.tiny_engine import CONFIG, OPTIONS, make_engine

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_requests_that_do_not_fit_are_refused(engine):
    with pytest.raises(InputError, match="unknown adapter 'nobody'"):
        engine.add(Request(0, (1,), adapter="nobody"))
    with pytest.raises(
        InputError, match="request 0: token_ids holds 97, the vocabulary has 0 to 96"
    ):
        engine.add(Request(0, (1, 97)))
    with pytest.raises(InputError, match="97 tokens, expected 1 to 96"):
        engine.add(Request(0, (1,) * 97))
    small = make_engine(cache_tokens=64)
    with pytest.raises(InputError, match="50 tokens and 20 more, the cache holds 64"):
        small.add(Request(0, (1,) * 50, max_tokens=20))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"temperature": float("nan")}, "temperature is nan, expected at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0"),
        ({"top_k": -2}, "top_k is -2, expected at least -1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"seed": 2**32}, "seed is 4294967296, expected"),
        ({"stop_token_ids": tuple(range(9))}, "9 stop_token_ids, at most 8 are served"),
        ({"stop": ("x",)}, "stop strings need a tokenizer"),
        ({"stop": ("",)}, r"stop is \[''\], expected a non-empty string"),
        ({"stop": (3,)}, r"stop is \[3\], expected a non-empty string"),
        ({"stop_token_ids": (97,)}, "stop_token_ids holds 97, the vocabulary has 0 to 96"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids holds -1, the vocabulary has 0 to 96"),
        ({"stop_token_ids": ("x",)}, "stop_token_ids holds 'x', expected integers"),
        ({"token_ids": (1, float("nan"), 2)}, "token_ids holds nan, expected integers"),
        ({"token_ids": (1, 2.5)}, "token_ids holds 2.5, expected integers"),
    ],
)
def test_a_request_that_would_fail_on_the_device_is_refused(changes, message, engine):
    """Inside a step it would take the others with it."""
    with pytest.raises(InputError, match=f"request 3: {message}"):
        engine.add(Request(**{"index": 3, "token_ids": (1, 2)} | changes))
    assert not engine.has_work


@pytest.mark.parametrize("index", [-1, 2**32, 1.0, "3"])
def test_an_index_that_no_seed_can_be_made_of_is_refused(index, engine):
    with pytest.raises(InputError, match=f"request {index}: index is .*, expected"):
        engine.add(Request(index, (1, 2)))
    (completion,) = generate(engine, [Request(2**32 - 1, (np.int64(5), 6), max_tokens=3)])
    assert completion.index == 2**32 - 1


def test_a_ticket_that_is_none_is_refused_where_it_is_given(engine):
    with pytest.raises(TypeError):
        engine.cancel(None)
    ticket = engine.add(Request(0, (1, 2)))
    engine.cancel(np.int64(ticket))
    assert engine.step() == []
    assert not engine.has_work


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_engine_whose_iteration_broke_off_says_so_instead_of_going_on(error, monkeypatch):
    """Tokens that the device has drawn and nobody has fetched would be missing."""
    engine = make_engine()
    engine.add(Request(0, (1, 2), max_tokens=30, ignore_eos=True))
    engine.step()
    decode = engine.device.decode

    def interrupted(*arguments, **options):
        decode(*arguments, **options)
        raise error("now")

    monkeypatch.setattr(engine.device, "decode", interrupted)
    with pytest.raises(error):
        engine.step()
    monkeypatch.undo()
    for use in (engine.step, lambda: engine.add(Request(1, (1, 2)))):
        with pytest.raises(RunError, match=f"iteration broke off .{error.__name__}.'now'.., make"):
            use()


def test_a_request_without_room_that_is_cancelled_at_once_gets_no_update(engine):
    whole = Request(0, (1,) * 96)
    with pytest.raises(InputError, match="unknown adapter"):
        list(generate(engine, [whole, Request(1, (1,), adapter="nobody")]))
    (completion,) = generate(engine, [whole])
    assert completion.token_ids == ()


def test_every_row_has_room_for_the_longest_sequence_by_default():
    engine = make_engine(max_model_len=17, page=16, cache_tokens=None)
    tickets = {engine.add(Request(n, (5,) * 8, max_tokens=9, ignore_eos=True)) for n in range(4)}
    ended = set()
    while engine.has_work:
        ended |= {u.ticket for u in engine.step() if u.completion}
    assert ended == tickets
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize("page", [24, 96, 200])
def test_pages_of_any_size_give_the_same_tokens(page):
    """Also where attention's blocks are not 128 positions."""
    model = init_model(dataclasses.replace(CONFIG, n_positions=400), 5)
    request = Request(0, tuple(np.random.default_rng(0).integers(1, 97, 330).tolist()),
                      max_tokens=60, ignore_eos=True)  # fmt: skip
    found = []
    for size in (16, page):
        options = dataclasses.replace(OPTIONS, max_num_seqs=1, page=size, cache_tokens=None)
        found += generate(Engine(model, options=options), [request])
    assert found[0].token_ids == found[1].token_ids


def test_targets_of_later_adapters_have_room_for_the_largest_of_the_first():
    first = random_adapter("flora", 0, CONFIG.projections(), 2, rank=3, targets=("attn.c_attn",))
    options = dataclasses.replace(OPTIONS, targets=("c_fc",))
    engine = Engine(init_model(CONFIG, 5), {"first": first}, options=options)
    for rank, fits in ((3, True), (4, False)):
        later = random_adapter(
            "flora", rank, CONFIG.projections(), 2, rank=rank, targets=("mlp.c_fc",)
        )
        engine.pool.register("later", later)
        request = Request(0, (5, 6), adapter="later", max_tokens=3, ignore_eos=True)
        if fits:
            assert len(next(generate(engine, [request])).token_ids) == 3
        else:
            with pytest.raises(InputError, match=r"mlp.c_fc has .* at most"):
                list(generate(engine, [request]))
    with pytest.raises(InputError, match="targets are c_fc and max_components is None"):
        Engine(init_model(CONFIG, 5), options=options)


def test_seeds_decide_and_indices_stand_in_for_them(engine):
    base = Request(0, (5, 6, 7), max_tokens=20, temperature=1.5, ignore_eos=True)

    def run(**changes):
        (completion,) = generate(engine, [dataclasses.replace(base, **changes)])
        return completion.token_ids

    assert run(seed=3) == run(seed=3, index=9)
    assert run(seed=3) != run(seed=4)
    assert run() == run()
    assert run() != run(index=1)


def test_prompts_up_to_the_context_are_cut_with_reason_length(engine):
    for length, expected in [(95, 1), (96, 0), (90, 6)]:
        ids = tuple(t % 96 + 1 for t in range(length))
        (completion,) = generate(engine, [Request(0, ids, max_tokens=50, ignore_eos=True)])
        assert len(completion.token_ids) == expected
        assert completion.finish_reason == "length"
