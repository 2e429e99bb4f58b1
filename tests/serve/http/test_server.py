"""A whole server over a small real engine with an adapter of every kind: what clients send and get."""

import asyncio
import concurrent.futures
import json
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flora_jax.peft.write import write_adapter
from flora_jax.serve.generate import generate
from flora_jax.serve.http.schemas import ChatCompletion, Completion
from flora_jax.serve.http.settings import Settings
from flora_jax.serve.request import Request, SamplingParams
from tests.helpers.http_server import (
    CONFIG,
    FIM,
    KINDS,
    MAX_LOGPROBS,
    RANK,
    TARGETS,
    running,
    small_engine,
    small_served,
    tokenizer,
)
from tests.helpers.random_adapters import random_adapter

API, ADMIN = {"Authorization": "Bearer user"}, {"Authorization": "Bearer admin"}
TOKENS = tokenizer()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where adapters that are loaded later lie."""
    root = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        write_adapter(
            random_adapter(kind, 8, CONFIG.projections(), 2, rank=RANK, targets=TARGETS),
            root / kind,
        )
    other = random_adapter("lora", 8, CONFIG.projections(), 2, rank=RANK, targets=("mlp.c_fc",))
    write_adapter(other, root / "unreserved")
    return root


@pytest.fixture(scope="module")
def server(root):
    settings = Settings(("user",), ("admin",), root, RANK, max_body_bytes=100_000)

    def make(report):
        engine = small_engine()
        engine.warm_up(report)
        return engine

    with running(make, settings=settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with server.client(headers=API) as found:
        yield found


@pytest.fixture(scope="module")
def alone():
    """What the engine gives a request without a server."""
    engine = small_engine()

    def run(prompt, adapter=None, **settings):
        ids = TOKENS.encode(prompt).ids if isinstance(prompt, str) else prompt
        request = Request(ids, SamplingParams(**settings), adapter)
        (completion,) = generate(engine, [request])
        return completion

    yield run
    engine.close()


def complete(client, **body):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    Completion.model_validate(response.json())
    return response.json()


def stream(client, path="/v1/completions", **body):
    """The chunks of a stream."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def joined(chunks):
    """The text of each choice."""
    texts = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_models_are_the_base_by_each_name_and_its_adapters(client):
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("tiny", None), ("alias", None), *((kind, "tiny") for kind in KINDS),
    ]  # fmt: skip
    assert cards[0]["root"] == "models/tiny"
    assert {card["max_model_len"] for card in cards} == {96}
    assert client.get("/v1/models/alias").json() == cards[1]
    assert client.get("/v1/models/tiny:hira").json() == cards[2 + KINDS.index("hira")]
    assert client.get("/v1/models/none/such").status_code == 404


@pytest.mark.parametrize("model", ["tiny", "alias", *KINDS, "tiny:lora", "alias:flora"])
def test_every_name_has_the_text_of_the_engine_alone(client, alone, model):
    adapter = model.rpartition(":")[2]
    adapter = None if adapter in ("tiny", "alias") else adapter
    found = complete(client, model=model, prompt="abc def", max_tokens=12, temperature=0)
    expected = alone("abc def", adapter, max_tokens=12)
    choice = found["choices"][0]
    assert found["model"] == model
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert found["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": len(expected.token_ids),
        "total_tokens": expected.prompt_tokens + len(expected.token_ids),
    }


def test_prompts_of_every_form_come_back_in_order(client, alone):
    texts = ["abc", "x y z", "hello"]
    ids = [TOKENS.encode(text).ids for text in texts]
    settings = {"model": "hira", "max_tokens": 8, "temperature": 0}
    expected = [alone(text, "hira", max_tokens=8).text for text in texts]
    for prompt in (texts, ids):
        choices = complete(client, prompt=prompt, **settings)["choices"]
        assert [choice["text"] for choice in choices] == expected
        assert [choice["index"] for choice in choices] == [0, 1, 2]
    for prompt in (texts[0], ids[0]):
        (choice,) = complete(client, prompt=prompt, **settings)["choices"]
        assert choice["text"] == expected[0]


