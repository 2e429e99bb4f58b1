"""Fill-in-the-middle: the tokens that mark what stands before a gap, after it, and the gap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flora_jax.checkpoints.tokenizer import tokens_in_front

# What stands before the prefix, before the suffix, and before what is to be written, by the tokenizers
# that have them: StarCoder; SantaCoder; Qwen and Granite; CodeGemma's is Qwen's; Code Llama; DeepSeek.
_MARKS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


@dataclasses.dataclass(frozen=True)
class Infill:
    """The three marks of a tokenizer, and what it puts in front of every text."""

    prefix: int
    suffix: int
    middle: int
    first: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any | None) -> Infill | None:
        """A ``tokenizers.Tokenizer``'s; ``None`` where it has no such tokens."""
        if tokenizer is None:
            return None
        for marks in _MARKS:
            ids = [tokenizer.token_to_id(mark) for mark in marks]
            if None not in ids:
                return cls(ids[0], ids[1], ids[2], tuple(tokens_in_front(tokenizer)))
        return None

    def join(self, before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
        """The prompt whose completion stands between the two."""
        return (*self.first, self.prefix, *before, self.suffix, *after, self.middle)
