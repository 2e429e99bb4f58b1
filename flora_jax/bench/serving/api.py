"""OpenAI's API as a load generator uses it: which models there are, a request's body, its stream.

Knows nothing of when requests are sent, nor of engines: any server with this API will do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from flora_jax.bench.serving.client import Answer, Client
from flora_jax.errors import InputError
from flora_jax.serve.request import Request

COMPLETIONS: Endpoint = "/v1/completions"
CHAT: Endpoint = "/v1/chat/completions"
Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
ENDPOINTS: tuple[Endpoint, ...] = (COMPLETIONS, CHAT)
# What a chat's prompt is made of: most tokenizers have a token for each, with the space before it.
_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had "
    "an they which one you were all her she there would their we him been has when who will no more if "
    "out so up said what its about than into them can only other time new some could these two may"
).split()


class Refused(Exception):
    """What became of a request that failed: ``status`` is the answer's, or "connection" or "stream"."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Arrivals(NamedTuple):
    """When tokens of a request came, seconds of the clock, with their numbers; and, where the server
    says so, how many tokens the prompt and the output had.
    """

    arrived: list[tuple[float, int]]
    prompt_tokens: int | None
    output_tokens: int | None


@dataclasses.dataclass(frozen=True)
class Api:
    """Sends requests to one of a server's models.

    Args:
        client: connections to it.
        model: the name of the base; a request with an adapter goes to the model of that name.
        endpoint: one of ``ENDPOINTS``.
        now: the clock.
    """

    client: Client
    model: str
    endpoint: Endpoint
    now: Callable[[], float]

    def body(self, request: Request) -> bytes:
        """A request as JSON: greedy, streamed, with its usage at the end.

        A chat's prompt is text of as many common words as the request has tokens, about as many tokens.
        """
        params = request.sampling_params
        fields: dict[str, Any] = {
            "model": request.adapter or self.model,
            "temperature": params.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == COMPLETIONS:
            fields |= {"prompt": [*request.prompt_token_ids], "max_tokens": params.max_tokens}
        else:
            text = " ".join(_WORDS[token % len(_WORDS)] for token in request.prompt_token_ids)
            fields["messages"] = [{"role": "user", "content": text}]
            fields["max_completion_tokens"] = params.max_tokens
        if params.ignore_eos:  # Not OpenAI's own: servers that have it call it so.
            fields["ignore_eos"] = True
        return json.dumps(fields, separators=(",", ":")).encode()

    async def send(self, body: bytes) -> Arrivals:
        """Streams one request to its end.

        Raises:
            Refused: another status than 200, an error in the stream, or an end before it is complete.
        """
        reading = _Stream(self.now)
        try:
            answer = await self.client.call("POST", self.endpoint, body, reading.take)
        except OSError as error:
            raise Refused("connection", str(error)) from None
        if answer.status != 200:
            raise Refused(str(answer.status), _said(answer))
        if not reading.ended:
            raise Refused("stream", "it ended before [DONE]")
        return reading.arrivals()


class _Stream:
    """One stream of completions, from the data of its events."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.ended = False
        self._times: list[float] = []
        self._counts: list[int] = []  # Tokens up to each arrival, where the server tells at each.
        self._usage: dict[str, Any] = {}

    def take(self, data: bytes) -> None:
        """An event; it is an arrival if it has text, or a token whose text is held back.

        The event that only gives a chat's role is none, nor is one that only says why a text ended.
        """
        if data == b"[DONE]":
            self.ended = True
            return
        now = self._now()
        try:
            event = json.loads(data)
            if event.get("error") is not None:
                error = event["error"]
                said = error.get("message", error) if isinstance(error, dict) else error
                raise Refused("stream", str(said))
            arrived = any(map(self._brings_tokens, event.get("choices") or ()))
            usage = event.get("usage")
        except (ValueError, AttributeError, TypeError, KeyError):
            raise Refused("stream", f"found {data[:80]!r}, expected a completion's part") from None
        if usage:
            self._usage = usage
        if arrived:
            self._times.append(now)
            if usage:
                self._counts.append(usage["completion_tokens"])

    def _brings_tokens(self, choice: dict[str, Any]) -> bool:
        delta = choice.get("delta")
        if delta is None:
            text, only_role = choice["text"], False
        else:
            text, only_role = delta.get("content"), "role" in delta
        if text:
            return True
        ended = choice.get("finish_reason") is not None
        return not only_role and (not self._times if ended else text is not None)

    def arrivals(self) -> Arrivals:
        """What came, and when.

        Where the server says only at the end how many tokens there were, they are spread evenly over the
        arrivals, and where it never does, each arrival has one.
        """
        times, total = self._times, self._usage.get("completion_tokens")
        ends = range(1, len(times) + 1)
        if len(self._counts) == len(times):
            sums = self._counts
        elif total is not None:
            sums = [total * end // len(times) for end in ends]
        else:
            sums = [*ends]
        counts = [after - before for before, after in zip([0, *sums], sums)]
        return Arrivals(
            list(zip(times, counts, strict=True)), self._usage.get("prompt_tokens"), total
        )


async def find_model(client: Client, url: str, model: str | None, adapters: Sequence[str]) -> str:
    """The model that is meant, the first that the server has where it is ``None``.

    Raises:
        InputError: nobody answers at ``url``, the key is refused, the answer is no list of models, or the
            server lacks the model or an adapter.
    """
    try:
        answer = await client.call("GET", "/v1/models")
    except OSError as error:
        raise InputError(f"--base-url is {url}, and no server answers there: {error}") from None
    if answer.status in (401, 403):
        raise InputError(f"{url}/v1/models answers {answer.status}, expected an --api-key it takes")
    try:
        names = [str(card["id"]) for card in json.loads(answer.body)["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if answer.status != 200 or not names:
        raise InputError(
            f"{url}/v1/models answers {answer.status}: {_said(answer)}, expected a list of models"
        )
    for option, wanted in [("model", model), *(("lora-modules", name) for name in adapters)]:
        if wanted is not None and wanted not in names:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InputError(f"--{option} is {wanted!r}, expected one of the server's: {known}")
    return names[0] if model is None else model


def _said(answer: Answer) -> str:
    """The message of an error in OpenAI's shape, or the beginning of what came."""
    try:
        raw = json.loads(answer.body)
        error = raw.get("error", raw)
        found = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        found = answer.body.decode("utf-8", "replace")
    return " ".join(str(found).split())[:300]
