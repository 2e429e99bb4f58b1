"""Runs the application: listens, drains at SIGTERM, and ends when the engine does."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from flora_jax.errors import InputError, RunError
from flora_jax.serve.http.runner import EngineHung, Runner

# What is left of answers when the engine has ended is written within this time.
_FLUSH_S = 5
# Longer than clients keep idle connections, so that none is closed while it sends its next request.
_KEEP_ALIVE_S = 75
# So long a server whose engine broke off still answers that it did.
_FAILED_S = 1.0
# A thread that has something to do gets the interpreter so soon; Python's own 5 ms would be a third of
# what a first token may wait for.
_SWITCH_S = 0.0005

_log = logging.getLogger("flora_jax")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        InputError: the address is in use, or none of this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen: {error}") from None


def serve(
    app: FastAPI,
    listener: socket.socket,
    *,
    drain_timeout_s: float = 30.0,
    access_log: bool = False,
    on_start: Callable[[Server], None] = lambda server: None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM or Ctrl-C, after which what runs may end within ``drain_timeout_s``.

    A second signal ends it at once.

    Args:
        app: of :func:`flora_jax.serve.http.app.make_app`.
        listener: of :func:`listen`.
        drain_timeout_s: for requests that run when the signal comes.
        access_log: a line for every request.
        on_start: is given the server before it runs.
        on_ready: called once requests are taken.

    Raises:
        InputError: the engine could not be made of what it was given.
        EngineHung: a step of it did not end; the process cannot end in an orderly way.
        RunError: the engine broke off.
    """
    sys.setswitchinterval(_SWITCH_S)
    runner: Runner = app.state.runner
    config = uvicorn.Config(
        app, log_level="info" if access_log else "warning", access_log=access_log, ws="none",
        timeout_graceful_shutdown=_FLUSH_S, server_header=False, log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )  # fmt: skip
    server = Server(config, runner, drain_timeout_s, on_ready)
    on_start(server)
    server.run(sockets=[listener])
    if isinstance(runner.error, InputError | OSError) and not server.was_ready:
        raise runner.error
    if isinstance(runner.error, EngineHung):
        raise runner.error
    if runner.error is not None:
        _log.error("the engine broke off", exc_info=runner.error)
        raise RunError(f"the engine broke off: {runner.error!r}") from runner.error


class Server(uvicorn.Server):
    """Uvicorn's, except that it goes on listening while it drains: who asks is told that it does."""

    def __init__(
        self,
        config: uvicorn.Config,
        runner: Runner,
        drain_timeout_s: float,
        on_ready: Callable[[], None],
    ):
        super().__init__(config)
        self._runner, self._drain_timeout_s = runner, drain_timeout_s
        self._on_ready = on_ready
        self._until_s: float | None = None
        self._failed_s: float | None = None
        self.was_ready = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, the second ends it."""
        if self._until_s is None:
            self._until_s = time.monotonic() + self._drain_timeout_s
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        runner = self._runner
        if runner.state == "ready" and not self.was_ready:
            self.was_ready = True
            self._on_ready()
        if runner.state == "failed":
            self._failed_s = self._failed_s or time.monotonic()
            if time.monotonic() > self._failed_s + _FAILED_S:
                return True
        if self._until_s is not None:
            starting = runner.state == "starting"
            if runner.state == "ready" and runner.open_requests:
                left = runner.open_requests
                _log.warning("%d requests still run; a second signal ends them", left)
            runner.drain()
            if starting or not runner.open_requests or time.monotonic() > self._until_s:
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Their answers say so before the connections are closed.
        await self._runner.close()
        await super().shutdown(sockets)
