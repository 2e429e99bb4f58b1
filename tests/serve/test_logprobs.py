"""Log probabilities: those of the full forward pass, whoever else asks, however prompts are cut."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from flora_jax.errors import InputError
from flora_jax.mixing.grouped import grouped_hooks
from flora_jax.platforms import CPU, GPU
from flora_jax.serve.generate import generate, run
from tests.helpers.requests import make_request
from tests.helpers.tiny_engine import make_engine

PROMPT = tuple(range(3, 40))
ADAPTERS = ("lora3", "flora4", "ia31", "hira3", "dora3", None)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def engine(request):
    """Not batch-invariant: what those who ask for none have is compared as tokens."""
    platform = {"cpu": CPU, "gpu": GPU}[request.param]
    return make_engine(platform=platform, batch_invariant=False, max_logprobs=5)


def full_pass(engine, adapter, token_ids):
    """Log probabilities ``[T, V]`` of what follows each token, by one pass without a cache."""
    hooks = None
    if adapter is not None:
        layers = engine.registry.current(adapter).source.layers
        hooks = grouped_hooks(jax.tree.map(lambda leaf: np.asarray(leaf)[None], layers))
    model = nnx.merge(engine.model.graph, engine.model.params)
    logits_TV = model(np.asarray([token_ids], np.int32), adapters=hooks)[0]
    return np.asarray(jax.nn.log_softmax(logits_TV), np.float64)


def check(found, token_ids, expected_TV, top):
    """Scores of tokens against the rows of logits that they follow from."""
    assert len(found) == len(token_ids)
    for one, token, row_V in zip(found, token_ids, expected_TV, strict=True):
        assert one.token_id == token
        np.testing.assert_allclose(one.logprob, row_V[token], atol=2e-4)
        assert len(one.top) == top
        likeliest = np.sort(row_V)[::-1][:top]
        np.testing.assert_allclose([value for _, value in one.top], likeliest, atol=2e-4)
        np.testing.assert_allclose(row_V[[t for t, _ in one.top]], likeliest, atol=2e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_they_are_those_of_the_full_forward_pass(engine, adapter):
    request = make_request(
        0, PROMPT, adapter, max_tokens=9, temperature=1.5, logprobs=5, prompt_logprobs=2,
        ignore_eos=True,
    )  # fmt: skip
    (completion,) = generate(engine, [request])
    tokens = [*PROMPT, *completion.token_ids]
    expected_TV = full_pass(engine, adapter, tokens)
    first, *others = completion.prompt_logprobs
    assert first is None
    check(others, PROMPT[1:], expected_TV[: len(PROMPT) - 1], 2)
    check(completion.logprobs, completion.token_ids, expected_TV[len(PROMPT) - 1 : -1], 5)


def test_who_asks_for_none_has_none_and_the_same_tokens(engine):
    asked = [
        make_request(n, PROMPT[: 9 + n], ADAPTERS[n % 6], max_tokens=12, logprobs=n % 3)
        for n in range(8)
    ]
    plain = [
        dataclasses.replace(
            r, sampling_params=dataclasses.replace(r.sampling_params, logprobs=None)
        )
        for r in asked
    ]
    mixed = [[a, b][n % 2] for n, (a, b) in enumerate(zip(asked, plain))]
    found = [list(generate(engine, requests)) for requests in (asked, plain, mixed)]
    for one, other, third in zip(*found, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
        assert other.logprobs is None
        assert len(one.logprobs) == len(one.token_ids)
    assert [c.logprobs is None for c in found[2]] == [False, True] * 4
    assert all("logprobs" not in c.to_json() for c in found[1])
    assert found[0][1].to_json()["logprobs"][0].keys() == {"token_id", "logprob", "top"}


def test_updates_bring_them_token_by_token(engine):
    request = make_request(1, PROMPT, max_tokens=11, logprobs=1, prompt_logprobs=0)
    updates = list(run(engine, [request]))
    completion = updates[-1].completion
    told = [one for update in updates for one in update.logprobs or ()]
    assert tuple(told) == completion.logprobs
    assert updates[0].prompt_logprobs == completion.prompt_logprobs
    assert updates[0].queued_s >= 0
    assert all(update.prompt_logprobs is update.queued_s is None for update in updates[1:])


def test_more_than_the_engine_has_programs_for_are_refused(engine):
    with pytest.raises(InputError, match="logprobs is 6, max_logprobs of this engine is 5"):
        engine.add(make_request(0, PROMPT, logprobs=6))
    none = make_engine(max_logprobs=0)
    with pytest.raises(
        InputError, match="prompt_logprobs is 0, max_logprobs of this engine is none"
    ):
        none.add(make_request(0, PROMPT, prompt_logprobs=0))
    with pytest.raises(InputError, match="logprobs is -1, expected at least 0"):
        make_request(0, PROMPT, logprobs=-1)


def test_nothing_is_compiled_for_them_after_the_warm_up():
    engine = make_engine(
        max_logprobs=3, row_buckets=(2,), max_num_seqs=2, platform=CPU.for_one_batch(16)
    )
    engine.warm_up()
    requests = [
        make_request(n, PROMPT, max_tokens=5, logprobs=n, prompt_logprobs=n) for n in range(4)
    ]
    assert len(list(generate(engine, requests))) == 4
    assert engine.compilations.count == 0


def test_a_prompt_that_is_shared_is_read_anew_where_its_own_are_asked_for(engine):
    plain = make_request(2, PROMPT, "flora4", max_tokens=2)
    asked = make_request(2, PROMPT, "flora4", max_tokens=2, prompt_logprobs=1)
    hits = engine.stats.prefix_hits
    (first,) = generate(engine, [plain])
    (again,) = generate(engine, [plain])
    assert engine.stats.prefix_hits > hits
    hits = engine.stats.prefix_hits
    (scored,) = generate(engine, [asked])
    assert engine.stats.prefix_hits == hits
    assert first.token_ids == again.token_ids == scored.token_ids
    assert len(scored.prompt_logprobs) == len(PROMPT)


@pytest.mark.parametrize("adapter", ADAPTERS[::5])
def test_a_prompt_that_fills_the_context_has_all_of_its_own(engine, adapter):
    """Beside others, with tokens asked for that there is no room for; nothing else comes of it."""
    ids = np.random.default_rng(1).integers(1, 97, (2, engine.max_model_len))
    settings = {"max_tokens": 3, "ignore_eos": True, "logprobs": 1}
    full, other = (tuple(own_T.tolist()) for own_T in ids)
    requests = [
        make_request(0, full, adapter, prompt_logprobs=2, **settings),
        make_request(1, other, adapter, **settings),
        make_request(2, other[:-1], adapter, prompt_logprobs=1, **settings),
        make_request(3, full[:-1], adapter, **settings),
    ]
    updates = [*run(engine, requests)]
    found = {update.index: update.completion for update in updates if update.completion}
    one = found[0]
    assert (one.token_ids, one.logprobs, one.finish_reason) == ((), (), "length")
    assert one.prompt_logprobs[0] is None
    check(one.prompt_logprobs[1:], full[1:], full_pass(engine, adapter, full)[:-1], 2)
    told = [u.prompt_logprobs for u in updates if u.index == 0 and u.prompt_logprobs]
    assert told == [one.prompt_logprobs]
    assert (found[1].token_ids, found[1].prompt_logprobs) == ((), None)
    assert len(found[2].prompt_logprobs) == len(other) - 1
    (alone,) = generate(engine, requests[3:])
    assert found[3].token_ids == alone.token_ids
    assert len(alone.token_ids) == 1
    assert engine.stats.running == 0


def test_a_context_of_one_token_has_no_more_to_score():
    engine = make_engine(max_model_len=1)
    (found,) = generate(engine, [make_request(0, (5,), prompt_logprobs=1)])
    assert (found.token_ids, found.prompt_logprobs) == ((), (None,))
