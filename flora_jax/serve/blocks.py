"""The cache's blocks: who holds them, and which full ones later prompts can share.

A block is free, held by one or more sequences, or kept: nobody holds it, but its content has keys and
is still there. Kept blocks are given out again, the ones used least recently first, when no free ones
are left. Knows nothing of tokens, arrays or scheduling.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence


class Blocks:
    """``count`` blocks, by number.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._keys: dict[int, list[bytes]] = {}
        self._found: dict[bytes, int] = {}
        self._forgotten: list[bytes] = []
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
                self._forget(block)
            else:
                raise IndexError(f"{number} blocks wanted, {len(taken)} are available")
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, key: bytes) -> None:
        """What a held block has can be found by a key from now on; a key that is known is left."""
        if key not in self._found:
            self._found[key] = block
            self._keys.setdefault(block, []).append(key)

    def _forget(self, block: int) -> None:
        for key in self._keys.pop(block):
            del self._found[key]
            self._forgotten.append(key)

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

    def take_forgotten(self) -> list[bytes]:
        """Keys that can no longer be found, since this was last asked: for who keeps more by them."""
        gone = [key for key in self._forgotten if key not in self._found]
        self._forgotten.clear()
        return gone
