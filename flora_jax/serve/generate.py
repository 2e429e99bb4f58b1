"""A list of requests to completions in their order, over an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flora_jax.errors import InputError
from flora_jax.serve.engine import Engine
from flora_jax.serve.request import Completion, Request


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Runs the requests together and yields completions in their order, each as soon as it can be.

    The engine should have nothing else to do. Whatever ends the iteration early takes the rest back.

    Raises:
        InputError: a request that the model or the known adapters cannot serve, one whose adapter
            cannot be loaded, or one whose logits are not finite.
    """
    tickets: dict[int, int] = {}
    finished: dict[int, Completion] = {}
    following = 0
    try:
        for place, request in enumerate(requests):
            tickets[engine.add(request)] = place
        while tickets:
            engine.wait()
            for update in engine.step():
                if update.error is not None:
                    index = requests[tickets.pop(update.ticket)].index
                    raise InputError(f"request {index} ({update.error})")
                if update.completion is not None:
                    finished[tickets.pop(update.ticket)] = update.completion
            while following in finished:
                yield finished.pop(following)
                following += 1
    finally:
        for ticket in tickets:
            engine.cancel(ticket)
