"""/v1/chat/completions: conversations, and the assistant's next message."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from flora_jax.serve.http.errors import invalid
from flora_jax.serve.http.jobs import Job, Piece
from flora_jax.serve.http.runner import Runner
from flora_jax.serve.http.sampling import (
    check_logprobs,
    check_stream,
    choices_of,
    include_usage,
    new_id,
    params_of,
    requests_of,
)
from flora_jax.serve.http.schemas import ChatRequest
from flora_jax.serve.http.served import Served
from flora_jax.serve.http.token_texts import TokenTexts, clamped


async def chat_job(body: ChatRequest, runner: Runner, served: Served) -> Job:
    """What a request asks of the engine.

    Raises:
        ApiError, RequestError: it cannot be served.
    """
    runner.check_open()
    adapter = served.adapter_of(body.model, runner.engine)
    check_stream(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs are for logprobs true alone", "top_logprobs")
    check_logprobs("top_logprobs", body.top_logprobs, served.limits.max_logprobs)
    n = choices_of(body)
    runner.check_room(n)
    ids = await served.encode_messages(body.messages, body.add_generation_prompt)
    limit = body.max_completion_tokens or body.max_tokens
    # As OpenAI's: what the context leaves. A prompt that fills it is answered with nothing.
    max_tokens = limit or max(1, served.limits.context - len(ids))
    more = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
    job_id = new_id("chatcmpl")
    params = params_of(body, max_tokens, **more)
    form = ChatForm(served.texts, ids, bool(body.logprobs), bool(body.return_token_ids))
    requests = requests_of(job_id, [ids], params, n, adapter)
    created = int(time.time())
    return Job(job_id, created, body.model, requests, n, form, include_usage(body))


class ChatForm:
    """How an assistant's messages are written."""

    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"

    def __init__(
        self, texts: TokenTexts, prompt_ids: Sequence[int], logprobs: bool, token_ids: bool
    ):
        self._texts, self._prompt_ids = texts, prompt_ids
        self._logprobs, self._token_ids = logprobs, token_ids
        self._begun: set[int] = set()

    def completion_tokens(self, piece: Piece) -> int:
        return len(piece.token_ids)

    def whole(self, place: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(place, piece, {"message": message}, first=True)

    def part(self, place: int, piece: Piece) -> dict[str, Any]:
        first = place not in self._begun
        self._begun.add(place)
        delta = {"role": "assistant"} if first else {}
        if piece.text or first:
            delta["content"] = piece.text
        return self._choice(place, piece, {"delta": delta}, first)

    def _choice(
        self, place: int, piece: Piece, said: dict[str, Any], first: bool
    ) -> dict[str, Any]:
        choice = {"index": place, **said, "logprobs": None, "finish_reason": piece.finish_reason}
        if self._logprobs:
            content = [
                self._told(token, own.logprob)
                | {"top_logprobs": [self._told(other, value) for other, value in own.top]}
                for token, own in zip(piece.token_ids, piece.logprobs)
            ]
            choice["logprobs"] = {"content": content, "refusal": None}
        if self._token_ids:
            choice["token_ids"] = piece.token_ids
            if first:
                choice["prompt_token_ids"] = [*self._prompt_ids]
        return choice

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        texts = self._texts
        return {
            "token": texts.text(token),
            "logprob": clamped(logprob),
            "bytes": texts.byte_list(token),
        }
