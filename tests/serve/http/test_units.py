"""Parts of the server by themselves: keys, metrics, tokens' texts, fill-in-the-middle, messages."""

import asyncio
import json
import threading

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import normalizers, processors
from tokenizers.processors import TemplateProcessing

from flora_jax.errors import InputError
from flora_jax.serve.http.encoding import encode
from flora_jax.serve.http.errors import ApiError, short
from flora_jax.serve.http.infill import Infill
from flora_jax.serve.http.locks import NameLocks
from flora_jax.serve.http.metrics import Metrics
from flora_jax.serve.http.recent import Recent
from flora_jax.serve.http.runner import Timing
from flora_jax.serve.http.security import Keys
from flora_jax.serve.http.served import longest_token
from flora_jax.serve.http.settings import Settings
from flora_jax.serve.http.token_texts import TokenTexts, clamped
from flora_jax.serve.request import Limits, RequestError
from tests.helpers.byte_tokenizer import END, byte_tokenizer
from tests.helpers.http_server import FIM, small_served, tokenizer
from tests.helpers.requests import make_request

KEYS = Keys(["user"], ["admin"])


@pytest.mark.parametrize(
    "path, header, status",
    [
        ("/v1/models", None, 401),
        ("/v1/models", "Bearer user", None),
        ("/v1/models", "bearer  user", None),
        ("/v1/models", "Bearer admin", None),
        ("/v1/models", "Bearer use", 401),
        ("/v1/models", "Bearer ", 401),
        ("/v1/models", "Basic user", 401),
        ("/v1/models", "user", 401),
        ("/v1/anything", None, 401),
        ("/tokenize", None, 401),
        ("/detokenize", "Bearer other", 401),
        ("/health", None, None),
        ("/ready", None, None),
        ("/metrics", None, None),
        ("/", None, None),
        ("/openapi.json", None, None),
        ("/v1/load_lora_adapter", None, 401),
        ("/v1/load_lora_adapter", "Bearer other", 401),
        ("/v1/load_lora_adapter", "Bearer user", 403),
        ("/v1/unload_lora_adapter", "Bearer user", 403),
        ("/v1/unload_lora_adapter", "Bearer admin", None),
    ],
)
def test_a_key_opens_what_it_is_for(path, header, status):
    if status is None:
        KEYS.check(path, header)
        return
    with pytest.raises(ApiError) as caught:
        KEYS.check(path, header)
    assert caught.value.status == status
    assert (status == 401) == ("WWW-Authenticate" in caught.value.headers)
    assert "user" not in str(caught.value)


def test_without_api_keys_all_but_loading_is_open():
    keys = Keys([], ["admin"])
    keys.check("/v1/models", None)
    with pytest.raises(ApiError):
        keys.check("/v1/load_lora_adapter", None)


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize(
    "api, header, status, words",
    [
        (
            [],
            None,
            403,
            "this server loads no adapters: start it with --admin-key and --adapter-root",
        ),
        ([], "Bearer any", 403, "this server loads no adapters"),
        (["user"], "Bearer user", 403, "this server loads no adapters"),
        (["user"], None, 401, "a key is missing"),  # Who has no key learns nothing.
        (["user"], "Bearer any", 401, "this key is unknown"),
    ],
)
def test_a_server_without_an_admin_key_asks_for_none(path, api, header, status, words):
    with pytest.raises(ApiError, match=words) as caught:
        Keys(api).check(path, header)
    assert caught.value.status == status


