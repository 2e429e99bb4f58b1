"""Who may ask what: bearer keys, compared in constant time and never logged; and how large bodies may be.

Both are looked at before a byte of the body is read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flora_jax.serve.http.errors import ApiError

ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_LOADS_NONE = "this server loads no adapters: start it with --admin-key and --adapter-root"
_GUARDED = ("/v1/", "/tokenize", "/detokenize")


def is_guarded(path: str) -> bool:
    """Whether a path wants an API key, where the server has any."""
    return path.startswith(_GUARDED)


class Keys:
    """The keys of a server; only their digests are kept.

    Args:
        api: open what is guarded; with none it is open to all.
        admin: open everything.
    """

    def __init__(self, api: Sequence[str] = (), admin: Sequence[str] = ()):
        self._api = [_digest(key) for key in api]
        self._admin = [_digest(key) for key in admin]

    def __repr__(self) -> str:
        return f"Keys({len(self._api)} api, {len(self._admin)} admin)"

    @property
    def has_admin(self) -> bool:
        return bool(self._admin)

    def check(self, path: str, authorization: str | None) -> None:
        """Whether a request with this header may have this path.

        Raises:
            ApiError: 401 for no key or an unknown one; 403 for one that is not enough, and for loading
                where no key could be.
        """
        for_admins = path in ADMIN_PATHS
        if not (for_admins or (self._api and is_guarded(path))):
            return
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        admin, user = _is_among(given, self._admin), _is_among(given, self._api)
        if admin or (user and not for_admins):
            return
        if not self._admin and (user or not self._api):
            raise ApiError(403, _LOADS_NONE, code="loading_is_off")
        if user:
            raise ApiError(403, "this key may not load or unload adapters", code="not_admin")
        code, said = "invalid_api_key", "this key is unknown"
        if not given:
            code, said = "no_api_key", "a key is missing: Authorization: Bearer KEY"
        raise ApiError(401, said, code=code, headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_among(given: bytes, known: Sequence[bytes]) -> bool:
    """All are compared, whichever is equal."""
    return any([hmac.compare_digest(given, own) for own in known])


@dataclasses.dataclass
class Gate:
    """Stands before an application: keys first, then the size of bodies and how long they may take.

    Args:
        app: what it stands before.
        keys: the server's.
        most_bytes: of a body.
        timeout_s: until a body has come.
    """

    app: ASGIApp
    keys: Keys
    most_bytes: int
    timeout_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self.keys.check(scope["path"], headers.get("authorization"))
            self._check_length(headers.get("content-length"))
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        body = _Body(receive, self.most_bytes, self.timeout_s)

        async def answer_body(message: Message) -> None:
            # Whatever the application makes of a body that broke off, the answer is this one.
            if body.error is None:
                await send(message)
            elif message["type"] == "http.response.start":
                await _refuse(body.error, scope, receive, send)

        await self.app(scope, body.receive, answer_body)

    def _check_length(self, length: str | None) -> None:
        if length is not None and length.isdecimal() and len(length) < 20:
            if int(length) > self.most_bytes:
                raise _too_large(int(length), self.most_bytes)
        elif length is not None:
            raise ApiError(400, "Content-Length is no number of bytes", code="invalid_request")


class _Body:
    """The messages of a request, its body bounded in size and time."""

    def __init__(self, receive: Receive, most_bytes: int, timeout_s: float):
        self._receive, self._most = receive, most_bytes
        self._until = asyncio.get_running_loop().time() + timeout_s
        self._timeout_s, self._size, self._complete = timeout_s, 0, False
        self.error: ApiError | None = None

    async def receive(self) -> Message:
        if self._complete:  # What is left is the client going away.
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            late = f"the body did not come within {self._timeout_s:g} s"
            self.error = ApiError(408, late, code="timeout")
            raise self.error from None
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            self.error = _too_large(self._size, self._most)
            raise self.error
        self._complete = not message.get("more_body", False)
        return message


def _too_large(found: int, most: int) -> ApiError:
    message = f"the body has {found} bytes or more, at most {most} are read"
    return ApiError(413, message, code="body_too_large")


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers and closes the connection: the body that was not read would be taken for a request."""
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
