"""Ray Serve: engines on one machine or on many behind one entrance, which sends a request to a replica
where its adapter lies.

Every replica runs the whole application over an engine of its own. The entrance reads what ``model`` a
request names, and Ray Serve's multiplexing prefers a replica that has served that adapter. Replicas start
and stop by load; one whose engine broke off, or that dies, is replaced. What was loaded over HTTP is
loaded by every other replica before its next request for it. Needs the extra ``ray``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

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
from flora_jax.serve.http.calls import Call, Head, answered
from flora_jax.serve.http.changes import Changes, Replay
from flora_jax.serve.http.errors import ApiError
from flora_jax.serve.http.security import ADMIN_PATHS

# The replica, or the machine under it, is gone.
_GONE = (RayActorError, ActorUnavailableError, NodeDiedError, WorkerCrashedError)
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
        self._replay = Replay(self._app)

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
        await self._replay.catch_up(call, loaded)
        if call.changes:
            for part in await self._replay.change(call):
                yield part
            return
        if call.adapter and self._app.state.runner.engine.registry.knows(call.adapter):
            await self.adapter(call.adapter)
        async for part in answered(self._app, call):
            yield part


class Entrance:
    """Hands every request to a replica.

    Args:
        replicas: a handle of :class:`Replica`'s deployment.
        scale: see there.
    """

    def __init__(self, replicas: Any, scale: Scale):
        self._replicas, self._scale = replicas, scale
        self._changes = Changes()

    async def __call__(self, request: Request) -> Response:
        """The replica's answer; 503 where it died before it began, and every other try did as well."""
        try:
            call = self._call(request, await self._body(request))
            asked = self._changes.through(self._ask, call) if call.changes else self._ask(call)
            head, parts = await asked
        except ApiError as error:
            return error.response()
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

    def _call(self, request: Request, body: bytes) -> Call:
        adapter = changes = ""
        if request.method == "POST":
            if request.url.path in ADMIN_PATHS:
                changes = _text_of(body, "lora_name")
            else:
                adapter = self._scale.adapter_of(_text_of(body, "model"))
        return Call(
            request.method, request.url.path, request.url.query.encode(), request.headers.raw, body,
            adapter, changes,
        )  # fmt: skip

    async def _ask(self, call: Call) -> tuple[Head, AsyncIterator[Head | bytes]]:
        for _ in range(1 + self._scale.retries):
            handle = self._replicas.options(stream=True, multiplexed_model_id=call.adapter)
            parts = aiter(handle.answer.remote(call, self._changes.last()))
            try:
                return await anext(parts), parts
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


def _text_of(body: bytes, field: str) -> str:
    """A field of a request; "" where it is no JSON object, or has no text there."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body)
        if isinstance(found, dict) and isinstance(found.get(field), str):
            return found[field]
    return ""


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
    # What waits at the entrance until a replica takes it; Ray's default is without an end. What comes in
    # one burst waits for a moment even where there is room, so it is as much as all replicas take.
    waiting = scale.most * scale.open_requests
    replicas = serve.deployment(
        Replica, name="engine", max_ongoing_requests=scale.open_requests, health_check_period_s=5,
        max_queued_requests=waiting, ray_actor_options=dict(scale.resources),
        graceful_shutdown_timeout_s=60, **number,
    )  # fmt: skip
    # More than that, so that it is the entrance that says no.
    most = 2 * waiting + 64
    entrance = serve.deployment(
        Entrance, name="entrance", max_ongoing_requests=most,
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
