"""What lm-eval's ``local-completions`` asks and how it reads the answer, against full forward passes."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests.helpers.http_server import adapters, running, small_engine, small_served

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def server():
    engine = small_engine()
    engine.warm_up()
    with running(lambda report: engine, small_served()) as server:
        server.model = engine.model
        yield server


def ask(server, **fields):
    with server.client() as client:
        answer = client.post("/v1/completions", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def loglikelihoods(server, model, pairs):
    """As lm-eval has them: of each continuation its log-likelihood, and whether it is the greedy one.

    It sends prompt and continuation as one list of ids, several in a request, echoed with the log
    probabilities of all tokens and of each place's likeliest, and leaves out the one token drawn.
    """
    body = ask(
        server, model=model, prompt=[[*context, *rest] for context, rest in pairs], temperature=0,
        max_tokens=1, logprobs=1, seed=1234, echo=True,
    )  # fmt: skip
    found = []
    choices = sorted(body["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(pairs)
    for choice, (context, _) in zip(choices, pairs):
        logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
        top = choice["logprobs"]["top_logprobs"][len(context) : -1]
        greedy = all(one == max(best.values()) for one, best in zip(logprobs, top))
        found.append((sum(logprobs), greedy))
    return found


def expected(server, name, pairs):
    """The same from a full forward pass for each."""
    whole = nnx.merge(server.model.graph, server.model.params)
    layers = None if name == "tiny" else adapters()[name].layers
    # One shape: what comes behind a token changes nothing before it.
    ids_BT = np.zeros((len(pairs), 64), np.int32)
    for row, (context, rest) in enumerate(pairs):
        ids_BT[row, : len(context) + len(rest)] = [*context, *rest]
    forward = jax.jit(lambda ids: jax.nn.log_softmax(whole(ids, adapters=layers), axis=-1))
    found = []
    for (context, rest), logprobs_TV in zip(pairs, np.asarray(forward(ids_BT))):
        places = range(len(context) - 1, len(context) + len(rest) - 1)
        total = sum(logprobs_TV[place, token] for place, token in zip(places, rest))
        greedy = all(logprobs_TV[place].argmax() == token for place, token in zip(places, rest))
        found.append((float(total), greedy))
    return found


@pytest.mark.parametrize("name", ["tiny", "lora", "flora"])
def test_loglikelihoods_are_those_of_full_forward_passes(server, name):
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(1, 257, count).tolist()  # noqa: E731
    pairs = [(draw(context), draw(rest)) for context, rest in ((1, 1), (5, 3), (17, 9), (40, 20))]
    # And one whose continuation is what the model would say.
    greedy = ask(
        server, model=name, prompt=[pairs[2][0]], temperature=0, max_tokens=4, ignore_eos=True,
        return_token_ids=True,
    )  # fmt: skip
    pairs.append((pairs[2][0], greedy["choices"][0]["token_ids"]))
    found, wanted = loglikelihoods(server, name, pairs), expected(server, name, pairs)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=1e-3)
    assert [one for _, one in found] == [one for _, one in wanted]
    assert found[-1][1]


def test_adapters_have_likelihoods_of_their_own(server):
    pairs = [([5, 6, 7], [8, 9, 10])]
    found = [loglikelihoods(server, name, pairs)[0][0] for name in ("tiny", "lora", "flora")]
    assert all(abs(a - b) > 1e-3 for a, b in itertools.combinations(found, 2))


def test_max_tokens_of_0_gives_the_prompts_log_probabilities_alone(server):
    ids = [5, 6, 7, 8]
    fields = dict(model="tiny", prompt=[ids], temperature=0, logprobs=1, echo=True)
    with_one = ask(server, max_tokens=1, **fields)["choices"][0]["logprobs"]
    alone = ask(server, max_tokens=0, **fields)["choices"][0]["logprobs"]
    assert len(alone["token_logprobs"]) == len(ids)
    assert alone["token_logprobs"] == with_one["token_logprobs"][:-1]
    assert alone["token_logprobs"][0] is None


def test_generation_stops_where_a_task_says(server):
    fields = dict(model="lora", prompt=[[5, 6, 7]], temperature=0, seed=1234, max_tokens=24)
    whole = ask(server, stop=["<|endoftext|>"], **fields)["choices"][0]["text"]
    assert len(whole) > 4
    stop = whole[3]
    cut = ask(server, stop=[stop, "<|endoftext|>"], **fields)["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_the_examples_task_is_one_that_lm_eval_can_read():
    lines = (ROOT / "examples/lm_eval/next_line.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert len({entry["prompt"] for entry in entries}) == len(entries) == 16
    for entry in entries:
        assert entry["prompt"].endswith("\n")
        assert len({*entry["choices"]}) == 4
        assert all(choice.endswith("\n") for choice in entry["choices"])
        assert 0 <= entry["answer"] < 4
    # Who always says the same is right in a quarter.
    assert all([entry["answer"] for entry in entries].count(place) == 4 for place in range(4))
