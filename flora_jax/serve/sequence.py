"""A request on its way through the engine: what the host knows of it, in one place.

Only the scheduler changes it. Plain Python, without arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from flora_jax.serve.prefixes import PromptKeys
    from flora_jax.serve.registry import Version
    from flora_jax.serve.request import Request
    from flora_jax.serve.stream import Stream

# "swapped": it ran, and gave its row and its blocks up for a while.
Stage = Literal["waiting", "prefill", "decode", "swapped", "ended"]


@dataclasses.dataclass(eq=False)
class Sequence:
    """One request's progress; ``prompt``, ``budget``, ``prefilled`` and ``drawn`` count tokens.

    Args:
        number: in the order of arrival; smaller is older.
        owner: whose share of the rows it takes.
        prompt: length of the prompt, or of what is prefilled of it.
        budget: the most tokens that it may draw.
        request: what was asked for.
        version: its adapter; ``None`` is the base model.
        stream: its tokens and their text.
        stage: where it is.
        row: its row of the batch while it runs.
        blocks: its blocks of the cache, in order.
        prefilled: tokens of the prompt that are in the cache, or will be after what is dispatched.
        drawn: tokens drawn; the first one counts from when the prompt's last chunk is planned.
        in_flight: further tokens that may have been drawn and were not read yet.
        overtaken: how many sequences ran before it although it was first in line.
        keys: of its blocks and of its prompt; ``None`` where nothing is to be shared.
        published: how many of its full blocks can be found by others.
        arrived_s: when it came, on the monotonic clock.
        queued_s: how long it waited for a row at first.
        may_share: whether it takes blocks of others; else its whole prompt is prefilled.
    """

    number: int
    owner: Hashable
    prompt: int
    budget: int
    request: Request
    version: Version | None
    stream: Stream
    stage: Stage = "waiting"
    row: int | None = None
    blocks: list[int] = dataclasses.field(default_factory=list)
    prefilled: int = 0
    drawn: int = 0
    in_flight: int = 0
    overtaken: int = 0
    keys: PromptKeys | None = None
    published: int = 0
    may_share: bool = True
    arrived_s: float = 0.0
    queued_s: float | None = None

    @property
    def cached(self) -> int:
        """Positions in the cache; the last drawn token is not among them yet."""
        return self.prompt + self.drawn - 1 if self.drawn else self.prefilled

    @property
    def reach(self) -> int:
        """Positions in the cache at most, those of tokens in flight included."""
        return self.cached + self.in_flight

    @property
    def left(self) -> int:
        """Tokens that it may still draw, those in flight aside."""
        return self.budget - self.drawn - self.in_flight


class Chunk(NamedTuple):
    """``length`` tokens of a sequence's prompt from position ``start``."""

    sequence: Sequence
    start: int
    length: int

    @property
    def last(self) -> bool:
        return self.start + self.length == self.sequence.prompt
