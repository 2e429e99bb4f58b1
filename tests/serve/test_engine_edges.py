"""What an engine refuses, and what it does at the bounds of its sizes."""

import dataclasses

import numpy as np
import pytest

from flora_jax.errors import InputError, RunError
from flora_jax.models.model import init_model
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.stream import Stream, TextDecoder
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.random_adapters import random_adapter
from tests.helpers.requests import make_request
from tests.helpers.tiny_engine import CONFIG, OPTIONS, make_engine

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_requests_that_do_not_fit_are_refused(engine):
    with pytest.raises(InputError, match="unknown adapter 'nobody'"):
        engine.add(make_request(0, (1,), adapter="nobody"))
    with pytest.raises(
        InputError, match="request 0: prompt_token_ids holds 97, the vocabulary has 0 to 96"
    ):
        engine.add(make_request(0, (1, 97), request_id=0))
    with pytest.raises(InputError, match="the prompt has 97 tokens, the context 96"):
        engine.add(make_request(0, (1,) * 97))


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
        ({"stop_token_ids": (-1,)}, "stop_token_ids holds -1, expected integers from 0"),
        ({"stop_token_ids": ("x",)}, "stop_token_ids holds 'x', expected integers"),
        (
            {"prompt_token_ids": (1, float("nan"), 2)},
            "prompt_token_ids holds nan, expected integers",
        ),
        ({"prompt_token_ids": (1, 2.5)}, "prompt_token_ids holds 2.5, expected integers"),
    ],
)
def test_a_request_that_would_fail_on_the_device_is_refused(changes, message, engine):
    """Inside a step it would take the others with it."""
    with pytest.raises(InputError, match=message):
        engine.add(make_request(**{"fold_in": 3, "prompt_token_ids": (1, 2)} | changes))
    assert not engine.has_work


@pytest.mark.parametrize("number", [-1, 2**32, 1.0, "3"])
def test_a_number_to_fold_in_that_no_seed_can_be_made_of_is_refused(number, engine):
    with pytest.raises(InputError, match=r"fold_in is .*, expected"):
        engine.add(make_request(number, (1, 2)))
    (completion,) = generate(engine, [make_request(2**32 - 1, (np.int64(5), 6), max_tokens=3)])
    assert len(completion.token_ids) == 3


def test_a_dispatch_is_as_long_as_it_may_take():
    """One token at a time where a step takes longer, as many as ever where a thousand would not."""
    pieces = {}
    for seconds in (1e-6, 3600.0):
        engine = make_engine(decode_seconds=seconds)
        engine.add(make_request(0, (1, 2), max_tokens=20, ignore_eos=True))
        pieces[seconds] = []
        while engine.has_work:
            pieces[seconds] += [len(update.token_ids) for update in engine.step()]
    assert set(pieces[1e-6]) <= {1, 2}  # The first beside the prompt's.
    assert OPTIONS.decode_steps in pieces[3600.0]
    with pytest.raises(InputError, match=r"decode_seconds is 0, expected above 0"):
        make_engine(decode_seconds=0)


def test_a_request_id_is_the_callers_or_the_engines_and_names_one_request_at_a_time(engine):
    mine = make_request(0, (1, 2), request_id="mine", max_tokens=2, ignore_eos=True)
    assert engine.add(mine) == "mine"
    with pytest.raises(InputError, match="request mine: another request with this id has not"):
        engine.add(mine)
    first = engine.add(make_request(0, (1, 2), max_tokens=2, ignore_eos=True))
    following = first + 1
    taken = dataclasses.replace(mine, request_id=following)
    assert engine.add(taken) == following
    assert engine.add(dataclasses.replace(mine, request_id=None)) not in (first, following)
    ended = []
    while engine.has_work:
        ended += [update.completion.request_id for update in engine.step() if update.completion]
    assert {"mine", first, following} < {*ended}
    assert len(ended) == 4
    assert engine.add(mine) == "mine"
    engine.cancel("mine")
    engine.step()
    assert engine.add(mine) == "mine"
    engine.cancel("mine")
    engine.step()


def test_a_request_id_of_another_type_is_refused_where_it_is_given(engine):
    for wrong in (None, 1.0, True):
        with pytest.raises(TypeError):
            engine.cancel(wrong)
    request_id = engine.add(make_request(0, (1, 2)))
    engine.cancel(np.int64(request_id))
    assert engine.step() == []
    assert not engine.has_work


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_engine_whose_iteration_broke_off_says_so_instead_of_going_on(error, monkeypatch):
    """Tokens that the device has drawn and nobody has fetched would be missing."""
    engine = make_engine()
    engine.add(make_request(0, (1, 2), max_tokens=30, ignore_eos=True))
    engine.step()
    decode = engine.device.decode

    def interrupted(*arguments, **options):
        decode(*arguments, **options)
        raise error("now")

    monkeypatch.setattr(engine.device, "decode", interrupted)
    with pytest.raises(error):
        engine.step()
    monkeypatch.undo()
    for use in (engine.step, lambda: engine.add(make_request(1, (1, 2)))):
        with pytest.raises(RunError, match=f"iteration broke off .{error.__name__}.'now'.., make"):
            use()


