"""A request that cannot be served gives one error with its file, line, found and expected value."""

import json
import re

import numpy as np
import pytest

from flora_jax.checkpoints.tokenizer import load_tokenizer
from flora_jax.errors import InputError
from flora_jax.jsonl import parse_lines
from flora_jax.serve.request import (
    Completion,
    Limits,
    Reader,
    Request,
    RequestError,
    SamplingParams,
)  # fmt: skip
from tests.helpers.byte_tokenizer import END, PIECES, byte_tokenizer

TOKENIZER = byte_tokenizer()
PLAIN = SamplingParams()
GOOD = {"prompt_token_ids": [1, 2]}
TURN = {"role": "user", "content": "a"}


def parse(lines, tokenizer=TOKENIZER, defaults=PLAIN):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    limits = Limits(8, 300, tokenizer)
    reader = Reader(limits, ["beta", "alpha"], defaults)
    found = list(reader.lines(parse_lines(texts, "requests.jsonl")))
    for one in found:
        if isinstance(one, RequestError):
            raise one
    return found


def error_of(*lines, tokenizer=TOKENIZER):
    with pytest.raises(RequestError) as caught:
        parse(lines, tokenizer)
    return str(caught.value)


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"prompt": "a"', ["malformed JSON", "character 14"]),
        ("{'prompt': 'a'}", ["malformed JSON"]),
        ('{"seed": ' + "9" * 5000 + "}", ["4300"]),
        ("[" * 200_000, ["malformed JSON", "too deeply"]),
        ("\ufeff{}", ["malformed JSON", "BOM"]),
        ('{"prompt": "a", "seed": 1, "seed": 2}', ["'seed' is given twice"]),
        ('{"prompt": "a", "x": {"y": 1, "y": 1}}', ["'y' is given twice"]),
        ('["prompt"]', ["found a list, expected an object"]),
        ('"prompt"', ["found a string, expected an object"]),
        ("null", ["found null, expected an object"]),
        ({"prompt": "a", "max_token": 3}, ["unknown field 'max_token'", "max_tokens", "top_p"]),
        ({"prompt": "a", "adapter": "gamma"}, ["unknown adapter 'gamma'", "alpha, beta"]),
        ({"prompt": "a", "adapter": ["alpha"]}, ["unknown adapter ['alpha']", "alpha, beta"]),
        ({"prompt": "a", "adapter": 0}, ["unknown adapter 0", "alpha, beta"]),
        ({"prompt": ""}, ["prompt is empty"]),
        ({"prompt": None}, ["one of 'prompt', 'prompt_token_ids', 'messages', found none"]),
        ({"prompt": ["a"]}, ["prompt is list", "string"]),
        ({"prompt": "a\ud800"}, ["not valid Unicode"]),
        ({"prompt": "123456789"}, ["9 tokens", "context 8"]),
        ({"prompt": "a", "prompt_token_ids": [1]}, ["one of", "found prompt, prompt_token_ids"]),
        ({"prompt": "a", "messages": []}, ["one of", "found prompt, messages"]),
        ({"max_tokens": 3}, ["one of", "found none"]),
        ({"messages": "hi"}, ["messages is str, expected a list of objects"]),
        ({"messages": []}, ["messages is empty, expected at least one message"]),
        ({"messages": ["hi"]}, ["messages[0] is str, expected an object with role and content"]),
        ({"messages": [TURN, {"content": "a"}]}, ["messages[1]: role is missing"]),
        ({"messages": [{"role": "", "content": "a"}]}, ["messages[0]: role is empty"]),
        ({"messages": [{"role": 3, "content": "a"}]}, ["role is 3, expected a string"]),
        ({"messages": [{"role": "user"}]}, ["messages[0]: content is missing"]),
        ({"messages": [{"role": "user", "content": None}]}, ["content is None, expected a string"]),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, ["content is [{'text'"]),
        ({"messages": [TURN | {"name": "x"}]}, ["messages[0] has 'name', expected role and"]),
        ({"messages": [TURN]}, ["messages need a chat template, and there is none here"]),
        ({"prompt_token_ids": []}, ["prompt is empty"]),
        ({"prompt_token_ids": [1] * 9}, ["9 tokens", "context 8"]),
        ({"prompt_token_ids": "12"}, ["prompt_token_ids is str", "list of integers"]),
        ({"prompt_token_ids": 7}, ["prompt_token_ids is int", "list of integers"]),
        ({"prompt_token_ids": [1, 300]}, ["300", "0 to 299"]),
        ({"prompt_token_ids": [-1]}, ["-1", "integers from 0"]),
        ({"prompt_token_ids": [True]}, ["True", "integers"]),
        ({"prompt_token_ids": [1.0]}, ["1.0", "integers"]),
        ({"prompt_token_ids": [None]}, ["None", "integers"]),
        ({**GOOD, "temperature": -0.5}, ["temperature is -0.5", "at least 0"]),
        ('{"prompt": "a", "temperature": NaN}', ["temperature is nan", "at least 0"]),
        ('{"prompt": "a", "temperature": Infinity}', ["temperature is inf", "finite"]),
        ('{"prompt": "a", "temperature": -Infinity}', ["temperature is -inf", "at least 0"]),
        ({**GOOD, "temperature": 10**400}, ["temperature is 1000", "finite"]),
        ({**GOOD, "temperature": 1e39}, ["temperature is 1e+39", "finite in float32"]),
        ({**GOOD, "temperature": "warm"}, ["temperature is 'warm'", "number"]),
        ({**GOOD, "temperature": True}, ["temperature is True", "number"]),
        ({**GOOD, "top_p": 0}, ["top_p is 0", "above 0", "at most 1"]),
        ({**GOOD, "top_p": 1.5}, ["top_p is 1.5", "above 0", "at most 1"]),
        ('{"prompt": "a", "top_p": NaN}', ["top_p is nan", "at most 1"]),
        ({**GOOD, "top_k": -2}, ["top_k is -2", "at least -1"]),
        ({**GOOD, "top_k": 2**31}, ["top_k is 2147483648", "at most 2147483647"]),
        ({**GOOD, "top_k": 2.0}, ["top_k is 2.0", "an integer"]),
        ({**GOOD, "seed": -1}, ["seed is -1", "at least 0"]),
        ({**GOOD, "seed": 2**32}, ["seed is 4294967296", "at most 4294967295"]),
        ({**GOOD, "seed": 1.5}, ["seed is 1.5", "an integer"]),
        ({**GOOD, "max_tokens": 0}, ["max_tokens is 0", "at least 1"]),
        ({**GOOD, "max_tokens": 10**400}, ["max_tokens is 1000", "at most 2147483647"]),
        ({**GOOD, "stop": ""}, ["stop is ''", "non-empty string"]),
        ({**GOOD, "stop": ["a", ""]}, ["stop is ['a', '']", "non-empty string"]),
        ({**GOOD, "stop": ["a", 3]}, ["stop is ['a', 3]", "non-empty string"]),
        ({**GOOD, "stop": 0}, ["stop is 0", "non-empty string"]),
        ({**GOOD, "stop": {}}, ["stop is {}", "non-empty string"]),
        ({**GOOD, "ignore_eos": "yes"}, ["ignore_eos is 'yes'", "true or false"]),
        ({**GOOD, "ignore_eos": 1}, ["ignore_eos is 1", "true or false"]),
        ({**GOOD, "stop_token_ids": list(range(9))}, ["9 stop_token_ids", "at most 8"]),
        ({**GOOD, "stop_token_ids": [300]}, ["stop_token_ids holds 300", "0 to 299"]),
        ({**GOOD, "stop_token_ids": False}, ["stop_token_ids is bool", "list of integers"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:40],
)
def test_a_bad_request_is_named_with_its_line_and_values(line, named):
    message = error_of(GOOD, line, GOOD)
    assert message.startswith("requests.jsonl, line 2: ")
    for words in named:
        assert words in message


