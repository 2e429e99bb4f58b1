"""How much of the machine others used while one process, with its children, was measured (Linux)."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from types import TracebackType

TICKS = os.sysconf("SC_CLK_TCK")


class ForeignLoad:
    """``cores``: processor time of all but the session's processes, stolen time included, per second."""

    def __init__(self, session: int):
        self.session, self.cores = session, 0.0

    def __enter__(self) -> ForeignLoad:
        self._started, self._before = time.perf_counter(), self._foreign()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._started
        self.cores = max(0.0, round((self._foreign() - self._before) / seconds, 3))

    def _foreign(self) -> float:
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        return (user + nice + system + irq + softirq + steal - self._own()) / TICKS

    def _own(self) -> int:
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # It has ended.
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.session:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks


def wait_for_quiet(rest: float, most: float = 20.0) -> None:
    """Returns once all processes together have used less than a 20th of a core for ``rest`` seconds, or
    after ``most``: a contender may go on working for a while after its answer.
    """
    ends = time.perf_counter() + most
    load = ForeignLoad(0)  # A session that only the kernel's threads are of.
    while time.perf_counter() < ends:
        with load:
            time.sleep(rest)
        if load.cores < 0.05:
            return


def available_gib() -> float:
    """Memory that a new process could have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def machine() -> str:
    """The processor, its cores and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores of {processor}, {memory:.0f} GiB, {platform.system()}"
