"""OpenAI's error shape, for everything that this server refuses or fails at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from flora_jax.errors import InputError
from flora_jax.serve.http.encoding import Json
from flora_jax.serve.http.runner import EngineFailed, QueueFull, Refused, TimedOut

# OpenAI's word for each status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_SHOWN = 60


class Problem(BaseModel):
    """What went wrong: a line, its class, the field it is about, and a code that programs can test."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The answer of every request that is refused or fails."""

    error: Problem


class ApiError(Exception):
    """An answer in OpenAI's error shape.

    Args:
        status: of HTTP.
        message: one line with what was found and what was expected.
        code: a word that programs can test for.
        param: the field that it is about.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        default = "server_error" if status >= 500 else "invalid_request_error"
        kind, line = _TYPES.get(status, default), " ".join(message.split())
        self.body = ErrorBody(error=Problem(message=line, type=kind, param=param, code=code))

    def to_json(self) -> dict[str, Any]:
        return self.body.model_dump()

    def response(self) -> Json:
        return Json(self.to_json(), self.status, self.headers)


def invalid(message: str, param: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, code="invalid_request", param=param)


def api_error(error: Exception) -> ApiError:
    """The answer to any exception; of one that nobody foresaw only its class is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        headers = {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, QueueFull):
            return ApiError(429, str(error), code="queue_full", headers=headers)
        return ApiError(503, str(error), code="unavailable", headers=headers)
    if isinstance(error, EngineFailed):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, InputError):
        return invalid(str(error))
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The part of a description that says which errors an operation may answer."""
    return {status: {"model": ErrorBody, "description": _DESCRIBED[status]} for status in statuses}


_DESCRIBED = {
    400: "The request cannot be served as it is.",
    401: "No valid key.",
    403: "This key may not do this.",
    404: "No such model or adapter.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to ask again.",
    500: "The engine or the server failed.",
    503: "The server is starting, shutting down, or its engine broke off.",
    504: "The request took longer than the server allows.",
}


def install(app: FastAPI) -> None:
    """Has an application answer all errors in this shape, the framework's own included."""

    async def known(request: Request, error: Exception) -> Json:
        return api_error(error).response()

    async def framework(request: Request, error: Exception) -> Json:
        assert isinstance(error, HTTPException)
        method, path = request.method, request.url.path
        message = {
            404: f"there is no {path[:_SHOWN]!r} here",
            405: f"{method[:_SHOWN]} is not allowed here",
        }.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        headers = error.headers
        return ApiError(error.status_code, message, code=code, headers=headers).response()

    async def malformed(request: Request, error: Exception) -> Json:
        assert isinstance(error, RequestValidationError)
        if any(isinstance(problem.get("input"), bytes) for problem in error.errors()):
            # Nothing is guessed: a page of another origin may send any body that is not called JSON.
            return invalid(wrong_type(request.headers.get("content-type"))).response()
        message, param = described(error.errors())
        return invalid(message, param).response()

    for kind in (ApiError, Refused, EngineFailed, TimedOut, InputError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(Exception, known)


def described(problems: Iterable[Any]) -> tuple[str, str | None]:
    """One line for what pydantic found wrong, and the first field it is about."""
    lines: list[str] = []
    first: str | None = None
    for problem in problems:
        where = [str(part) for part in problem["loc"][1:]]
        field = ".".join(where)[:_SHOWN]
        if problem["type"] == "json_invalid":
            lines.append(f"malformed JSON at character {where[0]}: {problem['ctx']['error']}")
            continue
        first = first or field or None
        if problem["type"] == "missing":
            lines.append(f"{field or 'the body'} is missing")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"unknown field {field!r}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            said = said[:1].lower() + said[1:]
            lines.append(f"{field or 'the body'}: {said}, found {short(problem['input'])}")
    more = len(lines) - 3
    return "; ".join(lines[:3]) + (f"; and {more} more" if more > 0 else ""), first


def wrong_type(found: str | None) -> str:
    """The line for a body that was not read as JSON, since its header does not call it so."""
    said = "is missing" if not found else f"is {found[:_SHOWN]}"
    return f"Content-Type {said}, expected application/json"


def short(value: Any) -> str:
    """A value of a request as messages show it, never long."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and value.bit_length() > 128:  # Long ones cannot be written out.
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
