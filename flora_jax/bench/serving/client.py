"""An HTTP client with server-sent events: what a load generator needs of one, over aiohttp.

Knows nothing of models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp

from flora_jax.errors import InputError

OnEvent = Callable[[bytes], None]
_EVENTS = "text/event-stream"


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

    @property
    def base(self) -> str:
        """What a path is put behind."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}{self.prefix}"


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
    """Connections to one server, kept and used again; an asynchronous context manager.

    Args:
        url: see :meth:`Address.of`.
        api_key: sent as a bearer token.

    Raises:
        InputError: no such URL, or a key that no header can carry.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.address = Address.of(url)
        self._headers = {"User-Agent": "flora-jax", "Content-Type": "application/json"}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise InputError("--api-key has characters that no header can carry")
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> Self:
        # As many connections as are asked for, and as long as an answer takes.
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

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
        url = self.address.base + path
        try:
            async with self._session.request(method, url, data=body or None) as response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                if on_event is None or response.content_type != _EVENTS:
                    return Answer(response.status, headers, await response.read())
                events = Events()
                async for part in response.content.iter_any():
                    for data in events.take(part):
                        on_event(data)
                return Answer(response.status, headers, b"")
        except aiohttp.ClientError as error:
            if isinstance(error, OSError):
                raise
            raise ConnectionError(str(error) or type(error).__name__) from None


class Events:
    """The data of server-sent events, from bytes that are cut anywhere."""

    def __init__(self) -> None:
        self._left = b""
        self._data: list[bytes] = []

    def take(self, part: bytes) -> Iterator[bytes]:
        """The events that these bytes complete."""
        lines = (self._left + part).split(b"\n")
        self._left = lines.pop()
        for line in lines:
            line = line.removesuffix(b"\r")
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []
