"""Ray Serve: engines on one machine or on many behind one entrance, which sends a request to a replica
where its adapter lies.

Every replica runs the whole application over an engine of its own. The entrance reads what ``model`` a
request names, and Ray Serve's multiplexing prefers a replica that has served that adapter. Replicas start
and stop by load; one whose engine broke off, or that dies, is replaced. What was loaded over HTTP is
loaded by every other replica before its next request. Needs the extra ``ray``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from flora_jax.errors import InputError
from flora_jax.serve.http.errors import ApiError
from flora_jax.serve.http.security import ADMIN_PATHS

# The replica, or the machine under it, is gone.
_GONE = (RayActorError, ActorUnavailableError, NodeDiedError, WorkerCrashedError)
# Parts of an answer that wait in a replica for the entrance to take them.
_PARTS = 16
# Adapters that a replica is known for; those that it used longest ago are forgotten.
_MOST_KNOWN = 256
_NAME = "flora_jax"
_HOP_BY_HOP = (b"content-length", b"transfer-encoding", b"connection")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How many replicas there are, and what each takes.

    Args:
        least: that run always.
        most: that run under load.
        names: of the base; other models are adapters.
        most_bytes: of a request.
        busy: requests in a replica from which another one is started.
        open_requests: that one replica takes at most.
        retries: how often a request is sent to another replica when its own died before it answered.
        resources: of a replica, as Ray's ``ray_actor_options``.

    Raises:
        InputError: a number that is too small.
    """

    least: int = 1
    most: int = 1
    names: tuple[str, ...] = ()
    most_bytes: int = 4 << 20
    busy: int = 16
    open_requests: int = 512
    retries: int = 1
    resources: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"num_cpus": 1})

    def __post_init__(self) -> None:
        for name, bound in (("least", 1), ("most", self.least), ("busy", 1), ("retries", 0)):
            if getattr(self, name) < bound:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {bound}")

    def adapter_of(self, model: Any) -> str:
        """The adapter that a request's ``model`` may name; "" is none."""
        if not isinstance(model, str) or model in self.names:
            return ""
        for base in self.names:
            if model.startswith(f"{base}:"):
                return model[len(base) + 1 :]
        return model


def scale_of(text: str) -> tuple[int, int]:
    """The least and the most replicas of ``N`` or ``LEAST:MOST``.

    Raises:
        InputError: it is neither.
    """
    least, colon, most = text.partition(":")
    if not (least.isdecimal() and (most.isdecimal() or not colon)):
        raise InputError(f"--replicas is {text!r}, expected N or LEAST:MOST")
    return int(least), int(most if colon else least)


class Call(NamedTuple):
    """A request as the entrance hands it on; ``adapter`` is "" for the base."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    adapter: str = ""


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


class Replica:
    """An engine and the application over it.

    Args:
        make: makes the application; called in the replica's own process.
    """

    # Ray awaits it.
    async def __init__(self, make: Callable[[], FastAPI]):  # type: ignore[misc]
        self._app = make()
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()
        # Ray sends nothing before this is done: no program is compiled under a request.
        state = await self._app.state.runner.wait_until("ready")
        if state != "ready":
            raise RuntimeError(f"the engine did not start: {self._app.state.runner.error!r}")
        self._done: dict[str, Call] = {}
        self._loading = asyncio.Lock()

    def check_health(self) -> None:
        """Ray's question whether it should be replaced."""
        runner = self._app.state.runner
        if runner.state == "failed":
            raise RuntimeError(f"the engine broke off: {runner.error!r}")

    @serve.multiplexed(max_num_models_per_replica=_MOST_KNOWN)
    async def adapter(self, name: str) -> str:
        """Has Ray know that this adapter lies here."""
        return name

    async def answer(self, call: Call, loaded: Mapping[str, Call]) -> AsyncIterator[Head | bytes]:
        """The answer's head and then its bytes.

        Args:
            call: the request.
            loaded: the last loading or unloading of every adapter that was changed over HTTP.
        """
        await self._catch_up(loaded)
        if call.adapter and self._app.state.runner.engine.registry.knows(call.adapter):
            await self.adapter(call.adapter)
        async for part in answered(self._app, call):
            yield part

    async def _catch_up(self, loaded: Mapping[str, Call]) -> None:
        async with self._loading:
            for name, call in loaded.items():
                if self._done.get(name) != call:
                    # One that is loaded here already says so, which is as good.
                    async for _ in answered(self._app, call):
                        pass
                    self._done[name] = call


