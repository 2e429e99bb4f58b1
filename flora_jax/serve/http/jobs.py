"""From an HTTP request's engine requests to its answer, whole or as a stream; the same for all endpoints.

How an endpoint writes a choice is its :class:`Form`'s. Knows nothing of prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flora_jax.serve.http.encoding import Json, event
from flora_jax.serve.http.errors import ApiError, api_error
from flora_jax.serve.http.runner import Answers, Runner
from flora_jax.serve.request import Request, TokenLogprob
from flora_jax.serve.updates import Update

Result = TypeVar("Result")


@dataclasses.dataclass
class Piece:
    """What is new of one choice; ``prompt_logprobs`` come with its first."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] = ()
    finish_reason: str | None = None

    def add(self, update: Update) -> None:
        """Takes an update.

        Raises:
            ApiError: it says that the request failed.
        """
        if update.error is not None:
            raise ApiError(500, update.error, code="request_failed")
        self.text += update.text or ""
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs or ()
        self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = update.finish_reason


class Form(Protocol):
    """How an endpoint writes its choices."""

    whole_object: str
    part_object: str

    def whole(self, place: int, piece: Piece) -> dict[str, Any]:
        """A choice with all that it has."""
        ...

    def part(self, place: int, piece: Piece) -> dict[str, Any]:
        """What is new of a choice; called in order."""
        ...

    def completion_tokens(self, piece: Piece) -> int: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One HTTP request.

    Args:
        id: of the answer.
        created: when it came, in seconds since 1970.
        model: as the client named it.
        requests: one a choice; ``n`` for each prompt.
        n: choices of a prompt.
        form: how they are written.
        include_usage: a stream ends with the numbers of tokens.
    """

    id: str
    created: int
    model: str
    requests: Sequence[Request]
    n: int
    form: Form
    include_usage: bool = False

    def body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer or a chunk."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices} | more

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """The numbers of tokens; a prompt counts once."""
        prompts = self.requests[:: self.n]
        prompt_tokens = sum(len(request.prompt_token_ids) for request in prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


async def answer_whole(job: Job, answers: Answers, http: HttpRequest) -> Response:
    """The one answer when all choices have ended. A client that goes away cancels them."""
    pieces = [Piece() for _ in job.requests]

    async def gather() -> None:
        async for come in answers:
            for place, update in come:
                pieces[place].add(update)

    try:
        await _while_there(http.receive, answers.cancel, gather())
    finally:
        answers.cancel()
    if any(piece.finish_reason is None for piece in pieces):
        return Response(status_code=408)  # Nobody is there to read it.
    choices = [job.form.whole(place, piece) for place, piece in enumerate(pieces)]
    usage = job.usage(sum(map(job.form.completion_tokens, pieces)))
    return Json(job.body(job.form.whole_object, choices, usage=usage))


async def stream_parts(job: Job, answers: Answers) -> AsyncGenerator[bytes, None]:
    """The events of a stream, up to the last; an error is one of them."""
    tokens = 0
    try:
        async for come in answers:
            for place, piece in _merged(come):
                tokens += job.form.completion_tokens(piece)
                choice = job.form.part(place, piece)
                yield event(job.body(job.form.part_object, [choice]))
        if job.include_usage:
            yield event(job.body(job.form.part_object, [], usage=job.usage(tokens)))
    except Exception as error:
        yield event(api_error(error).to_json())
    yield b"data: [DONE]\n\n"


def _merged(come: Iterable[tuple[int, Update]]) -> Iterable[tuple[int, Piece]]:
    """What has come by choice: a client that reads slowly gets fewer and larger parts."""
    pieces: dict[int, Piece] = {}
    for place, update in come:
        piece = pieces.setdefault(place, Piece())
        piece.add(update)
    return pieces.items()


class EventStream(Response):
    """Server-sent events.

    A client that goes away, or takes nothing for ``stalled_s``, cancels what it asked for.

    Args:
        events: what is sent.
        answers: where they come from.
        stalled_s: how long one event may wait to be taken.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], answers: Answers, stalled_s: float):
        # Proxies that collect an answer before they pass it on are told not to.
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._answers, self._stalled_s = events, answers, stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            head = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **head})
            async for one in self._events:
                if self._answers.cancelled and not self._answers.timed_out:
                    return
                async with asyncio.timeout(self._stalled_s):
                    await send({"type": "http.response.body", "body": one, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _while_there(receive, self._answers.cancel, pump())
        except TimeoutError:
            pass  # The connection is closed, since the answer is not complete.
        finally:
            self._answers.cancel()
            await self._events.aclose()


async def _while_there(
    receive: Receive, gone: Callable[[], None], work: Awaitable[Result]
) -> Result:
    """Does the work; calls ``gone`` where the client goes away before."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    watching = asyncio.ensure_future(watch())
    try:
        return await work
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def answer(job: Job, runner: Runner, http: HttpRequest, stream: bool) -> Response:
    """Runs a job and answers it.

    Raises:
        Refused, InputError: see :meth:`flora_jax.serve.http.runner.Runner.submit`.
    """
    limits = http.app.state.settings
    answers = runner.submit(job.requests, limits.request_timeout_s)
    if stream:
        return EventStream(stream_parts(job, answers), answers, limits.stalled_s)
    return await answer_whole(job, answers, http)
