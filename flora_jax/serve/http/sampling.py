"""What completions and chats ask of the engine: sampling parameters and requests."""

from __future__ import annotations

import copy
import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

from flora_jax.serve.http.errors import invalid
from flora_jax.serve.http.schemas import LARGEST_SEED, Sampling
from flora_jax.serve.request import Request, SamplingParams


def new_id(prefix: str) -> str:
    """A name for an answer that no other has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def choices_of(body: Sampling) -> int:
    return 1 if body.n is None else body.n


def check_stream(body: Sampling) -> None:
    """Raises :class:`ApiError` for options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options are for stream true alone", "stream_options")


def include_usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def check_logprobs(name: str, wanted: int | None, most: int) -> None:
    """Raises :class:`ApiError` for more logprobs than the server gives."""
    if wanted is not None and wanted > most:
        raise invalid(f"{name} is {wanted}, this server gives at most {most}", name)


def params_of(body: Sampling, max_tokens: int, **more: Any) -> SamplingParams:
    """The engine's parameters; temperature and top_p are 1 by default, as OpenAI's.

    Raises:
        RequestError: a value that the engine does not have.
    """
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=() if body.stop is None else body.stop,
        stop_token_ids=() if body.stop_token_ids is None else body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        **more,
    )


def requests_of(
    job_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    adapter: str | None,
) -> list[Request]:
    """``n`` requests of each prompt, next to each other; choice i has its seed plus i.

    Raises:
        RequestError: an empty prompt, or one that holds what is no token.
    """
    seeded = [_seeded(params, choice) for choice in range(n)]
    found: list[Request] = []
    for ids in prompts:
        checked = Request(ids, params, adapter)
        found += [
            _choice(checked, own, f"{job_id}-{len(found) + i}") for i, own in enumerate(seeded)
        ]
    return found


def _choice(checked: Request, params: SamplingParams, request_id: str) -> Request:
    """A request that differs in nothing that is checked: a prompt's tokens are looked at once, not for
    each of its choices.
    """
    found = copy.copy(checked)
    vars(found).update(sampling_params=params, request_id=request_id)
    return found


def _seeded(params: SamplingParams, choice: int) -> SamplingParams:
    if params.seed is None or not choice:
        return params
    return dataclasses.replace(params, seed=(params.seed + choice) % (LARGEST_SEED + 1))
