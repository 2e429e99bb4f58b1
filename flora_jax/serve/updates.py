"""What an engine tells its caller: how requests went on, and how full it is. Without JAX."""

from __future__ import annotations

import dataclasses

from flora_jax.serve.request import Completion, FinishReason, RequestId, TokenLogprob


@dataclasses.dataclass(frozen=True)
class Update:
    """What an iteration brought one request: new tokens, its end, or the reason why it failed.

    Args:
        request_id: what ``Engine.add`` returned for it.
        token_ids: the tokens that are new.
        text: the text that is new and certain: a possible beginning of a stop string and a part of a
            character wait for the next. All texts together are the completion's. ``None`` without a
            tokenizer.
        completion: there where the request has ended.
        error: why it failed, where it did; then no update follows.
        logprobs: of ``token_ids``, where the request asked for them.
        prompt_logprobs: with the first tokens, where the request asked for them.
        queued_s: with the first tokens: seconds that the request waited for a row.
        index: its place among the requests of :func:`flora_jax.serve.generate.run`.
    """

    request_id: RequestId
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    completion: Completion | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    queued_s: float | None = None
    index: int | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; ``None`` while it goes on."""
        if self.error is not None:
            return "error"
        return None if self.completion is None else self.completion.finish_reason


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counters since the start, and how full the engine is now.

    ``cache_usage``, 0 to 1, is what sequences hold. ``prefix_queries`` counts tokens of prompts that may
    share a beginning with others, ``prefix_hits`` those of them that were not prefilled again.
    """

    running: int
    waiting: int
    preemptions: int
    adapter_loads: int
    adapter_evictions: int
    cache_usage: float
    prefix_queries: int
    prefix_hits: int