def test_a_request_without_room_that_is_cancelled_at_once_gets_no_update(engine):
    whole = make_request(0, (1,) * 96)
    with pytest.raises(InputError, match="unknown adapter"):
        list(generate(engine, [whole, make_request(1, (1,), adapter="nobody")]))
    (completion,) = generate(engine, [whole])
    assert completion.token_ids == ()


def test_every_row_has_room_for_the_longest_sequence_by_default():
    engine = make_engine(max_model_len=17, block_size=16, cache_tokens=None)
    tickets = {
        engine.add(make_request(n, (5,) * 8, max_tokens=9, ignore_eos=True)) for n in range(4)
    }
    ended = set()
    while engine.has_work:
        ended |= {u.request_id for u in engine.step() if u.completion}
    assert ended == tickets
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize("block_size", [24, 96, 200])
def test_blocks_of_any_size_give_the_same_tokens(block_size):
    """Also where attention's own blocks are not 128 positions."""
    model = init_model(dataclasses.replace(CONFIG, n_positions=400), 5)
    request = make_request(0, tuple(np.random.default_rng(0).integers(1, 97, 330).tolist()),
                      max_tokens=60, ignore_eos=True)  # fmt: skip
    found = []
    for size in (16, block_size):
        options = dataclasses.replace(OPTIONS, max_num_seqs=1, block_size=size, cache_tokens=None)
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
        engine.register("later", later)
        request = make_request(0, (5, 6), adapter="later", max_tokens=3, ignore_eos=True)
        if fits:
            assert len(next(generate(engine, [request])).token_ids) == 3
        else:
            with pytest.raises(InputError, match=r"mlp.c_fc has .* at most"):
                list(generate(engine, [request]))
    with pytest.raises(InputError, match="targets are c_fc and max_components is None"):
        Engine(init_model(CONFIG, 5), options=options)


def test_seeds_decide_and_what_is_folded_in_stands_in_for_them(engine):
    def changed(fold_in=0, **settings):
        settings |= {"max_tokens": 20, "temperature": 1.5, "ignore_eos": True}
        return make_request(fold_in, (5, 6, 7), **settings)

    def run(**changes):
        (completion,) = generate(engine, [changed(**changes)])
        return completion.token_ids

    assert run(seed=3) == run(seed=3, fold_in=9)
    assert run(seed=3) != run(seed=4)
    assert run() == run()
    assert run() != run(fold_in=1)


def test_prompts_up_to_the_context_are_cut_with_reason_length(engine):
    for length, expected in [(95, 1), (96, 0), (90, 6)]:
        ids = tuple(t % 96 + 1 for t in range(length))
        (completion,) = generate(engine, [make_request(0, ids, max_tokens=50, ignore_eos=True)])
        assert len(completion.token_ids) == expected
        assert completion.finish_reason == "length"


def test_a_cache_smaller_than_the_context_is_the_context():
    """As a chat asks: for all that the context leaves. It is whole blocks."""
    engine = make_engine(cache_tokens=62)
    assert engine.max_model_len == engine.limits.context == 64
    settings = {"max_tokens": 1000, "ignore_eos": True}
    requests = [make_request(n, (n + 1,) * n, **settings) for n in (3, 50, 64)]
    found = [*generate(engine, requests)]
    assert [len(one.token_ids) for one in found] == [61, 14, 0]
    assert {one.finish_reason for one in found} == {"length"}
    with pytest.raises(InputError, match="has 65 tokens, the context 64 by cache_tokens"):
        engine.add(make_request(0, (1,) * 65, max_tokens=1))
    (whole,) = generate(make_engine(cache_tokens=None), requests[1:2])
    assert whole.token_ids[:14] == found[1].token_ids


def test_a_tokenizers_error_ends_its_own_request_alone(engine, monkeypatch):
    """While tokens come, and where the completion is made."""
    prompts = [tuple(range(first, first + 5)) for first in range(1, 9)]
    settings = {"max_tokens": 9, "ignore_eos": True}
    requests = [make_request(n, prompt, **settings) for n, prompt in enumerate(prompts)]
    expected = list(generate(engine, requests))
    bad = expected[0].token_ids[4]
    own = Engine(engine.model, options=OPTIONS, tokenizer=byte_tokenizer())
    add, completion = TextDecoder.add, Stream.completion

    def faulty_add(decoder, token):
        if token == bad:
            raise OverflowError("no such piece")
        return add(decoder, token)

    def faulty_completion(stream):
        if stream.token_ids == [*expected[1].token_ids]:
            raise ValueError("no such text")
        return completion(stream)

    monkeypatch.setattr(TextDecoder, "add", faulty_add)
    monkeypatch.setattr(Stream, "completion", faulty_completion)
    asked = {own.add(request): one.token_ids for request, one in zip(requests, expected)}
    ended = {}
    while own.has_work:
        ended |= {u.request_id: u for u in own.step() if u.completion or u.error}
    reasons = {update.error for update in ended.values()}
    assert reasons >= {"its tokens have no text: OverflowError: no such piece", None}
    for request_id, token_ids in asked.items():
        if bad in token_ids:
            assert ended[request_id].error.endswith("OverflowError: no such piece")
        elif token_ids == expected[1].token_ids:
            assert ended[request_id].error.endswith("ValueError: no such text")
        else:
            assert ended[request_id].completion.token_ids == token_ids
    assert own.stats.cache_usage == 0