def test_keys_are_nowhere_to_be_read(tmp_path):
    settings = Settings(("secret-a",), ("secret-b",), tmp_path)
    assert "secret" not in repr(settings) + repr(Keys(settings.api_keys)) + repr(
        vars(Keys(["secret"]))
    )


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"api_keys": ("",)}, "a key is empty"),
        ({"api_keys": ("a\nb",)}, "no header carries"),
        (
            {"admin_keys": ("a",)},
            "no adapter root, expected --admin-key and --adapter-root or neither",
        ),
        ({"adapter_root": "."}, "no admin key, expected --admin-key and --adapter-root or neither"),
        ({"stalled_s": 0}, "stalled_s is 0, expected above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, match, tmp_path):
    if "adapter_root" in changes:
        changes = {"adapter_root": tmp_path}
    with pytest.raises(InputError, match=match):
        Settings(**changes)


def timing(adapter, tokens=0, first_s=None, last_s=None):
    request = make_request(None, (1, 2, 3), adapter, request_id="a")
    return Timing(request, 100.0, first_s, last_s, tokens, queued_s=0.25)


def samples(metrics):
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            key = sample.name, sample.labels.get("adapter"), sample.labels.get("le")
            found[key] = found.get(key, 0) + sample.value
    return found


def test_adapters_beyond_the_first_share_a_label():
    metrics = Metrics("base", 100, 2)
    for name in (None, "a", "b", "c", "d", "a"):
        one = timing(name, 1, 100.5, 100.5)
        metrics.began(one)
        metrics.progressed(one, 1, 0.5)
        metrics.ended(one, "stop", 0.5)
    found = samples(metrics)
    name = "flora_jax:generation_tokens_total"
    assert [found[name, adapter, None] for adapter in ("", "a", "b", "other")] == [1, 2, 1, 2]
    assert {adapter for _, adapter, _ in found} == {"", "a", "b", "other", None}


def test_latencies_are_counted_where_they_belong():
    metrics, recent = Metrics("base", 100, 2), Recent()
    one = timing(None, 1, 100.5, 100.5)
    for observer in (metrics, recent):
        observer.arrived(one)
        observer.began(one)
        observer.progressed(one, 1, 0.5)
    one.tokens, one.last_s = 5, 100.9
    for observer in (metrics, recent):
        observer.progressed(one, 4, 0.4)
        observer.ended(one, "length", 1.0)
    found = samples(metrics)
    prefix = "flora_jax:"
    assert found[prefix + "time_to_first_token_seconds_sum", "", None] == 0.5
    assert found[prefix + "time_to_first_token_seconds_bucket", "", "0.25"] == 0
    assert found[prefix + "time_to_first_token_seconds_bucket", "", "0.5"] == 1
    assert found[prefix + "inter_token_latency_seconds_count", "", None] == 4
    assert found[prefix + "inter_token_latency_seconds_sum", "", None] == pytest.approx(0.4)
    for name in ("count", "sum"):
        new = found[f"{prefix}inter_token_latency_seconds_{name}", "", None]
        assert found[f"{prefix}time_per_output_token_seconds_{name}", "", None] == new
    assert found["process_resident_memory_bytes", None, None] > 0
    per_token = prefix + "request_time_per_output_token_seconds_sum"
    assert found[per_token, "", None] == pytest.approx(0.1)
    assert found[prefix + "request_queue_time_seconds_sum", "", None] == 0.25
    assert found[prefix + "e2e_request_latency_seconds_sum", "", None] == 1.0
    assert found[prefix + "prompt_tokens_total", "", None] == 3
    assert found[prefix + "request_generation_tokens_sum", "", None] == 5
    assert found[prefix + "request_success_total", "", None] == 1
    (last,) = recent.requests
    assert (last.output_tokens, last.outcome, last.latency_s) == (5, "length", 1.0)
    assert last.time_per_output_token_s == pytest.approx(0.1)


def test_a_tokens_text_is_its_own_and_its_bytes_are_those_of_the_text():
    made = tokenizer()
    texts = TokenTexts(made)
    assert len({texts.text(token) for token in range(made.get_vocab_size())}) == (
        made.get_vocab_size()
    )
    for text in ("def f(x):\n", "Grüße, 世界 🙂", "abc ab a"):
        ids = made.encode(text).ids
        assert bytes(byte for token in ids for byte in texts.byte_list(token)).decode() == text
    assert texts.text(made.encode("é").ids[0]) == "bytes:\\xc3"
    assert texts.text(0) == "<|endoftext|>"
    assert texts.text(10_000) == "token_id:10000"
    assert texts.byte_list(10_000) is None
    assert TokenTexts(None).text(3) == "token_id:3"


def test_a_sentencepiece_token_keeps_its_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "▁a": 1, "▁b": 2, "b": 3, "<0xE2>": 4, "a": 5, "▁": 6}
    made = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    texts = TokenTexts(made)
    assert [texts.text(token) for token in (2, 3, 4)] == [" b", "b", "bytes:\\xe2"]


