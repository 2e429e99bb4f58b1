"""A small HTTP/1.1 client for asyncio, with server-sent events: what a load generator needs of one.

Its processor time competes with the server's where both run on one machine. So bytes are parsed where
they arrive, in the event loop's own callback, and no task is woken before an answer has ended: 50 µs an
event, where httpx takes 200 (32 streams at once, one core of an Intel Xeon at 2.5 GHz). Connections are
kept and used again. Knows nothing of models, and needs nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from flora_jax.errors import InputError

OnEvent = Callable[[bytes], None]
_EVENTS = "text/event-stream"
# Of a head, a chunk's size line or an event: what is longer is no answer of a server of models.
_LONGEST = 8 << 20


class Address(NamedTuple):
    """Where a server is; ``prefix`` is what its paths begin with, without a slash at the end."""

    host: str
    port: int
    secure: bool
    prefix: str

    @classmethod
    def of(cls, url: str) -> Address:
        """The address of ``http://host:port``; a ``/v1`` at the end, as the openai client has it, is left
        out.

        Raises:
            InputError: it is no such URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        plain = not (parts.query or parts.fragment or parts.username or parts.password)
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise InputError(f"--base-url is {url!r}, expected http://HOST:PORT or https://HOST")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), secure, prefix)


def allow_connections(count: int) -> None:
    """Lets this process have so many connections at once, as far as it may."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # There is none on Windows, nor this limit.

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 64 if hard == resource.RLIM_INFINITY else min(count + 64, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Answer(NamedTuple):
    """What a server answered; ``body`` is empty where it came as events. Names of headers are lower."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """Connections to one server.

    Args:
        url: see :meth:`Address.of`.
        api_key: sent as a bearer token.

    Raises:
        InputError: no such URL, or a key that no header can carry.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.address = Address.of(url)
        host, port = self.address.host, self.address.port
        named = f"[{host}]" if ":" in host else host
        head = f"Host: {named}:{port}\r\nUser-Agent: flora-jax\r\nAccept: */*\r\n"
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise InputError("--api-key has characters that no header can carry")
            head += f"Authorization: Bearer {api_key}\r\n"
        self._head = head
        self._ssl = ssl.create_default_context() if self.address.secure else None
        self._idle: list[_Connection] = []

    async def call(
        self, method: str, path: str, body: bytes = b"", on_event: OnEvent | None = None
    ) -> Answer:
        """One exchange. A task that is cancelled in it closes the connection.

        Args:
            method: GET or POST.
            path: behind the address' prefix.
            body: JSON.
            on_event: gets the data of each event as it comes, where the answer is a stream of events;
                what it raises ends the exchange, closes the connection and goes to the caller.

        Raises:
            OSError: nobody answers, the connection breaks off, or what comes is no HTTP.
        """
        words = f"{method} {self.address.prefix}{path} HTTP/1.1\r\n{self._head}"
        if body:
            words += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        message = words.encode() + b"\r\n" + body
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                return await self._exchange(connection, message, on_event)
            except _ClosedWhileIdle:  # By the server, just as this went out.
                continue
        return await self._exchange(await self._connect(), message, on_event)

    def close(self) -> None:
        """Closes the connections that are kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self.address.host, self.address.port, ssl=self._ssl
        )
        return connection

    async def _exchange(
        self, connection: _Connection, message: bytes, on_event: OnEvent | None
    ) -> Answer:
        try:
            answer = await connection.exchange(message, on_event)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return answer


class _ClosedWhileIdle(ConnectionError):
    """A connection that was kept had been closed by the server: nothing of the answer came."""


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: _Parser | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._used = self._heard = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, message: bytes, on_event: OnEvent | None) -> Answer:
        assert self._transport is not None
        self._parser, self._heard = _Parser(on_event), False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            return await self._done
        finally:
            self._used, self._parser, self._done = True, None, None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._done is None or self._done.done():
            self.close()  # Nobody asked for it.
            return
        self._heard = True
        try:
            self._parser.feed(data)
        except Exception as error:
            self._done.set_exception(error)
            self.close()
            return
        if self._parser.ended:
            if not self._parser.keeps_open:
                self.close()
            self._done.set_result(self._parser.answer())

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        assert self._parser is not None
        if error is None and self._parser.ends_at_close:
            self._done.set_result(self._parser.answer())
        elif self._used and not self._heard:
            self._done.set_exception(_ClosedWhileIdle("the server closed the connection"))
        else:
            reason = f": {error}" if error is not None else ""
            self._done.set_exception(
                ConnectionError(f"the connection closed before the answer's end{reason}")
            )


class _Parser:
    """One answer, from bytes that come in any parts."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self.ended = self.ends_at_close = False
        self.keeps_open = True
        self._on_event, self._events = on_event, False
        self._status, self._headers = 0, dict[str, str]()
        self._raw = b""
        self._left = 0  # Bytes of the body, or of its present chunk, that are still to come.
        self._body, self._line, self._data = bytearray(), b"", list[bytes]()
        self._step: Callable[[], bool] = self._read_head

    def answer(self) -> Answer:
        return Answer(self._status, self._headers, bytes(self._body))

    def feed(self, data: bytes) -> None:
        """Takes what came.

        Raises:
            ConnectionError: it is no HTTP.
        """
        self._raw = self._raw + data if self._raw else data
        while not self.ended and self._step():
            pass
        if len(self._raw) > _LONGEST or len(self._line) > _LONGEST:
            raise ConnectionError(f"a line of more than {_LONGEST} bytes, expected an HTTP answer")

    # Steps return whether they had what they need; each says which comes next.

    def _read_head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if not found:
            return False
        self._raw = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if not words[0].startswith("HTTP/1.") or len(words) < 2 or not words[1].isdecimal():
            raise ConnectionError(f"found {first[:80]!r}, expected an HTTP answer")
        status = int(words[1])
        if status < 200:  # An interim answer; the real one follows.
            return True
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        self._status, self._headers = status, headers
        self._events = self._on_event is not None and headers.get("content-type", "").startswith(
            _EVENTS
        )
        self.keeps_open = (
            headers.get("connection", "").lower() != "close" and words[0] == "HTTP/1.1"
        )
        length = headers.get("content-length")
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._step = self._read_size
        elif status in (204, 304):
            self.ended = True
        elif length is None:
            self.ends_at_close, self.keeps_open = True, False
            self._step = self._read_until_close
        elif length.isdecimal():
            self._left, self._step = int(length), self._read_body
        else:
            raise ConnectionError(f"content-length is {length!r}, expected a number")
        return True

    def _read_size(self) -> bool:
        line, found, rest = self._raw.partition(b"\r\n")
        if not found:
            return False
        self._raw = rest
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError:
            raise ConnectionError(f"found {line[:80]!r}, expected a chunk's size") from None
        self._step = self._read_chunk if self._left else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        if self._left:
            self._take_body()
        if self._left or len(self._raw) < 2:
            return False
        if not self._raw.startswith(b"\r\n"):
            raise ConnectionError("a chunk is longer than its size, expected an HTTP answer")
        self._raw, self._step = self._raw[2:], self._read_size
        return True

    def _read_trailer(self) -> bool:
        line, found, rest = self._raw.partition(b"\r\n")
        if not found:
            return False
        self._raw = rest
        self.ended = not line
        return True

    def _read_body(self) -> bool:
        self._take_body()
        self.ended = not self._left
        return False

    def _read_until_close(self) -> bool:
        self._left = len(self._raw)
        self._take_body()
        return False

    def _take_body(self) -> None:
        part, self._raw = self._raw[: self._left], self._raw[self._left :]
        self._left -= len(part)
        if self._events:
            self._take_events(part)
        else:
            self._body += part

    def _take_events(self, part: bytes) -> None:
        assert self._on_event is not None
        *lines, self._line = (self._line + part).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                self._on_event(data)
