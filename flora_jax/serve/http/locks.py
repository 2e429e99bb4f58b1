"""Locks by name: what is done to one name is done one after another, different names do not wait."""

from __future__ import annotations

import asyncio
import weakref


class NameLocks:
    """A lock for every name that somebody holds, or waits for; it goes with the last of them."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def of(self, name: str) -> asyncio.Lock:
        """The name's lock."""
        return self._locks.setdefault(name, asyncio.Lock())

    def __len__(self) -> int:
        return len(self._locks)
