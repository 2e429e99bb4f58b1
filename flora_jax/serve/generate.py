"""The one loop that feeds an engine with requests until all have ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from flora_jax.errors import InputError
from flora_jax.serve.engine import Engine
from flora_jax.serve.request import Completion, Request, RequestId
from flora_jax.serve.updates import Update


def run(
    engine: Engine, requests: Iterable[Request], in_flight: int | None = None
) -> Iterator[Update]:
    """Runs requests together and yields what comes of each, with its place among them as ``index``.

    The engine should have nothing else to do: updates of other requests are lost. Whatever ends the
    iteration early cancels the rest. A request that fails, or that the engine refuses, has an update with
    ``error``, and the others go on.

    Args:
        engine: opened, and warmed up where that matters.
        requests: taken one by one.
        in_flight: how many the engine holds at a time, running or waiting; by default all.
    """
    coming = enumerate(requests)
    places: dict[RequestId, int] = {}
    more = True
    try:
        while more or places:
            while more and (in_flight is None or len(places) < in_flight):
                following = next(coming, None)
                if following is None:
                    more = False
                    break
                index, request = following
                try:
                    places[engine.add(request)] = index
                except InputError as error:
                    yield Update(
                        index if request.request_id is None else request.request_id,
                        error=str(error), index=index,
                    )  # fmt: skip
            if not places:
                continue
            engine.wait()
            for update in engine.step():
                if update.request_id not in places:
                    continue
                index = places[update.request_id]
                if update.finish_reason is not None:
                    del places[update.request_id]
                yield dataclasses.replace(update, index=index)
    finally:
        for request_id in places:
            engine.cancel(request_id)


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Runs the requests together and yields completions in their order, each as soon as it can be.

    The engine should have nothing else to do. Whatever ends the iteration early takes the rest back.

    Raises:
        InputError: a request that the model or the known adapters cannot serve, one whose adapter
            cannot be loaded, or one whose logits are not finite.
    """
    finished: dict[int, Completion] = {}
    following = 0
    for update in run(engine, requests):
        assert update.index is not None
        if update.error is not None:
            label = requests[update.index].label
            raise InputError(
                update.error
                if update.error.startswith(f"{label}:")
                else f"{label} ({update.error})"
            )
        if update.completion is not None:
            finished[update.index] = update.completion
        while following in finished:
            yield finished.pop(following)
            following += 1
