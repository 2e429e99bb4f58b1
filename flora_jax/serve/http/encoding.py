"""JSON and server-sent events as bytes."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class Json(JSONResponse):
    """A JSON answer, whatever characters a client's own words in it have."""

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    """An object as JSON. What UTF-8 cannot say, half a surrogate pair, becomes a question mark.

    Raises:
        ValueError: a number that JSON does not have.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encode(content) + b"\n\n"