def test_choices_have_seeds_that_follow_each_other(client, alone):
    found = complete(
        client, model="lora", prompt=["abc", "de"], n=3, seed=2**32 - 2, temperature=1.5,
        max_tokens=8, return_token_ids=True,
    )  # fmt: skip
    expected = [
        alone(prompt, "lora", max_tokens=8, temperature=1.5, seed=seed).token_ids
        for prompt in ("abc", "de")
        for seed in (2**32 - 2, 2**32 - 1, 0)
    ]
    assert [tuple(choice["token_ids"]) for choice in found["choices"]] == expected
    assert found["usage"]["prompt_tokens"] == 1 + 2  # "abc" is one token; each prompt counts once.
    assert len({choice["text"] for choice in found["choices"][:3]}) > 1


def test_choices_without_a_seed_differ(client):
    found = complete(client, model="tiny", prompt="abc", n=4, temperature=2.0, max_tokens=12)
    assert len({choice["text"] for choice in found["choices"]}) > 1


def test_a_stream_has_the_text_of_the_whole_answer(client):
    body = {
        "model": "flora", "prompt": ["abc", "q"], "n": 2, "seed": 5, "temperature": 1.0,
        "max_tokens": 20,
    }  # fmt: skip
    whole = complete(client, **body)
    chunks = stream(client, **body, stream_options={"include_usage": True})
    for chunk in chunks:
        Completion.model_validate(chunk)
    assert joined(chunks) == {c["index"]: c["text"] for c in whole["choices"]}
    reasons = {
        choice["index"]: choice["finish_reason"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }
    assert reasons == {c["index"]: c["finish_reason"] for c in whole["choices"]}
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in stream(client, **body))


def test_a_stop_string_ends_the_text_before_it(client, alone):
    text = alone("abc", "flora", max_tokens=30, ignore_eos=True).text
    stop = text[5:7]
    found = complete(
        client,
        model="flora",
        prompt="abc",
        max_tokens=30,
        temperature=0,
        stop=stop,
        ignore_eos=True,
    )
    assert found["choices"][0]["text"] == text[: text.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"


def test_an_echo_begins_with_the_prompt(client):
    settings = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    plain = complete(client, prompt="abc é", **settings)["choices"][0]["text"]
    for prompt in ("abc é", TOKENS.encode("abc é").ids):
        assert complete(client, prompt=prompt, echo=True, **settings)["choices"][0]["text"] == (
            "abc é" + plain
        )
    chunks = stream(client, prompt="abc é", echo=True, **settings)
    assert joined(chunks) == {0: "abc é" + plain}
    only = complete(client, model="tiny", prompt="abc é", echo=True, max_tokens=0)
    assert only["choices"][0]["text"] == "abc é"
    assert only["usage"]["completion_tokens"] == 0


def test_logprobs_are_the_engines_with_the_prompts_where_it_is_echoed(client, alone):
    prompt = "abc é"
    ids = TOKENS.encode(prompt).ids
    expected = alone(prompt, "dora", max_tokens=6, logprobs=2, prompt_logprobs=2)
    body = {
        "model": "dora", "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 2,
        "echo": True,
    }  # fmt: skip
    choice = complete(client, **body)["choices"][0]
    told = choice["logprobs"]
    values = [None if one is None else one.logprob for one in expected.prompt_logprobs]
    values += [one.logprob for one in expected.logprobs]
    assert told["token_logprobs"] == pytest.approx(values)
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    assert len(told["tokens"]) == len(ids) + len(expected.token_ids)
    assert told["tokens"][:2] == ["abc", " "]
    for one, top in zip(expected.logprobs, told["top_logprobs"][len(ids) :]):
        assert 2 <= len(top) <= 3
        assert max(top.values()) == pytest.approx(one.top[0][1])
    for token, offset in zip(told["tokens"], told["text_offset"]):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][offset:].startswith(token)
    parts = [chunk["choices"][0]["logprobs"] for chunk in stream(client, **body)]
    for name, whole in told.items():
        assert [one for part in parts for one in part[name]] == whole


