"""Adapters that one replica loaded or unloaded over HTTP, and the others have to.

The entrance numbers every change and remembers the last one of each name; a replica does those that it
has not done, each once. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI

from flora_jax.serve.http.calls import Call, Head, answered
from flora_jax.serve.http.locks import NameLocks

_UNLOAD_PATH = "/v1/unload_lora_adapter"
_LIST_PATH = "/v1/models"
_Rest = TypeVar("_Rest")
Ask = Callable[[Call], Awaitable[tuple[Head, _Rest]]]


class Changes:
    """The entrance's: the last change of every name."""

    def __init__(self) -> None:
        self._last: dict[str, Call] = {}
        self._number = 0
        self._locks = NameLocks()
        self._tasks: set[asyncio.Task[Any]] = set()

    def last(self) -> dict[str, Call]:
        """By name, as other replicas do them."""
        return dict(self._last)

    async def through(self, ask: Ask[_Rest], call: Call) -> tuple[Head, _Rest]:
        """What ``ask``, which has a replica do the change, gives; one that was done is remembered.

        It goes on to its end when whoever asked for it goes away: others have to do what the replica has
        done by then.
        """
        # In no request's context, by which Ray ends what a request had asked for together with it.
        task = asyncio.create_task(self._through(ask, call), context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _through(self, ask: Ask[_Rest], call: Call) -> tuple[Head, _Rest]:
        # Every replica has to do the changes of a name in one order.
        async with self._locks.of(call.changes):
            # Also larger than those of an entrance that died, which the replicas remember.
            self._number = max(self._number + 1, time.time_ns())
            call = call._replace(number=self._number)
            head, rest = await ask(call)
            if head.status == 200:
                self._remember(call)
            return head, rest

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Its error is for whoever asked, if anybody is left.
        task.cancelled() or task.exception()

    def _remember(self, call: Call) -> None:
        if call.path != _UNLOAD_PATH:
            # Another replica may have what the name stood for before.
            body = json.dumps(json.loads(call.body) | {"load_inplace": True}).encode()
            headers = [one for one in call.headers if one[0].lower() != b"content-length"]
            call = call._replace(body=body, headers=headers)
        self._last[call.changes] = call


class Replay:
    """A replica's: does what was changed through others.

    Args:
        app: the replica's application.
    """

    def __init__(self, app: FastAPI):
        self._app = app
        # Numbers of changes by name: done here, and begun beside other calls.
        self._done: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        self._locks = NameLocks()
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def catch_up(self, call: Call, last: Mapping[str, Call]) -> None:
        """Does the changes that a call would see, and begins with the others: a load may wait a minute
        for slots, and only who asks for that adapter waits for it.

        Args:
            call: the request.
            last: the last change of every name.
        """
        seen = _seen_by(call, last)
        for name, change in last.items():
            known = max(self._done.get(name, 0), self._begun.get(name, 0))
            if known < change.number and name not in seen:
                self._begun[name] = change.number
                task = asyncio.create_task(self._in_turn(change))
                self._tasks.add(task)
                task.add_done_callback(self._ended)
        for name in seen:
            await self._do(last[name])

    async def change(self, call: Call) -> list[Head | bytes]:
        """The answer to a change that came to this replica."""
        async with self._locks.of(call.changes):
            return await self._answer(call)

    async def _in_turn(self, change: Call) -> None:
        async with self._turn:
            await self._do(change)

    async def _do(self, change: Call) -> None:
        async with self._locks.of(change.changes):
            if self._done.get(change.changes, 0) < change.number:
                await self._answer(change)

    async def _answer(self, change: Call) -> list[Head | bytes]:
        parts = [part async for part in answered(self._app, change)]
        head = parts[0]
        assert isinstance(head, Head)
        # What is not known here needs no unloading. Any other refusal is tried again.
        if head.status == 200 or (head.status == 404 and change.path == _UNLOAD_PATH):
            self._done[change.changes] = change.number
        return parts

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Its error is that of the calls that wait for the adapter, which try again.
        task.cancelled() or task.exception()


def _seen_by(call: Call, last: Mapping[str, Call]) -> Collection[str]:
    """Names whose changes show in a call's answer."""
    if call.method == "GET" and call.path.startswith(_LIST_PATH):
        return last.keys()
    return {call.adapter, call.changes} & last.keys()
