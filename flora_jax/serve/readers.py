"""Slow calls on threads of their own, each with a deadline. Knows nothing of adapters or JAX."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any


class Reading:
    """One call on its way; ``done`` once there is a result or an error."""

    def __init__(self, call: Callable[[], Any]):
        self.call = call
        self.began_s: float | None = None
        self.done = False
        # Whether its thread is still inside the call although the deadline has passed.
        self.hung = False
        self._result: Any = None
        self._error: BaseException | None = None

    def result(self) -> Any:
        """What the call returned; raises what it raised, or ``TimeoutError``."""
        assert self.done
        if self._error is not None:
            raise self._error
        return self._result

    def end(self, result: Any, error: BaseException | None) -> None:
        self._result, self._error, self.done = result, error, True


class Readers:
    """A few daemon threads that make calls; nothing ever waits for one that hangs.

    A call that is not back in time fails, and another thread takes the place of the one that it holds.
    So calls that hang delay others by their deadline at most, and never for good.

    Args:
        threads: calls that run at once.
        timeout_s: seconds that a call may take from when it begins.
        on_end: called from a reader's thread whenever a call has ended.
    """

    def __init__(self, threads: int, timeout_s: float, on_end: Callable[[], None] = lambda: None):
        self.timeout_s = timeout_s
        self._threads, self._on_end = threads, on_end
        self._started = self._idle = 0
        self._queue: collections.deque[Reading] = collections.deque()
        self._running: set[Reading] = set()
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, call: Callable[[], Any]) -> Reading:
        """Makes a call as soon as a thread is free."""
        reading = Reading(call)
        with self._changed:
            self._queue.append(reading)
            if self._idle < len(self._queue) and self._started < self._threads:
                self._start()
            self._changed.notify()
        return reading

    def cancel(self, reading: Reading) -> bool:
        """Whether a call has not begun and now never will."""
        with self._changed:
            if reading in self._queue:
                self._queue.remove(reading)
                return True
            return False

    def expire(self) -> None:
        """Fails the calls whose deadline has passed."""
        with self._changed:
            now_s = time.monotonic()
            for reading in [r for r in self._running if _began(r) + self.timeout_s <= now_s]:
                self._running.discard(reading)
                reading.hung = True
                reading.end(None, TimeoutError(f"not read within {self.timeout_s:g} s"))
                self._started -= 1
                if self._queue:
                    self._start()

    def deadline_s(self) -> float | None:
        """When :meth:`expire` should be called, by ``time.monotonic``; ``None`` where nothing runs.

        Never later than the next deadline, maybe earlier.
        """
        with self._changed:
            ends = [_began(reading) + self.timeout_s for reading in self._running]
            if self._queue:
                ends.append(time.monotonic() + self.timeout_s)
            return min(ends, default=None)

    def close(self) -> None:
        """Makes no further calls. Does not wait for those that run."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    def _start(self) -> None:
        self._started += 1
        threading.Thread(target=self._work, name="adapters", daemon=True).start()

    def _work(self) -> None:
        while self._make_next():
            pass

    def _make_next(self) -> bool:
        """Makes one call when there is one; whether there is a place for this thread behind it.

        A function of its own, so that a thread that waits for the next call keeps no result of the last.
        """
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._queue or self._closed)
            self._idle -= 1
            if self._closed:
                return False
            reading = self._queue.popleft()
            reading.began_s = time.monotonic()
            self._running.add(reading)
        result, error = None, None
        try:
            result = reading.call()
        except BaseException as raised:  # Whoever asks for the result gets it.
            error = raised
        with self._changed:
            if reading not in self._running:
                reading.hung = False
                return False  # The deadline has passed: another thread has this one's place.
            self._running.discard(reading)
            reading.end(result, error)
        self._on_end()
        return True


def _began(reading: Reading) -> float:
    assert reading.began_s is not None
    return reading.began_s
