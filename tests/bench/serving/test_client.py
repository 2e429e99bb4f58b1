"""The HTTP client of the load generator, against servers that write whatever a test gives them."""

import asyncio
import contextlib
import random

import pytest

from flora_jax.bench.serving.client import Address, Client
from flora_jax.errors import InputError
from tests.helpers.fake_openai import FakeServer, listening

SEEDS = range(5)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENTS = [b"one", b"", b"two\nlines", b"three"]
STREAM = b": a comment\n\ndata: one\n\ndata:\n\ndata: two\r\ndata: lines\r\n\r\nevent: x\ndata: three\n\n"


def writing(*answers):
    """A server that answers its connections' first requests with these parts, then closes them."""
    left = list(answers)

    async def connection(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for part in left.pop(0):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return listening(connection)


def got(parts, on_event=None):
    """The answer that is written in these parts."""

    async def main():
        async with writing(parts) as url, Client(url) as client:
            return await client.call("GET", "/x", on_event=on_event)

    return asyncio.run(main())


def chunked(data, draw):
    """``data`` in chunks of random sizes, with an extension and a trailer, as HTTP allows."""
    found, place = b"", 0
    while place < len(data):
        size = draw.randint(1, 9)
        part = data[place : place + size]
        found += b"%x;name=value\r\n%b\r\n" % (len(part), part)
        place += size
    return found + b"0\r\nTrailer: value\r\n\r\n"


def cut(data, draw, most):
    while data:
        size = draw.randint(1, most)
        yield data[:size]
        data = data[size:]


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("seed", SEEDS)
def test_events_are_the_same_however_they_are_cut(seed, framing):
    draw, events = random.Random(seed), []
    whole = {
        "chunked": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM, draw),
        "length": HEAD + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM,
        "close": HEAD + b"Connection: close\r\n\r\n" + STREAM,
    }[framing]
    answer = got(cut(whole, draw, 1 if seed == 0 else 40), events.append)
    assert (answer.status, answer.body, events) == (200, b"", EVENTS)


def test_an_answer_that_is_no_stream_of_events_is_a_body():
    events = []
    head = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 429 Too Many\r\nRetry-After: 2\r\n"
    answer = got([head + b"Content-Length: 11\r\n\r\ndata: x\n", b"\nyz"], events.append)
    assert (answer.status, answer.headers["retry-after"]) == (429, "2")
    assert (answer.body, events) == (b"data: x\n\nyz", [])


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [HEAD + b"Content-Length: 5\r\n\r\nab"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\nx\r\n"],
        [HEAD + b"Content-Length: five\r\n\r\n"],
        [b"SSH-2.0-OpenSSH\r\n\r\n"],
    ],
)
def test_a_broken_answer_is_an_error_and_not_a_short_body(parts):
    with pytest.raises(OSError):
        got(parts)


def test_a_connection_is_used_again_and_replaced_once_the_server_has_closed_it():
    body = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"

    async def kept():
        server = FakeServer()
        async with server.listening() as url, Client(url) as client:
            for _ in range(5):
                await client.call("GET", "/v1/models")
        return server.connections

    async def closed():
        # Each connection answers once and closes without having said so.
        async with writing([body + b"ab"], [body + b"cd"]) as url, Client(url) as client:
            first = await client.call("GET", "/")
            second = await client.call("GET", "/")
            return first.body, second.body

    assert asyncio.run(kept()) == 1
    assert asyncio.run(closed()) == (b"ab", b"cd")


def test_what_reading_an_event_raises_goes_to_the_caller_and_ends_the_exchange():
    def refuse(data):
        raise KeyError(data)

    with pytest.raises(KeyError, match="one"):
        got([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"b\r\ndata: one\n\n\r\n"], refuse)


def test_a_cancelled_call_closes_its_connection():
    async def main():
        closed, came = asyncio.Event(), asyncio.Event()

        async def connection(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + b"\r\ndata: one\n\n")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            closed.set()

        async with listening(connection) as url, Client(url) as client:
            call = asyncio.create_task(client.call("GET", "/", on_event=lambda _: came.set()))
            await came.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.wait_for(closed.wait(), 10)

    asyncio.run(main())


@pytest.mark.parametrize(
    "url, address",
    [
        ("http://localhost:8000", ("localhost", 8000, False, "")),
        ("http://localhost:8000/v1/", ("localhost", 8000, False, "")),
        ("https://x.example/models/v1", ("x.example", 443, True, "/models")),
        ("http://[::1]:80/", ("::1", 80, False, "")),
    ],
)
def test_a_url_is_a_host_a_port_and_a_prefix(url, address):
    assert Address.of(url) == address


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://a:b@x", "http://x/?q=1"],
)
def test_what_is_no_url_of_a_server_is_named(url):
    with pytest.raises(InputError, match=r"--base-url is .*expected http://HOST:PORT"):
        Client(url)


def test_a_key_that_would_break_the_head_is_refused():
    with pytest.raises(InputError, match="--api-key has characters that no header can carry"):
        Client("http://x", "a\r\nb")