def test_offsets_of_an_echo_count_the_special_tokens_that_it_has(client):
    """A prompt of text is echoed as it came, one of ids without its special tokens."""
    prompt = "<|endoftext|>def é<|im_start|> <|im_end|><fim_prefix>🙂(x):"
    encoded = TOKENS.encode(prompt)
    body = {"model": "tiny", "temperature": 0, "logprobs": 1, "echo": True}
    for settings in ({"max_tokens": 0}, {"max_tokens": 4}):
        choice = complete(client, prompt=prompt, **body, **settings)["choices"][0]
        told = choice["logprobs"]
        begins = [begin for begin, _ in encoded.offsets]
        assert told["text_offset"][: len(encoded.ids)] == begins
        assert told["text_offset"][len(encoded.ids) :][:1] in ([], [len(prompt)])
        for token, offset in zip(told["tokens"], begins):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
        chunks = stream(client, prompt=prompt, **body, **settings)
        parts = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
        assert [one for part in parts for one in part] == told["text_offset"]
    choice = complete(client, prompt=encoded.ids, max_tokens=0, **body)["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == "def é 🙂(x):"
    for token, offset in zip(told["tokens"], told["text_offset"]):
        if not token.startswith(("bytes:", "<|", "<fim")):
            assert choice["text"][offset:].startswith(token)


def test_a_gap_is_filled_between_its_marks(client):
    prefix, suffix, middle = (TOKENS.token_to_id(mark) for mark in FIM)
    ids = [prefix, *TOKENS.encode("abc").ids, suffix, *TOKENS.encode("xy").ids, middle]
    settings = {"model": "lora", "temperature": 0, "max_tokens": 6}
    by_hand = complete(client, prompt=ids, **settings)
    found = complete(client, prompt="abc", suffix="xy", **settings)
    assert found["choices"][0]["text"] == by_hand["choices"][0]["text"]
    assert found["usage"] == by_hand["usage"]


def chat(client, **body):
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json())
    return response.json()


def test_a_chat_is_what_the_template_makes_of_it(client, alone):
    messages = [{"role": "user", "content": "hi"}]
    text = "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected = alone(text, "flora", max_tokens=6, logprobs=1)
    found = chat(
        client, model="flora", messages=messages, max_completion_tokens=6, temperature=0,
        logprobs=True, top_logprobs=1,
    )  # fmt: skip
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    content = choice["logprobs"]["content"]
    assert [one["logprob"] for one in content] == pytest.approx(
        [one.logprob for one in expected.logprobs]
    )
    assert all(len(one["top_logprobs"]) == 1 for one in content)
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]
    again = chat(client, model="flora", messages=parts, max_tokens=6, temperature=0)
    assert again["choices"][0]["message"]["content"] == expected.text
    whole = chat(client, model="flora", messages=messages, temperature=0)
    assert whole["usage"]["total_tokens"] <= 96
    chunks = stream(
        client,
        "/v1/chat/completions",
        model="flora",
        messages=messages,
        max_tokens=6,
        temperature=0,
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.get("content", "") for delta in deltas) == expected.text


def test_tokens_and_their_texts_go_both_ways(client):
    found = client.post("/tokenize", json={"prompt": "abc é", "return_token_strs": True}).json()
    assert found["tokens"] == TOKENS.encode("abc é").ids
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 96)
    assert found["token_strs"] == ["abc", " ", "bytes:\\xc3", "bytes:\\xa9"]
    text = client.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert text == {"prompt": "abc é"}
    messages = client.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "a"}]}
    ).json()
    assert messages["count"] > 10


