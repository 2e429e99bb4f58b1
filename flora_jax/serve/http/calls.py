"""A request that came elsewhere, and an application's answer to it in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI

# Parts of an answer that wait for whoever reads it.
_PARTS = 16


class Call(NamedTuple):
    """A request as the entrance hands it on.

    Args:
        adapter: that it runs under; "" is the base.
        changes: the adapter that it loads or unloads; "" is none.
        number: of that change; later ones have larger numbers.
    """

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    adapter: str = ""
    changes: str = ""
    number: int = 0


class Head(NamedTuple):
    """The beginning of an answer; its bytes follow."""

    status: int
    headers: list[tuple[bytes, bytes]]


async def answered(app: FastAPI, call: Call) -> AsyncIterator[Head | bytes]:
    """An application's answer to a call; one that is not read to its end is a client that went away."""
    parts: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue(_PARTS)
    asked: list[dict[str, Any]] = [{"type": "http.request", "body": call.body}]
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        if gone.is_set():
            raise OSError("the client went away")
        await parts.put(message)

    async def run() -> None:
        try:
            await app(_scope(call), receive, send)
        finally:
            if not gone.is_set():
                await parts.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await parts.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]])
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        gone.set()
        while not parts.empty():  # Whoever waits to send learns of it.
            parts.get_nowait()
        if not task.done():
            task.add_done_callback(lambda done: done.cancelled() or done.exception())


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": call.method, "path": call.path, "raw_path": call.path.encode(),
        "query_string": call.query, "root_path": "", "headers": call.headers,
        "client": None, "server": None, "state": {},
    }  # fmt: skip