class Entrance:
    """Hands every request to a replica.

    Args:
        replicas: a handle of :class:`Replica`'s deployment.
        scale: see there.
    """

    def __init__(self, replicas: Any, scale: Scale):
        self._replicas, self._scale = replicas, scale
        self._loaded: dict[str, Call] = {}

    async def __call__(self, request: Request) -> Response:
        """The replica's answer; 503 where it died before it began, and every other try did as well."""
        try:
            body = await self._body(request)
            head, parts, call = await self._ask(request, body)
        except ApiError as error:
            return error.response()
        if call.path in ADMIN_PATHS and head.status == 200:
            self._loaded[json.loads(call.body)["lora_name"]] = call
        response = StreamingResponse(_to_the_end(head, parts), head.status)
        response.raw_headers = [one for one in head.headers if one[0].lower() not in _HOP_BY_HOP]
        return response

    async def _body(self, request: Request) -> bytes:
        most, found = self._scale.most_bytes, bytearray()
        async for part in request.stream():
            found += part
            if len(found) > most:
                raise ApiError(413, f"the body is larger than {most} bytes", code="too_large")
        return bytes(found)

    async def _ask(
        self, request: Request, body: bytes
    ) -> tuple[Head, AsyncIterator[Head | bytes], Call]:
        adapter = self._scale.adapter_of(_model_of(body)) if request.method == "POST" else ""
        call = Call(
            request.method, request.url.path, request.url.query.encode(), request.headers.raw, body,
            adapter,
        )  # fmt: skip
        for _ in range(1 + self._scale.retries):
            handle = self._replicas.options(stream=True, multiplexed_model_id=adapter)
            parts = aiter(handle.answer.remote(call, dict(self._loaded)))
            try:
                return await anext(parts), parts, call
            except BackPressureError:
                raise ApiError(
                    429, "all replicas have as many requests as they take", code="queue_full",
                    headers={"Retry-After": "1"},
                ) from None  # fmt: skip
            except _GONE:
                continue
            except RayTaskError as error:
                cause = type(error.cause).__name__
                raise ApiError(500, f"internal error: {cause}", code="internal_error") from None
        raise ApiError(
            503, "the replica that served this request is gone", code="unavailable",
            headers={"Retry-After": "1"},
        )  # fmt: skip


async def _to_the_end(head: Head, parts: AsyncIterator[Head | bytes]) -> AsyncIterator[bytes]:
    try:
        async for part in parts:
            assert isinstance(part, bytes)
            yield part
    except _GONE:
        kinds = [value for name, value in head.headers if name.lower() == b"content-type"]
        if not any(kind.startswith(b"text/event-stream") for kind in kinds):
            raise  # The connection breaks off, so that nobody takes half an answer for one.
        error = ApiError(503, "the replica that served this request is gone", code="unavailable")
        yield f"data: {json.dumps(error.to_json())}\n\n".encode()


def _model_of(body: bytes) -> Any:
    """The ``model`` of a request; what is no JSON object names none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body)
        if isinstance(found, dict):
            return found.get("model")
    return None


def replicated(make: Callable[[], FastAPI], scale: Scale) -> Any:
    """A Ray Serve application, for ``serve.run`` or a file that names it.

    Args:
        make: makes the application over an engine, in the process of a replica; it is pickled.
        scale: how many there are.
    """
    number: dict[str, Any] = {"num_replicas": scale.most}
    if scale.least < scale.most:
        number = {
            "autoscaling_config": {
                "min_replicas": scale.least, "max_replicas": scale.most,
                "target_ongoing_requests": scale.busy,
            }
        }  # fmt: skip
    replicas = serve.deployment(
        Replica, name="engine", max_ongoing_requests=scale.open_requests, health_check_period_s=5,
        ray_actor_options=dict(scale.resources), graceful_shutdown_timeout_s=60, **number,
    )  # fmt: skip
    entrance = serve.deployment(
        Entrance, name="entrance", max_ongoing_requests=scale.most * scale.open_requests + 64,
        ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return entrance.bind(replicas.bind(make), scale)


@contextlib.contextmanager
def running(build: Callable[[float], Any], host: str, port: int) -> Iterator[None]:
    """An application on a Ray cluster: that of ``RAY_ADDRESS``, else one of its own on this machine.

    Yields when as many replicas as run always are ready; what is its own ends with it.

    Args:
        build: makes it of the number of the cluster's GPUs.
        host: where every machine of the cluster listens.
        port: likewise.
    """
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(build(float(ray.cluster_resources().get("GPU", 0))), name=_NAME)
        yield
    finally:
        serve.shutdown()
        if ours:
            ray.shutdown()