@pytest.mark.parametrize(
    "line, named",
    [
        ({"prompt": "a"}, "tokenizer.json"),
        ({**GOOD, "stop": "a"}, "stop strings need a tokenizer"),
    ],
)
def test_text_needs_a_tokenizer(line, named):
    message = error_of(line, tokenizer=None)
    assert message.startswith("requests.jsonl, line 1: ")
    assert named in message


def test_blank_lines_are_passed_over_but_counted():
    requests = parse(["", GOOD, "  \t\n", {"prompt": "b"}])
    assert [(r.request_id, r.fold_in) for r in requests] == [(0, 0), (1, 1)]
    assert "line 4: unknown adapter 'gamma', given: alpha, beta" in error_of(
        "", GOOD, " ", {**GOOD, "adapter": "gamma"}
    )


def test_absent_and_null_fields_take_the_defaults():
    defaults = SamplingParams(max_tokens=7, temperature=0.5, top_k=3, top_p=0.9)
    nulls = dict.fromkeys(
        "adapter max_tokens temperature top_k top_p seed stop stop_token_ids".split()
    )
    plain, null = parse([GOOD, {**GOOD, **nulls}], defaults=defaults)
    assert plain == Request((1, 2), defaults, request_id=0, fold_in=0)
    assert vars(null) == vars(plain) | {"request_id": 1, "fold_in": 1}


