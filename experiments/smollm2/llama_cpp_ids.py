"""The ids that llama.cpp's rules give a text under a byte-level vocabulary, slowly and from the start.

An oracle for converted tokenizers: knows nothing of the package's or transformers' tokenizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import regex

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# How a byte-level vocabulary writes a byte: printable ones as they are, others from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {byte: chr(byte) for byte in _PRINTABLE}
_BYTES |= {byte: chr(256 + place) for place, byte in enumerate(_OTHERS)}


class LlamaCppIds:
    """A vocabulary and its merges, as a GGUF file has them.

    Args:
        tokens: by id.
        merges: two pieces each with a blank between them, the first to be merged first.
        digits_apart: whether each digit is split off before GPT-2's split, as ``tokenizer.ggml.pre`` of
            "smollm", "starcoder" and "refact" has it.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], digits_apart: bool):
        self._numbers = {token: number for number, token in enumerate(tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._digits_apart = digits_apart

    def __call__(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        parts = regex.split(r"(\p{N})", text) if self._digits_apart else [text]
        words = [word for part in parts for word in regex.findall(_GPT2, part)]
        return [self._numbers[piece] for word in words for piece in self._merged(word)]

    def _merged(self, word: str) -> list[str]:
        """The merge of the least rank first, the leftmost of these first, until none is left."""
        pieces, none = [_BYTES[byte] for byte in word.encode()], len(self._ranks)
        while True:
            ranks = [self._ranks.get(pair, none) for pair in itertools.pairwise(pieces)]
            if min(ranks, default=none) == none:
                return pieces
            at = ranks.index(min(ranks))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
