"""The tokens of one row as they come from the device, their text, and where they end.

Knows nothing of JAX, batches or other rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from typing import Any

from flora_jax.serve.request import Completion, Request


class Stream:
    """Collects a request's tokens until it ends.

    Args:
        request: whose tokens these are.
        stops: ids that end it.
        room: the most tokens it may have.
        tokenizer: a ``tokenizers.Tokenizer``; without one there is no text.
    """

    def __init__(
        self, request: Request, stops: Collection[int], room: int, tokenizer: Any | None = None
    ):
        self.request = request
        self.stops = frozenset(stops)
        self.room = room
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.stopped = False
        self._cut: int | None = None

    @property
    def running(self) -> bool:
        return not self.stopped and len(self.token_ids) < self.room

    def add(self, tokens: Sequence[int]) -> None:
        """Takes tokens in order; those after the end are left."""
        before = len(self.token_ids)
        for token in tokens:
            if not self.running:
                break
            self.token_ids.append(token)
            self.stopped = token in self.stops
        if self.request.stop and len(self.token_ids) > before:
            self._look_for_stop(before)

    def _look_for_stop(self, before: int) -> None:
        """Ends the row at the first new token that completes a stop string."""
        if self._find(len(self.token_ids)) is None:
            return
        # Once a stop string is complete it stays so: bisect instead of decoding every prefix.
        count = bisect.bisect_left(
            range(before + 1, len(self.token_ids)), True, key=lambda n: self._find(n) is not None
        )
        del self.token_ids[before + 1 + count :]
        self.stopped, self._cut = True, self._find(len(self.token_ids))

    def _find(self, count: int) -> int | None:
        """Where the first stop string starts in the text of so many tokens."""
        ids = self.token_ids[:count]
        text = self._decode(ids[:-1] if ids[-1] in self.stops else ids)
        places = [text.find(stop) for stop in self.request.stop]
        return min((place for place in places if place >= 0), default=None)

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def text(self) -> str | None:
        """The text before the stop token or stop string."""
        if self.tokenizer is None:
            return None
        if self._cut is not None:
            return self._decode(self.token_ids)[: self._cut]
        ended = self.stopped and self.token_ids[-1] in self.stops
        return self._decode(self.token_ids[:-1] if ended else self.token_ids)

    def completion(self) -> Completion:
        return Completion(
            index=self.request.index,
            adapter=self.request.adapter,
            text=self.text(),
            token_ids=tuple(self.token_ids),
            finish_reason="stop" if self.stopped else "length",
            prompt_tokens=len(self.request.token_ids),
        )
