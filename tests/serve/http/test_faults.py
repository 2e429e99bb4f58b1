"""Load, faults and the end of a server, over an engine that does what it is told."""

import collections
import dataclasses
import itertools
import json
import socket
import threading
import time

import httpx
import pytest

from flora_jax.errors import InputError, RunError
from flora_jax.serve.http.sampling import requests_of
from flora_jax.serve.http.settings import Settings
from flora_jax.serve.request import Limits, Request, SamplingParams
from tests.helpers.http_server import ScriptedEngine, in_background, running, until

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 8}
ENDLESS = BODY | {"max_tokens": 10**9}


@pytest.fixture
def engine():
    return ScriptedEngine(rows=2, steps_per_s=500)


def post(server, **changes):
    with server.client() as client:
        return client.post("/v1/completions", json=BODY | changes)


def error_of(response):
    """The error's fields, which every answer of a refused request has."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def events_of(text):
    """The events of a stream, the last one checked."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_more_than_fit_the_queue_are_told_to_come_back(engine):
    engine.going.clear()
    with running(lambda report: engine, rows=2, max_queue=1) as server:
        threads = [in_background(post, server) for _ in range(3)]
        until(lambda: server.runner.open_requests == 3)
        refused = post(server)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert error_of(refused)["type"] == "rate_limit_error"
        several = post(server, n=4)
        assert (several.status_code, error_of(several)["code"]) == (400, "invalid_request")
        engine.going.set()
        for thread, found in threads:
            thread.join(20)
            assert found[0].status_code == 200
        assert post(server).status_code == 200


@pytest.fixture
def looks(monkeypatch):
    """Counts the requests that are checked, and the texts that become tokens."""
    counts = collections.Counter()

    def count(name, function):
        def counted(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(Request, "__post_init__", count("requests", Request.__post_init__))
    monkeypatch.setattr(Limits, "encode", count("texts", Limits.encode))
    return counts


@pytest.mark.parametrize(
    "changes", [{"prompt": ["a"] * 2000}, {"prompt": [[5]] * 2000}, {"prompt": "a", "suffix": "b"}]
)
def test_too_many_choices_are_refused_before_any_is_made(engine, looks, changes):
    with running(lambda report: engine, rows=2, max_queue=100) as server:
        refused = post(server, n=128, **changes)
        assert refused.status_code == 400
        number = 128 * (len(changes["prompt"]))
        expected = f"{number} choices are asked for, at most 102 are served"
        assert error_of(refused)["message"] == expected
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 128}
        with server.client() as client:
            refused = client.post("/v1/chat/completions", json=chat)
        assert refused.status_code == 400
        assert "128 choices are asked for" in error_of(refused)["message"]
    assert not looks


def test_a_prompt_is_looked_at_once_whatever_the_number_of_its_choices(engine, looks):
    with running(lambda report: engine, max_queue=100) as server:
        body = {"prompt": [[5, 6], [7]], "n": 40, "seed": 2**32 - 2, "return_token_ids": True}
        choices = post(server, **body).json()["choices"]
        assert [one["prompt_token_ids"] for one in choices] == [[5, 6]] * 40 + [[7]] * 40
        assert looks == {"requests": 2}