def test_every_field_reaches_the_request():
    line = {
        "prompt": "abd", "adapter": "alpha", "max_tokens": 5, "temperature": 1, "top_k": 4,
        "top_p": 1, "seed": 2**32 - 1, "stop": "x", "stop_token_ids": [5, 6], "ignore_eos": True,
    }  # fmt: skip
    (request,) = parse([line])
    params = SamplingParams(5, 1.0, 4, 1.0, 2**32 - 1, ("x",), (5, 6), True)
    assert request == Request(TOKENIZER.encode("abd").ids, params, "alpha", 0, 0)
    assert isinstance(request.sampling_params.temperature, float)
    assert isinstance(request.sampling_params.top_p, float)


def test_a_prompt_may_fill_the_context_and_top_k_may_be_off():
    full, off = parse([{"prompt_token_ids": [299] * 8}, {**GOOD, "top_k": -1, "stop": ["a", "b"]}])
    assert full.prompt_token_ids == (299,) * 8
    assert (off.sampling_params.top_k, off.sampling_params.stop) == (0, ("a", "b"))


@pytest.mark.parametrize(
    "values, named",
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens is True, expected an integer"),
        ({"max_tokens": 10**5000}, "max_tokens is an integer of 16610 bits"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        (
            {"temperature": 1e39},
            "temperature is 1e+39, expected at least 0.0 and finite in float32",
        ),
        ({"temperature": np.float32("inf")}, "temperature is inf"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": True}, "seed is True, expected an integer"),
        ({"ignore_eos": 1}, "ignore_eos is 1, expected true or false"),
        ({"stop": b"END"}, "stop is b'END'"),
        ({"stop": {"a"}}, "stop is {'a'}"),
        ({"stop_token_ids": 3}, "stop_token_ids is int"),
        ({"stop_token_ids": [True]}, "stop_token_ids holds True"),
        ({"stop_token_ids": range(9)}, "9 stop_token_ids, at most 8"),
    ],
)
def test_sampling_parameters_are_checked_when_they_are_made(values, named):
    with pytest.raises(RequestError, match=re.escape(named)):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values, named",
    [
        ({"prompt_token_ids": ()}, "the prompt is empty"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids is str, expected a list of integers"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids holds True"),
        ({"adapter": 3}, "adapter is 3, expected a name"),
        ({"adapter": ["a"]}, "adapter is ['a'], expected a name"),
        ({"request_id": 1.5}, "request_id is 1.5"),
        ({"request_id": True}, "request_id is True"),
        ({"fold_in": -1}, "fold_in is -1"),
        ({"sampling_params": {"seed": 1}}, "sampling_params is dict, expected SamplingParams"),
    ],
)
def test_a_request_is_checked_when_it_is_made(values, named):
    with pytest.raises(RequestError, match=re.escape(named)):
        Request(**{"prompt_token_ids": (1, 2)} | values)


