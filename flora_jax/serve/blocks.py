"""The cache's blocks: who holds them, and which full ones later prompts can share.

A block is free, held by one or more sequences, or kept: nobody holds it, but its content has a key and
is still there. Kept blocks are given out again, the ones used least recently first, when no free ones
are left. A block that has a key is full and is never written again, so sharing one needs no copy. Knows
nothing of tokens, arrays or scheduling.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class Blocks:
    """``count`` blocks, by number.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._keys: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}
        # Blocks with a key that nobody holds; the first one was used least recently.
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Those among them that can be shared."""
        return len(self._kept)

    def is_known(self, key: bytes) -> bool:
        return key in self._found

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of ``keys`` that are all there."""
        blocks = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_take(self, shared: Sequence[int], more: int) -> bool:
        """Whether ``more`` blocks are left beside those ``shared`` ones."""
        return more <= self.available - sum(block in self._kept for block in shared)

    def share(self, blocks: Sequence[int]) -> None:
        """Another sequence holds these."""
        for block in blocks:
            self._holders[block] += 1
            self._kept.pop(block, None)

    def take(self, number: int) -> list[int]:
        """So many blocks, held by one sequence, with nothing of use in them.

        Raises:
            IndexError: so many are not available.
        """
        taken: list[int] = []
        for _ in range(number):
            if self._free:
                block = self._free.pop()
            elif self._kept:
                block, _ = self._kept.popitem(last=False)
                del self._found[self._keys.pop(block)]
            else:
                raise IndexError(f"{number} blocks wanted, {len(taken)} are available")
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, key: bytes) -> None:
        """What a held block has from now on can be found by its key; a key that is known is left."""
        if key not in self._found:
            self._found[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence holds these no longer; its last blocks are the first to be given out again."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._free.append(block)

    def forget(self) -> None:
        """Nothing that nobody holds can be found any longer."""
        for block in self._kept:
            del self._found[self._keys.pop(block)]
            self._free.append(block)
        self._kept.clear()


def block_keys(root: bytes, token_ids: Sequence[int], block: int) -> list[bytes]:
    """A key for each full block of tokens, which stands for all tokens up to its end.

    Args:
        root: stands for what else decides the content: the adapter's.
        token_ids: of a sequence, from its start.
        block: positions of a block.
    """
    data = np.asarray(token_ids, np.int32).tobytes()
    size = 4 * block
    keys, before = [], root
    for start in range(0, len(data) - size + 1, size):
        # Cryptographic: nobody can make up tokens that find another's blocks.
        before = hashlib.blake2b(before + data[start : start + size], digest_size=16).digest()
        keys.append(before)
    return keys