def test_choices_differ_in_seed_and_id_alone():
    params = SamplingParams(seed=2**32 - 2, stop=("a",), logprobs=1)
    made = requests_of("x", [(5, 6), (7,)], params, 3, "mine")
    assert made == [
        Request(ids, dataclasses.replace(params, seed=seed), "mine", f"x-{place}")
        for place, (ids, seed) in enumerate(
            itertools.product([(5, 6), (7,)], [2**32 - 2, 2**32 - 1, 0])
        )
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row_at_once(engine, stream):
    with running(lambda report: engine, rows=2) as server:
        body = json.dumps(ENDLESS | {"stream": stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as sock:
            sock.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine.stats.running == 1)
            if stream:
                assert b"200 OK" in sock.recv(100)
            gone_s = time.monotonic()
        until(lambda: not engine.open)
        assert time.monotonic() - gone_s < 1
        assert len(engine.cancelled) == 1
        assert server.runner.open_requests == 0


@pytest.mark.parametrize("stream", [True, False])
def test_what_takes_too_long_is_answered_so(engine, stream):
    settings = Settings(request_timeout_s=0.2)
    with running(lambda report: engine, settings=settings) as server:
        response = post(server, max_tokens=10**9, stream=stream)
        if stream:
            assert response.status_code == 200
            error = events_of(response.text)[-1]["error"]
        else:
            assert response.status_code == 504
            error = error_of(response)
        assert error["code"] == "timeout"
        until(lambda: not engine.open)


def test_a_client_that_does_not_read_its_stream_is_cut_off():
    engine = ScriptedEngine(repeat=50_000)  # What lies between the two has room for some megabytes.
    with running(lambda report: engine, settings=Settings(stalled_s=0.3)) as server:
        body = json.dumps(ENDLESS | {"stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            sock.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine.stats.running == 1)
            until(lambda: engine.cancelled, 30)
        assert not engine.open


def test_a_body_that_does_not_come_is_not_waited_for():
    engine = ScriptedEngine()
    with running(lambda report: engine, settings=Settings(request_timeout_s=0.3)) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            sock.settimeout(20)
            answer = b""
            while part := sock.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_a_drain_says_so_lets_what_runs_end_and_ends_the_server(engine):
    with running(lambda report: engine, rows=2, drain_timeout_s=20) as server:
        engine.going.clear()
        thread, found = in_background(post, server, stream=True)
        until(lambda: server.runner.open_requests == 1)
        server.signal()
        with server.client() as client:
            until(lambda: client.get("/ready").status_code == 503)
            assert client.get("/ready").json()["status"] == "draining"
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/completions", json=BODY)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
        engine.going.set()
        thread.join(20)
        assert "".join(e["choices"][0]["text"] for e in events_of(found[0].text)) == "abcdabcd"
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert server.raised == []
        assert engine.closed
        with pytest.raises(httpx.ConnectError):
            post(server)


def test_a_drain_that_takes_too_long_fails_what_still_runs(engine):
    with running(lambda report: engine, rows=2, drain_timeout_s=0.2) as server:
        thread, found = in_background(post, server, max_tokens=10**9)
        until(lambda: server.runner.open_requests == 1)
        server.signal()
        thread.join(20)
        assert found[0].status_code == 500
        assert "shutting down" in error_of(found[0])["message"]
        server.thread.join(20)
        assert server.raised == []


def test_an_engine_that_breaks_off_fails_its_requests_and_ends_the_server(engine):
    with running(lambda report: engine, rows=2) as server:
        whole, one = in_background(post, server, max_tokens=10**9)
        streaming, two = in_background(post, server, max_tokens=10**9, stream=True)
        until(lambda: server.runner.open_requests == 2)
        until(lambda: engine.stats.running == 2)
        with server.client() as client:
            client.get("/health").raise_for_status()
            engine.error = RuntimeError("the device is gone: secret detail")
            until(lambda: server.runner.state == "failed")
            health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        whole.join(20)
        streaming.join(20)
        assert (one[0].status_code, error_of(one[0])["code"]) == (500, "engine_error")
        assert "secret" not in one[0].text + two[0].text
        assert events_of(two[0].text)[-1]["error"]["code"] == "engine_error"
        server.thread.join(20)
        assert not server.thread.is_alive()
        (error,) = server.raised
        assert isinstance(error, RunError)
        assert "the device is gone" in str(error)


def test_a_server_listens_while_its_engine_is_made():
    engine, made = ScriptedEngine(), threading.Event()

    def make(report):
        report("prefill 8 tokens", 2, 9)
        assert made.wait(20)
        return engine

    with running(make, wait=False) as server, server.client() as client:
        until(lambda: client.get("/ready").json()["done"] == 2)
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {
            "status": "starting", "name": "prefill 8 tokens", "done": 2, "total": 9,
        }  # fmt: skip
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200
        early = client.post("/v1/completions", json=BODY)
        assert (early.status_code, error_of(early)["code"]) == (503, "unavailable")
        assert "2 of 9 programs" in early.json()["error"]["message"]
        assert "retry-after" in early.headers
        made.set()
        until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_an_engine_that_cannot_be_made_ends_the_server_with_its_reason():
    def make(report):
        raise InputError("adapter 'x': damaged")

    with running(make, wait=False) as server:
        server.thread.join(20)
        assert [str(error) for error in server.raised] == ["adapter 'x': damaged"]


def test_a_port_in_use_is_one_line():
    with running(lambda report: ScriptedEngine()) as server:
        from flora_jax.serve.http.server import listen

        port = int(server.url.rpartition(":")[2])
        with pytest.raises(InputError, match=f"--port {port}: cannot listen"):
            listen("127.0.0.1", port)