def test_a_text_that_no_tokens_can_hold_is_refused_before_it_is_read():
    served = small_served()
    assert longest_token(served.limits.tokenizer) == len("<|endoftext|>")
    with pytest.raises(RequestError, match="has 1249 characters, the context of 96 tokens holds"):
        asyncio.run(served.encode("a" * (96 * 13 + 1)))
    assert len(asyncio.run(served.encode("a" * 96 * 13))) == 96 * 13
    made = tokenizer()
    made.normalizer = normalizers.Strip()
    assert longest_token(made) == float("inf")
    assert longest_token(None) == float("inf")


@pytest.mark.parametrize("text", ["ab c" * 5000, "ab c" * 5000 + "\ud800"])
def test_a_long_text_is_read_while_others_go_on(text):
    limits = Limits(96, 264, tokenizer())
    if text.isascii():
        assert list(limits.encode(text)) == tokenizer().encode(text).ids
    else:
        with pytest.raises(RequestError, match="not valid Unicode"):
            limits.encode(text)


@pytest.mark.parametrize("count, beside", [(9, False), (11, True)])
def test_many_short_texts_are_read_beside_the_event_loop(count, beside, monkeypatch):
    served, threads, encode = small_served(context=10**4), set(), Limits.encode

    def noted(*arguments):
        threads.add(threading.get_ident())
        return encode(*arguments)

    monkeypatch.setattr(Limits, "encode", noted)
    found = asyncio.run(served.encode_all(["a" * 1000] * count))
    assert [len(ids) for ids in found] == [1000] * count
    assert (threads != {threading.get_ident()}) is beside
    threads.clear()
    found = asyncio.run(served.encode_infills(["a" * 1000] * count, "b"))
    assert found == asyncio.run(served.encode_infills(["a" * 1000], "b")) * count
    assert (threads != {threading.get_ident()}) is beside


@pytest.mark.parametrize("times", [1, 1000])
def test_special_tokens_lie_where_the_text_has_them(times):
    """Not the one that the tokenizer puts before a text."""
    made = tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    served = small_served(tokenizer=made)
    text = f"{END}é{END}" * times
    for first in (True, False):
        (spans,) = asyncio.run(served.special_spans([text], first))
        assert {text[begin:end] for begin, end in spans.values()} == {END}
        places = [place for part in range(times) for place in (4 * part, 4 * part + 3)]
        assert sorted(spans) == [place + first for place in places]


def test_fill_in_the_middle_is_the_tokenizers_own():
    made = tokenizer()
    first, second, third = (made.token_to_id(mark) for mark in FIM)
    assert Infill.of(made).join([1, 2], [3]) == (first, 1, 2, second, 3, third)
    # What is put in front of a text stands in front of all of it, what is put behind one nowhere.
    end = made.token_to_id(END)
    made.post_processor = TemplateProcessing(
        single=f"{END} $A {FIM[2]}", special_tokens=[(END, end), (FIM[2], third)]
    )
    assert Infill.of(made).join([1, 2], [3]) == (end, first, 1, 2, second, 3, third)
    assert Infill.of(byte_tokenizer()) is None
    assert Infill.of(None) is None


def test_a_name_has_one_lock_for_as_long_as_somebody_wants_it():
    locks, order = NameLocks(), []

    async def hold(name, place):
        async with locks.of(name):
            order.append((name, place))
            await asyncio.sleep(0)
            order.append((name, place))

    async def all_of_them():
        await asyncio.gather(*(hold(name, place) for place in range(3) for name in "ab"))

    asyncio.run(all_of_them())
    for name in "ab":
        places = [place for own, place in order if own == name]
        assert places == [0, 0, 1, 1, 2, 2]
    assert order[:2] == [("a", 0), ("b", 0)]
    assert len(locks) == 0


@pytest.mark.parametrize(
    "value, text",
    [
        (1.5, "1.5"), ("a", "'a'"), ([1, 2], "a list of 2"), ({}, "an object"), (None, "None"),
        (10**60, "an integer of 200 bits"), ("x" * 100, "'" + "x" * 59 + "..."),
        ("\ud800", "'\\ud800'"),
    ],
)  # fmt: skip
def test_a_value_in_a_message_is_short(value, text):
    assert short(value) == text


def test_an_answer_is_json_whatever_it_holds():
    assert json.loads(encode({"a": "\ud800 é\u2028"})) == {"a": "? é\u2028"}
    with pytest.raises(ValueError):
        encode({"a": float("nan")})
    assert clamped(float("-inf")) == -9999.0
