"""A tiny server with OpenAI's API, whose delays and failures are known."""

import asyncio
import contextlib
import dataclasses
import json
import threading

MODELS = ("base", "a", "b", "c")


@contextlib.asynccontextmanager
async def listening(connection):
    """The URL of a server that has ``connection(reader, writer)`` answer, and ends it at the end."""
    tasks = set()

    async def one(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await connection(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # The client has gone.
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            tasks.discard(asyncio.current_task())

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclasses.dataclass
class FakeServer:
    """Streams ``tokens`` (``None``: ``max_tokens``) as events of ``per_event`` tokens each.

    The first event comes after ``first_s``, each other after ``each_s``. ``fails`` maps the number of a
    request to what becomes of it: a status, or "close", "no end", "error" within the stream. ``usage``
    says where the usage is: "end", "all", or "none". ``writes`` cuts each event into so many writes.
    """

    first_s: float = 0.0
    each_s: float = 0.0
    per_event: int = 1
    tokens: int | None = None
    usage: str = "end"
    writes: int = 1
    api_key: str | None = None
    fails: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.requests = []  # (body, seconds of the loop's clock), as they came.
        self.connections = self.running = self.most = 0

    def listening(self):
        return listening(self._connection)

    @contextlib.contextmanager
    def in_thread(self):
        """The same in a thread of its own, for whoever has no event loop."""
        told, found = threading.Event(), {}

        async def serve():
            stop = asyncio.Event()
            async with self.listening() as url:
                found.update(url=url, loop=asyncio.get_running_loop(), stop=stop)
                told.set()
                await stop.wait()

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        told.wait()
        try:
            yield found["url"]
        finally:
            found["loop"].call_soon_threadsafe(found["stop"].set)
            thread.join()

    async def _connection(self, reader, writer):
        self.connections += 1
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if not await self._answer(writer, first, headers, body):
                break

    async def _answer(self, writer, first, headers, body):
        """Whether the connection stays open."""
        method, path, _ = first.split()
        if self.api_key and headers.get("authorization") != f"bearer {self.api_key}":
            return self._json(writer, 401, {"error": {"message": "no key"}})
        if (method, path) == ("GET", "/v1/models"):
            cards = [{"id": name, "object": "model"} for name in MODELS]
            return self._json(writer, 200, {"object": "list", "data": cards})
        number = len(self.requests)
        asked = json.loads(body)
        self.requests.append((asked, asyncio.get_running_loop().time()))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._stream(writer, path, asked, self.fails.get(number))
        finally:
            self.running -= 1

    async def _stream(self, writer, path, asked, failure):
        await asyncio.sleep(self.first_s)
        if isinstance(failure, int):
            return self._json(writer, failure, {"error": {"message": f"no {failure}"}})
        chat = path == "/v1/chat/completions"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        if chat:
            await self._event(writer, {"choices": [{"index": 0, "finish_reason": None,
                                                    "delta": {"role": "assistant"}}]})  # fmt: skip
            prompt = len(asked["messages"][0]["content"].split())
            total = self.tokens or asked["max_completion_tokens"]
        else:
            prompt, total = len(asked["prompt"]), self.tokens or asked["max_tokens"]
        sent = 0
        while sent < total:
            if sent:
                await asyncio.sleep(self.each_s)
                if failure == "close":
                    return False
                if failure == "error":
                    await self._event(writer, {"error": {"message": "broken"}})
            count = min(self.per_event, total - sent)
            sent += count
            text = "x" * count
            part = {"delta": {"content": text}} if chat else {"text": text}
            ended = "length" if sent == total else None
            event = {"choices": [{"index": 0, "finish_reason": ended, **part}]}
            usage = {"prompt_tokens": prompt, "completion_tokens": sent}
            await self._event(writer, event | ({"usage": usage} if self.usage == "all" else {}))
        if self.usage == "end":
            await self._event(writer, {"choices": [], "usage": usage})
        if failure != "no end":
            self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True

    async def _event(self, writer, event):
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        size = -(-len(data) // self.writes)
        for start in range(0, len(data), size):
            self._chunk(writer, data[start : start + size])
            if self.writes > 1:
                await writer.drain()
                await asyncio.sleep(0)

    @staticmethod
    def _chunk(writer, data):
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    @staticmethod
    def _json(writer, status, value):
        body = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        return True