@pytest.mark.parametrize(
    "given, stored",
    [
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": ["END", "x", "END"]}, {"stop": ("END", "x")}),
        ({"stop": None}, {"stop": ()}),
        ({"stop_token_ids": None}, {"stop_token_ids": ()}),
        ({"stop_token_ids": [7] * 9}, {"stop_token_ids": (7,)}),
        ({"stop_token_ids": np.array([3, 4])}, {"stop_token_ids": (3, 4)}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": np.int64(3)}, {"top_k": 3}),
        ({"temperature": 1e-30}, {"temperature": 0.0}),
        ({"temperature": 1}, {"temperature": 1.0}),
    ],
)
def test_the_same_values_are_stored_from_python_and_from_json(given, stored):
    params = SamplingParams(**given)
    assert {name: getattr(params, name) for name in stored} == stored
    raw = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in given.items()}
    (request,) = parse([GOOD | raw])
    assert request.sampling_params == params


def test_a_line_that_is_no_request_leaves_the_others():
    reader = Reader(Limits(8, 300))
    texts = [json.dumps(GOOD), "{", "", json.dumps({**GOOD, "seed": -1}), json.dumps(GOOD)]
    found = list(reader.lines(parse_lines(texts, "r")))
    assert [isinstance(one, RequestError) for one in found] == [False, True, True, False]
    assert str(found[2]).startswith("r, line 4: seed is -1")
    assert (found[3].request_id, found[3].fold_in) == (3, 3)


def test_a_long_prompt_can_be_cut_from_the_left_so_that_its_output_fits():
    reader = Reader(Limits(8, 300), keep_last=True)
    for count, tokens, kept in [(20, 3, 5), (8, 3, 5), (4, 3, 4), (20, 8, 1), (20, 100, 1)]:
        raw = {"prompt_token_ids": [*range(count)], "max_tokens": tokens}
        assert reader.request(raw).prompt_token_ids == tuple(range(count))[-kept:]


def test_a_completion_is_one_line_of_json():
    completion = Completion(3, "alpha", "é\n\u2028", (1, 2), "stop", 4)
    text = json.dumps(completion.to_json(), ensure_ascii=False)
    assert "\n" not in text
    assert json.loads(text) == {
        "adapter": "alpha", "text": "é\n\u2028", "token_ids": [1, 2],
        "finish_reason": "stop", "prompt_tokens": 4, "completion_tokens": 2,
    }  # fmt: skip


def test_a_special_token_as_a_stop_string_stops_as_a_token():
    """Its text is no part of a completion, so as a string it could never be found."""
    params = SamplingParams(stop=["c", END])
    limits = Limits(9, PIECES, byte_tokenizer())
    assert limits.stop_ids(params) == {0}
    assert limits.stop_ids(params, eos=[5]) == {0, 5}
    full = SamplingParams(stop=["c", END], stop_token_ids=range(1, 9), ignore_eos=True)
    assert limits.stop_ids(full, eos=[9]) == {*range(9)}
    with pytest.raises(RequestError, match="9 stop_token_ids, at most 8"):
        limits.check(Request([1], full))


def test_a_tokenizers_own_truncation_and_padding_do_not_touch_prompts(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, PIECES)
    assert len(loaded.encode("xyz").ids) == 3


def test_starcoders_own_tokenizer_loads_and_fits_its_vocabulary(shared_data):
    folder = shared_data / "tokenizers" / "starcoder"
    tokenizer = load_tokenizer(folder, 49_152)
    text = "fn main() {\n\tlet größe = 2048;\n}\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with pytest.raises(InputError, match="has token id 49151, the model's vocabulary is 49151"):
        load_tokenizer(folder, 49_151)