LONG = "x" * 200
HUGE = 10**40


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt: expected a string"),
        ({"prompt": [[]]}, "prompt: expected a string"),
        ({"prompt": [1, "a"]}, "prompt: expected a string"),
        ({"prompt": [1.5]}, "prompt: expected a string"),
        ({"prompt": [-1]}, "prompt: expected a string"),
        ({"prompt": [True]}, "prompt: expected a string"),
        ({"prompt": {}}, "prompt: expected a string"),
        ({"prompt": None}, "prompt: expected a string"),
        ({"prompt": [500]}, "prompt_token_ids holds 500, the vocabulary has 0 to 263"),
        ({"prompt": LONG}, "the prompt has 200 tokens, the context 96"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens: input should be greater than or equal to 0"),
        ({"max_tokens": HUGE}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens: input should be a valid integer"),
        ({"max_tokens": "3"}, "max_tokens: input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: input should be a valid integer"),
        ({"temperature": -1}, "temperature: input should be greater"),
        ({"temperature": HUGE}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature: input should be a valid number"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n: input"),
        ({"n": 129}, "n: input"),
        ({"n": 100}, "100 choices are asked for, at most 68"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"stop": ""}, "stop: expected a non-empty string"),
        ({"stop": ["a"] * 17}, "stop: expected a non-empty string"),
        ({"stop": [1]}, "stop: expected a non-empty string"),
        ({"stop_token_ids": [264]}, "stop_token_ids holds 264"),
        ({"stop_token_ids": list(range(9))}, "stop_token_ids"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs is 4, this server gives at most 3"),
        ({"logprobs": True}, "logprobs: input should be a valid integer"),
        ({"best_of": 2}, "best_of is 2, only n itself (1) is served"),
        ({"presence_penalty": 0.5}, "presence_penalty: only 0 or null is served, found 0.5"),
        ({"frequency_penalty": False}, "frequency_penalty: only 0 or null is served, found False"),
        ({"logit_bias": {"1": 5}}, "logit_bias: not served"),
        ({"stream_options": {"include_usage": True}}, "stream_options are for stream true alone"),
        ({"stream": True, "stream_options": {"other": 1}}, "unknown field 'stream_options.other'"),
        ({"suffix": "a", "echo": True}, "echo and suffix"),
        ({"suffix": "a", "prompt": [1]}, "suffix is given and prompt has token ids"),
        ({"no_such_field": 1}, "unknown field 'no_such_field'"),
        ({"\ud800": 1}, "\\ud800"),
        ({"model": 3}, "model: input should be a valid string, found 3"),
        ({"model": None}, "model"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(client, changes, words):
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 1} | changes
    text = json.dumps(body)
    response = client.post(
        "/v1/completions", content=text, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content, status, words",
    [
        (b"", 400, "the body is missing"),
        (b"{", 400, "malformed JSON at character 1"),
        (b"[]", 400, "the body: input should be a valid dictionary"),
        (b"null", 400, "the body"),
        (b'"text"', 400, "the body"),
        (b"\xff\xfe", 400, ""),
        (b"[" * 50_000, 400, ""),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b'{"model": "tiny", "prompt": "' + b"x" * 10_000_000 + b'"}', 413, "at most 100000"),
    ],
)
def test_a_body_that_is_none_is_refused(client, content, status, words):
    response = client.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "given, found",
    [
        ("application/x-www-form-urlencoded", "is application/x-www-form-urlencoded"),
        ("text/plain; charset=utf-8", "is text/plain; charset=utf-8"),
        (None, "is missing"),
    ],
)
def test_a_body_that_is_not_called_json_is_told_so(client, given, found):
    headers = {} if given is None else {"Content-Type": given}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        response = client.post(path, content=b'{"model": "tiny", "prompt": "abc"}', headers=headers)
        assert response.status_code == 400
        message = f"Content-Type {found}, expected application/json"
        assert response.json()["error"]["message"] == message


