"""What the engine shares of prompts and what it must not; test_isolation has that bits stay the same."""

import pytest

from flora_jax.serve.generate import generate
from tests.helpers.requests import make_request
from tests.helpers.tiny_engine import CONTENTS, make_engine, without_id

PROMPT = tuple(range(3, 33))  # 30 tokens: seven blocks of 4, and 2 more.

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def engine():
    return make_engine(batch_invariant=False)


@pytest.fixture(scope="module")
def unshared():
    return make_engine(batch_invariant=False, prefix_caching=False)


def shared_by(engine, requests):
    """How many prompt tokens of these requests were not prefilled, and their completions."""
    before = engine.stats.prefix_hits
    found = [without_id(one) for one in generate(engine, requests)]
    return engine.stats.prefix_hits - before, found


def test_samples_of_a_prompt_prefill_it_once_and_draw_their_own_tokens(engine, unshared):
    requests = [
        make_request(n, PROMPT, "flora4", max_tokens=9, temperature=1.0, ignore_eos=True)
        for n in range(9)
    ]
    hits, found = shared_by(engine, requests)
    assert hits == 8 * len(PROMPT)
    assert found == [without_id(one) for one in generate(unshared, requests)]
    assert len({one.token_ids for one in found}) > 4
    assert unshared.stats.prefix_queries == unshared.stats.prefix_hits == 0


def test_who_goes_on_with_a_conversation_finds_the_answer_too(engine, unshared):
    first = make_request(0, PROMPT[::-1], "lora3", max_tokens=12, ignore_eos=True)
    _, (answer,) = shared_by(engine, [first])
    further = make_request(1, (*PROMPT[::-1], *answer.token_ids, 5, 6), "lora3", max_tokens=6)
    hits, found = shared_by(engine, [further])
    # The last token's keys are not there: 41 positions, ten blocks.
    assert hits == 40
    assert found == [without_id(one) for one in generate(unshared, [further])]


def test_bits_of_decoding_are_not_shared_where_they_have_to_be_the_same():
    engine = make_engine()
    first = make_request(0, PROMPT, max_tokens=12, ignore_eos=True)
    _, (answer,) = shared_by(engine, [first])
    further = make_request(1, (*PROMPT, *answer.token_ids, 5, 6), max_tokens=6)
    hits, _ = shared_by(engine, [further])
    assert hits == 16  # Whole long chunks.


def test_only_equal_content_shares_whatever_its_name(engine, unshared):
    def asked(name):
        return [make_request(0, PROMPT[5:], name, max_tokens=4)]

    assert shared_by(engine, asked("hira3"))[0] == 0
    assert shared_by(engine, asked("hira4"))[0] == 0
    assert shared_by(engine, asked(None))[0] == 0
    engine.register("twin", CONTENTS["hira3", 0])
    assert shared_by(engine, asked("twin"))[0] == 25
    engine.register("hira3", CONTENTS["hira3", 1])
    hits, (new,) = shared_by(engine, asked("hira3"))
    assert hits == 0
    unshared.register("hira3", CONTENTS["hira3", 1])
    (expected,) = generate(unshared, asked("hira3"))
    assert new == without_id(expected)


def test_what_was_shared_leaves_when_the_cache_is_needed(engine):
    asked = [make_request(0, PROMPT[7:], max_tokens=2)]
    assert shared_by(engine, asked)[0] == 0
    assert shared_by(engine, asked)[0] == 23
    others = [make_request(n, [n + 1] * 60, max_tokens=30, ignore_eos=True) for n in range(4)]
    shared_by(engine, others)
    hits, _ = shared_by(engine, asked)
    assert hits < 23
    assert engine.stats.cache_usage == 0
