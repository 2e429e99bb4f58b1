"""Which blocks of the cache a prompt can share with others that begin alike, or are the same.

A prompt's full blocks have a key each, which stands for its adapter and for all tokens up to the block's
end; the whole prompt has one more. Who has the same whole prompt needs no prefill: its full blocks are
shared, what lies in the last one is copied, and its first token is drawn from the activations that the
other's prefill left. Who only begins alike shares the full blocks. Plain Python, without arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flora_jax.serve import sequence as scheduled
from flora_jax.serve.blocks import Blocks


class PromptKeys(NamedTuple):
    """``blocks``: of a prompt's full blocks, in order; ``whole``: of all its tokens, for those who can
    take what another's prefill left.
    """

    blocks: list[bytes]
    whole: bytes | None = None


class Found(NamedTuple):
    """What a prompt shares: ``blocks`` to hold; ``whole``: there is nothing to be prefilled; ``source``:
    the block that has its last tokens, where these fill none.
    """

    blocks: list[int]
    whole: bool = False
    source: int | None = None


class Prefixes:
    """Finds and publishes beginnings among the blocks.

    Args:
        blocks: the cache's.
        size: positions of a block.
        stride: beginnings that are not whole prompts are shared in multiples of so many positions.
    """

    def __init__(self, blocks: Blocks, size: int, stride: int = 1):
        self.blocks, self.size, self.stride = blocks, size, stride
        # Tokens of prompts that were looked up, and those of them that need no prefill.
        self.queries = self.hits = 0

    def find(self, sequence: scheduled.Sequence) -> Found:
        """What is there of a prompt. Its last token is left out where it is not whole: who prefills
        needs the logits after it.
        """
        keys = sequence.keys
        if not sequence.may_share or not keys:
            return Found([])
        matched = self.blocks.match(keys.blocks)
        if len(matched) == len(keys.blocks) and keys.whole is not None:
            source = self.blocks.match([keys.whole])
            if source:
                partial = sequence.prompt % self.size != 0
                return Found(matched, True, source[0] if partial else None)
        return Found(matched[: self._stretch(sequence, len(matched))])

    def _stretch(self, sequence: scheduled.Sequence, number: int) -> int:
        """How many of so many blocks are shared."""
        number = min(number, (sequence.prompt - 1) // self.size)
        while number and number * self.size % self.stride:
            number -= 1
        return number

    def count(self, sequence: scheduled.Sequence) -> None:
        """Counts what was found for a sequence that starts."""
        if sequence.keys and sequence.may_share:
            self.queries += sequence.prompt
            self.hits += sequence.prefilled

    def publish(self, sequence: scheduled.Sequence) -> None:
        """Lets others find what is filled of a sequence, once all that was planned is dispatched."""
        keys = sequence.keys
        if keys is None:
            return
        filled = min(sequence.cached // self.size, len(keys.blocks))
        for number in range(sequence.published, filled):
            self.blocks.publish(sequence.blocks[number], keys.blocks[number])
        sequence.published = max(sequence.published, filled)
        if keys.whole is not None and sequence.prefilled == sequence.prompt:
            self.blocks.publish(sequence.blocks[(sequence.prompt - 1) // self.size], keys.whole)
            sequence.keys = keys._replace(whole=None)

    def coming(self, running: Iterable[scheduled.Sequence]) -> set[bytes]:
        """Keys of what running sequences are filling."""
        found: set[bytes] = set()
        for one in running:
            if one.keys is not None:
                found.update(one.keys.blocks[one.published :])
                if one.keys.whole is not None:
                    found.add(one.keys.whole)
        return found

    def will_grow(self, sequence: scheduled.Sequence, coming: set[bytes]) -> bool:
        """Whether a sequence will share more once what is ``coming`` is there."""
        keys = sequence.keys
        if not coming or not sequence.may_share or keys is None:
            return False
        if keys.whole in coming:
            return True
        known = number = len(self.blocks.match(keys.blocks))
        while number < len(keys.blocks) and keys.blocks[number] in coming:
            number += 1
        return self._stretch(sequence, number) > self._stretch(sequence, known)


def prompt_keys(root: bytes, token_ids: Sequence[int], size: int) -> PromptKeys:
    """The keys of a prompt.

    Args:
        root: stands for what else decides the content: the adapter's.
        token_ids: the prompt's.
        size: positions of a block.
    """
    blocks = block_keys(root, token_ids, size)
    rest = np.asarray(token_ids[len(blocks) * size :], np.int32).tobytes()
    last = blocks[-1] if blocks else root
    whole = hashlib.blake2b(last + rest, digest_size=16, person=b"whole prompt").digest()
    return PromptKeys(blocks, whole)


def block_keys(root: bytes, token_ids: Sequence[int], size: int) -> list[bytes]:
    """The keys of the full blocks of tokens that follow what ``root`` stands for."""
    data = np.asarray(token_ids, np.int32).tobytes()
    step = 4 * size
    keys, before = [], root
    for start in range(0, len(data) - step + 1, step):
        # Cryptographic: nobody can make up tokens that find another's blocks.
        before = hashlib.blake2b(before + data[start : start + step], digest_size=16).digest()
        keys.append(before)
    return keys
