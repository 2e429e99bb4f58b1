"""Adapters that get slots before a request asks for them.

For the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from flora_jax.errors import InputError, RunError
from flora_jax.serve.registry import Version
from flora_jax.serve.residency import Residency
from flora_jax.serve.scheduler import Admission


class Preloading:
    """The versions that are to be placed and have no slots yet; what is read for them is kept until then.

    Args:
        residency: where they get their slots.
        is_current: whether a version's name stands for it still.
        is_awaited: whether a sequence waits for a version, whose read is not to be lost.
    """

    def __init__(
        self,
        residency: Residency,
        is_current: Callable[[Version], bool],
        is_awaited: Callable[[Version], bool],
    ):
        self._residency = residency
        self._is_current, self._is_awaited = is_current, is_awaited
        self._placing: set[Version] = set()

    def place_all(self, wanted: Sequence[Version], pause: Callable[[], object]) -> None:
        """Places them in turn, all read side by side; ``pause`` is called while one is being read.

        Raises:
            InputError: one cannot be read or does not fit. None that was not placed yet will be.
            RunError: running sequences leave no slots for one, and the same.
        """
        self._placing |= {*wanted}
        try:
            for known in wanted:
                self._residency.prefetch(known)
            for known in wanted:
                while (found := self.place(known)) == "loading":
                    pause()
                    self._residency.expire()
                if found == "full":
                    raise RunError(
                        f"adapter {known.name!r}: running requests leave no slots for it"
                    )
        finally:
            self._give_up(self._placing.intersection(wanted))

    def place(self, known: Version) -> Admission:
        """One attempt, which waits for nothing; "ready" once it has slots and is written there.

        Raises:
            InputError: it cannot be read or does not fit.
        """
        self._placing.add(known)
        try:
            found = self._residency.claim(known)
        except InputError:
            self._give_up([known])
            raise
        if found == "ready":
            self._placing.discard(known)
            self._residency.write_claimed()
            self._residency.release(known)
        return found

    def give_up_replaced(self) -> None:
        """Places none any more whose name stands for something else by now, or for nothing."""
        self._give_up([known for known in self._placing if not self._is_current(known)])

    def forget(self, known: Version) -> None:
        """Lets go of what was read of a version, unless somebody waits for it."""
        if known not in self._placing and not self._is_awaited(known):
            self._residency.forget(known)

    def _give_up(self, versions: Iterable[Version]) -> None:
        for known in versions:
            self._placing.discard(known)
            self.forget(known)
