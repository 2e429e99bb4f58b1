"""/v1/completions: prompts of text or tokens, and what continues them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
from flora_jax.serve.http.schemas import CompletionRequest
from flora_jax.serve.http.served import Served
from flora_jax.serve.http.token_texts import TokenTexts, clamped
from flora_jax.serve.request import TokenLogprob
from flora_jax.serve.stream import TextDecoder

_MAX_TOKENS = 16


class Prompt(NamedTuple):
    """Its tokens, the text that an echo begins with, and where the special tokens of that text lie in it,
    by their places among the tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    spans: Mapping[int, tuple[int, int]] = {}


async def completion_job(body: CompletionRequest, runner: Runner, served: Served) -> Job:
    """What a request asks of the engine.

    Raises:
        ApiError, RequestError: it cannot be served.
    """
    runner.check_open()
    adapter = served.adapter_of(body.model, runner.engine)
    n = choices_of(body)
    if body.best_of is not None and body.best_of != n:
        raise invalid(f"best_of is {body.best_of}, only n itself ({n}) is served", "best_of")
    check_stream(body)
    check_logprobs("logprobs", body.logprobs, served.limits.max_logprobs)
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not (max_tokens or body.echo):
        raise invalid("max_tokens is 0, expected at least 1 without echo", "max_tokens")
    if body.echo and body.suffix:
        raise invalid("echo and suffix are both given, expected one of them", "suffix")
    given = body.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    asked = given if several else [given]
    runner.check_room(len(asked) * n)
    prompts = await _prompts(asked, body, served)
    more: dict[str, Any] = {}
    if body.logprobs is not None:
        more["logprobs"] = body.logprobs
        if body.echo:
            more["prompt_logprobs"] = body.logprobs
    # With echo alone a token is drawn and not shown.
    params = params_of(body, max(1, max_tokens), **more)
    job_id = new_id("cmpl")
    requests = requests_of(job_id, [one.token_ids for one in prompts], params, n, adapter)
    form = CompletionForm(
        served.texts, [one for one in prompts for _ in range(n)], bool(body.echo),
        body.logprobs is not None, max_tokens > 0, bool(body.return_token_ids),
    )  # fmt: skip
    created = int(time.time())
    return Job(job_id, created, body.model, requests, n, form, include_usage(body))


async def _prompts(asked: Sequence[Any], body: CompletionRequest, served: Served) -> list[Prompt]:
    if isinstance(asked[0], str):  # Then all of them are.
        if body.suffix:
            found = await served.encode_infills(asked, body.suffix)
        else:
            found = await served.encode_all(asked, body.add_special_tokens)
        prompts = [Prompt(ids, text) for ids, text in zip(found, asked)]
        if body.echo and body.logprobs is not None:
            spans = await served.special_spans(asked, body.add_special_tokens)
            prompts = [one._replace(spans=own) for one, own in zip(prompts, spans)]
        return prompts
    if body.suffix:
        raise invalid("suffix is given and prompt has token ids, expected text", "suffix")
    return [Prompt(tuple(ids), served.decode(ids) if body.echo else "") for ids in asked]


class CompletionForm:
    """How completions are written; ``drawn`` is false where only the prompt is asked for."""

    whole_object = part_object = "text_completion"

    def __init__(
        self,
        texts: TokenTexts,
        prompts: Sequence[Prompt],
        echo: bool,
        logprobs: bool,
        drawn: bool,
        token_ids: bool,
    ):
        self._texts, self._prompts = texts, prompts
        self._echo, self._logprobs = echo, logprobs
        self._drawn, self._token_ids = drawn, token_ids
        self._written: dict[int, _Written] = {}

    def completion_tokens(self, piece: Piece) -> int:
        return len(piece.token_ids) if self._drawn else 0

    def whole(self, place: int, piece: Piece) -> dict[str, Any]:
        return self.part(place, piece)

    def part(self, place: int, piece: Piece) -> dict[str, Any]:
        first = place not in self._written
        prompt = self._prompts[place]
        if first:
            before = () if self._echo else prompt.token_ids
            self._written[place] = _Written(self._texts, before)
        text = piece.text if self._drawn else ""
        if first and self._echo:
            text = prompt.text + text
        choice: dict[str, Any] = {
            "index": place,
            "text": text,
            "logprobs": None,
            "finish_reason": piece.finish_reason if self._drawn else "length",
        }
        if self._logprobs:
            choice["logprobs"] = self._told(place, piece, first)
        if self._token_ids:
            choice["token_ids"] = piece.token_ids if self._drawn else []
            if first:
                choice["prompt_token_ids"] = [*prompt.token_ids]
        return choice

    def _told(self, place: int, piece: Piece, first: bool) -> dict[str, list[Any]]:
        tokens: list[tuple[int, TokenLogprob | None]] = []
        spans: Mapping[int, tuple[int, int]] = {}
        if first and self._echo:
            prompt = self._prompts[place]
            tokens += zip(prompt.token_ids, piece.prompt_logprobs)
            spans = prompt.spans
        if self._drawn:
            tokens += zip(piece.token_ids, piece.logprobs)
        return self._written[place].logprobs(tokens, spans)


class _Written:
    """How far a choice's text is, for the offsets of its tokens; ``before``: those that it follows."""

    def __init__(self, texts: TokenTexts, before: Sequence[int]):
        self._texts = texts
        self._decoder = None if texts.tokenizer is None else TextDecoder(texts.tokenizer, before)
        self._offset = 0

    def logprobs(
        self,
        tokens: Sequence[tuple[int, TokenLogprob | None]],
        spans: Mapping[int, tuple[int, int]],
    ) -> dict[str, list[Any]]:
        """OpenAI's four lists; ``spans`` has where special tokens lie, which the decoder leaves out."""
        told: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        text = self._texts.text
        for place, (token, own) in enumerate(tokens):
            start, end = spans.get(place, (self._offset, self._offset))
            told["tokens"].append(text(token))
            told["text_offset"].append(start)
            self._offset = end
            if self._decoder is not None:
                self._offset += len(self._decoder.add(token))
            if own is None:
                told["token_logprobs"].append(None)
                told["top_logprobs"].append(None)
                continue
            told["token_logprobs"].append(clamped(own.logprob))
            likeliest = {text(other): clamped(value) for other, value in own.top}
            told["top_logprobs"].append({text(token): clamped(own.logprob)} | likeliest)
        return told