def test_a_large_body_without_a_length_is_refused(client):
    def parts():
        for _ in range(200):
            yield b"x" * 1000

    response = client.post(
        "/v1/completions", content=parts(), headers={"Content-Type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


CHAT = "/v1/chat/completions"


def said(content, role="user"):
    """A chat's request."""
    return {"model": "tiny", "messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("POST", "/v1/completions", {"model": "other", "prompt": "a"}, 404),
        ("POST", "/v1/completions", {"model": "tiny:other", "prompt": "a"}, 404),
        ("POST", "/v1/completions", {"model": "other:lora", "prompt": "a"}, 404),
        ("POST", CHAT, said("") | {"model": "\ud800"}, 404),
        ("POST", CHAT, said("") | {"messages": []}, 400),
        ("POST", CHAT, said("", role="tool"), 400),
        ("POST", CHAT, said(None), 400),
        ("POST", CHAT, said([{"type": "image_url", "image_url": "a"}]), 400),
        ("POST", CHAT, said("") | {"top_logprobs": 1}, 400),
        ("POST", CHAT, said("x" * 200), 400),
        ("POST", "/tokenize", {}, 400),
        ("POST", "/tokenize", {"prompt": "a", "messages": []}, 400),
        ("POST", "/tokenize", {"prompt": "\ud800"}, 400),
        ("POST", "/detokenize", {"tokens": [264]}, 400),
        ("POST", "/detokenize", {"tokens": [2**70]}, 400),
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("DELETE", "/health", None, 405),
        ("POST", "/v1/models", {}, 405),
        ("BREW", "/v1/models", None, 405),
    ],
)  # fmt: skip
def test_every_refusal_has_openais_shape(client, method, path, body, status):
    content = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    response = client.request(method, path, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in response.headers) == (status == 405)


def test_a_model_without_a_chat_template_says_so(server):
    import dataclasses

    from flora_jax.checkpoints.chat import Chat
    from flora_jax.serve.http.chat import chat_job
    from flora_jax.serve.http.schemas import ChatRequest
    from flora_jax.serve.request import RequestError

    served = small_served(chat=Chat("tiny"))
    body = ChatRequest(model="tiny", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(RequestError, match="tiny: has no chat template"):
        asyncio.run(chat_job(body, server.runner, served))
    assert dataclasses.is_dataclass(served)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize", "/v1/nowhere"])
def test_who_has_no_key_learns_nothing(server, path):
    with server.client() as stranger:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            response = stranger.post(path, content=b"{", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"


def test_what_is_open_needs_no_key(server):
    with server.client() as stranger:
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert stranger.get(path).status_code == 200


def admin(client, what, headers=ADMIN, **body):
    return client.post(f"/v1/{what}_lora_adapter", json=body, headers=headers)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_used_replaced_and_unloaded(client, root, alone, kind):
    loaded = admin(client, "load", lora_name="late", lora_path=kind)
    assert loaded.status_code == 200, loaded.text
    assert (loaded.json()["lora_name"], loaded.json()["state"]) == ("late", "resident")
    body = {"model": "late", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    text = complete(client, **body)["choices"][0]["text"]
    twice = admin(client, "load", lora_name="late", lora_path=kind)
    assert (twice.status_code, twice.json()["error"]["code"]) == (400, "already_loaded")
    other = KINDS[KINDS.index(kind) - 1]
    replaced = admin(client, "load", lora_name="late", lora_path=other, load_inplace=True)
    assert replaced.status_code == 200
    assert complete(client, **body)["choices"][0]["text"] != text
    assert admin(client, "unload", lora_name="late").status_code == 200
    gone = client.post("/v1/completions", json=body)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert admin(client, "unload", lora_name="late").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {"lora_name": "..", "lora_path": "lora"},
        {"lora_name": "a/../b", "lora_path": "lora"},
        {"lora_name": "", "lora_path": "lora"},
        {"lora_name": "a\nb", "lora_path": "lora"},
        {"lora_name": "x" * 200, "lora_path": "lora"},
        {"lora_name": "tiny", "lora_path": "lora"},
        {"lora_name": "a:b", "lora_path": "lora"},
        {"lora_name": "new", "lora_path": "../lora"},
        {"lora_name": "new", "lora_path": "/etc"},
        {"lora_name": "new", "lora_path": "nowhere"},
        {"lora_name": "new", "lora_path": "unreserved"},
        {"lora_name": "new"},
        {"lora_name": 1, "lora_path": 2},
    ],
)
def test_what_cannot_be_loaded_leaves_nothing_behind(client, body):
    refused = admin(client, "load", **body)
    assert refused.status_code == 400, refused.text
    assert "new" not in [card["id"] for card in client.get("/v1/models").json()["data"]]


def test_a_replacement_that_does_not_fit_leaves_what_was_there(client):
    assert admin(client, "load", lora_name="late", lora_path="lora").status_code == 200
    body = {"model": "late", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    before = complete(client, **body)["choices"]
    refused = admin(client, "load", lora_name="late", lora_path="unreserved", load_inplace=True)
    assert refused.status_code == 400
    assert complete(client, **body)["choices"] == before
    admin(client, "unload", lora_name="late")


def test_loading_wants_the_admins_key(client):
    body = {"lora_name": "new", "lora_path": "lora"}
    assert admin(client, "load", API, **body).status_code == 403
    assert admin(client, "unload", {"Authorization": "Bearer x"}, **body).status_code == 401


def openai_client(server, kind=openai.OpenAI):
    return kind(base_url=f"{server.url}/v1", api_key="user", max_retries=0)


def test_the_official_client_completes_chats_lists_and_streams(server, alone):
    with openai_client(server) as official:
        assert "flora" in [card.id for card in official.models.list()]
        found = official.completions.create(
            model="flora", prompt="abc", max_tokens=8, temperature=0, user="someone",
            presence_penalty=0, logit_bias={},
        )  # fmt: skip
        expected = alone("abc", "flora", max_tokens=8)
        assert found.choices[0].text == expected.text
        parts = official.completions.create(
            model="flora", prompt="abc", max_tokens=8, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == expected.text
        answer = official.chat.completions.create(
            model="lora", messages=[{"role": "user", "content": "hi"}], max_tokens=4,
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
        with official.chat.completions.stream(
            model="lora", messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0
        ) as events:
            kinds = [event.type for event in events]
        assert {"chunk", "content.delta", "content.done"} <= {*kinds}
        with pytest.raises(openai.NotFoundError):
            official.completions.create(model="none", prompt="a")
        with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
            official.completions.create(model="tiny", prompt="")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x").models.list()


def test_many_at_once_each_get_their_own(server, alone):
    """Async clients and threads together, streams and whole answers, every adapter."""
    jobs = [(f"prompt {number}", [None, *KINDS][number % 6]) for number in range(30)]

    async def all_at_once():
        async with openai_client(server, openai.AsyncOpenAI) as official:

            async def one(prompt, adapter, streamed):
                body = dict(model=adapter or "tiny", prompt=prompt, max_tokens=10, temperature=0)
                if not streamed:
                    return (await official.completions.create(**body)).choices[0].text
                parts = await official.completions.create(**body, stream=True)
                return "".join([part.choices[0].text async for part in parts])

            return await asyncio.gather(*(one(*job, number % 2) for number, job in enumerate(jobs)))

    def in_turn(job):
        with server.client(headers=API) as own:
            prompt, adapter = job
            body = dict(model=adapter or "tiny", prompt=prompt, max_tokens=10, temperature=0)
            return complete(own, **body)["choices"][0]["text"]

    expected = [alone(prompt, adapter, max_tokens=10).text for prompt, adapter in jobs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(in_turn, job) for job in jobs]
        assert asyncio.run(all_at_once()) == expected
        assert [thread.result() for thread in threads] == expected


def test_nothing_was_compiled_since_the_warm_up_and_the_metrics_say_so(client, server):
    """After everything above."""
    complete(client, model="lora", prompt="abc", max_tokens=4)
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name.removeprefix("flora_jax:"), 0)
            found[sample.name.removeprefix("flora_jax:")] += sample.value
    assert found["compilations_total"] == 0
    names = {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
        "prompt_tokens_total", "generation_tokens_total", "request_success_total",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
        "request_time_per_output_token_seconds_count", "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count", "adapter_loads_total", "adapters",
    }  # fmt: skip
    assert names <= found.keys()
    assert found["request_success_total"] >= found["time_to_first_token_seconds_count"] > 0
    assert found["adapters"] == len(KINDS)


CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "ignored_auth",
)  # fmt: skip


@pytest.mark.parametrize(
    "phases", ["examples,fuzzing", pytest.param("coverage", marks=pytest.mark.slow)]
)
def test_schemathesis_finds_no_answer_that_is_not_described(server, tmp_path, phases):
    program = shutil.which("st", path=Path(sys.executable).parent)
    done = subprocess.run(
        [
            program, "run", f"{server.url}/openapi.json", "--header", "Authorization: Bearer admin",
            "--checks", ",".join(CHECKS), "--max-examples", "6", "--seed", "1", "--phases", phases,
            "--generation-database", ":memory:", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert server.runner.state == "ready"
