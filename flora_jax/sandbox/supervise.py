"""Waits for one untrusted process: reads what it prints, and ends it when it goes over a limit.

Knows nothing of languages, and of the sandbox only that it may report a process of its own to watch
and whether its command was run. Linux only: it waits on process descriptors.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# "starved": not its own time, but that of the clock ran out.
Ending = Literal["exited", "timeout", "starved", "output", "memory"]
_LOOK = 0.1  # Seconds between two looks at the memory and the times of a program.
_TICK = 1 / os.sysconf("SC_CLK_TCK")  # Seconds; the kernel counts processor time in them.
# A deadline missed by so many seconds says nothing of the program: this process did not run itself.
_LATE = 5.0
_RUNNING: set[subprocess.Popen[bytes]] = set()
_LOCK = threading.Lock()
_stops = 0  # Calls of kill_running.


class StartError(RuntimeError):
    """The sandbox, not the program in it, failed; the message is the sandbox's."""


class Stopped(RuntimeError):
    """:func:`kill_running` has ended the program."""


@dataclass(frozen=True)
class Ran:
    """What came of a command: ``exit_code`` is -1 where it was ended, ``seconds`` is wall time."""

    ending: Ending
    exit_code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass
class Process:
    """A command and the bounds of its run: times in seconds, sizes in bytes.

    ``seconds`` bounds the time that the command itself takes: processor time of all its processes, and
    time in which all of them sleep. Time in which it waits for a core, because others run, is not
    counted, so that the outcome is the same on a busy machine; ``wall`` bounds all of it together.
    ``resident`` bounds the memory of all its processes together and ``output`` what it prints;
    ``status`` is a descriptor on which a sandbox reports itself, ``stdout`` one that takes the
    command's output instead of a pipe.
    """

    command: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    seconds: float
    wall: float
    resident: int
    output: int
    inherited: Sequence[int] = ()
    status: tuple[int, int] | None = None
    stdout: int | None = None

    def run(self) -> Ran:
        """Runs it to its end or over a limit; none of its processes is left in the end.

        Raises:
            StartError: the sandbox did not get as far as running the command.
            Stopped: ``kill_running`` was called meanwhile.
        """
        started = time.monotonic()
        before = _stops
        passed = [*self.inherited, *([self.status[1]] if self.status else [])]
        try:
            # A session of its own: no terminal to type into, and one process group to kill.
            process = subprocess.Popen(
                self.command, env=dict(self.env), cwd=self.cwd, pass_fds=passed,
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                stdout=subprocess.PIPE if self.stdout is None else self.stdout,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise StartError(str(error)) from None
        finally:
            if self.status:
                os.close(self.status[1])
        with _LOCK:
            _RUNNING.add(process)
        try:
            if _stops == before:  # Else it may not have been among those that were killed.
                ran = _Watch(self, process, started).watch()
                if _stops == before:
                    return ran
            raise Stopped
        except StartError:
            if _stops != before:
                raise Stopped from None
            raise
        finally:
            _kill(process)
            process.wait()
            with _LOCK:
                _RUNNING.discard(process)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


class _Watch:
    """One run in progress."""

    def __init__(self, bounds: Process, process: subprocess.Popen[bytes], started: float) -> None:
        self.bounds, self.process, self.started = bounds, process, started
        self.said: dict[int, bytearray] = {}
        self.names: dict[str, int] = {}
        self.inner: int | None = None
        self.inner_gone: int | None = None

    def watch(self) -> Ran:
        with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
            gone = os.pidfd_open(self.process.pid)
            closing.callback(os.close, gone)
            closing.callback(self._close_inner)
            selector.register(gone, selectors.EVENT_READ)
            pipes = {"stdout": self.process.stdout, "stderr": self.process.stderr}
            descriptors = {name: pipe.fileno() for name, pipe in pipes.items() if pipe is not None}
            if self.bounds.status:
                descriptors["status"] = self.bounds.status[0]
            for name, descriptor in descriptors.items():
                os.set_blocking(descriptor, False)
                self.said[descriptor], self.names[name] = bytearray(), descriptor
                selector.register(descriptor, selectors.EVENT_READ)
            ending = self._until_end(selector, gone)
            _kill(self.process)  # Or what it has left, if it has ended itself.
            self.process.wait()
            self._wait_for_inner()
            for descriptor in self.said:
                self._read(descriptor)
            if ending == "exited" and self._printed() > self.bounds.output:
                ending = "output"
            return self._result(ending)

    def _until_end(self, selector: selectors.BaseSelector, gone: int) -> Ending:
        deadline = self.started + self.bounds.wall
        last, look = self.started, self.started + _LOOK
        busy = idle = 0.0  # Seconds.
        while True:
            now = time.monotonic()
            if now >= deadline + _LATE:
                raise StartError(f"the machine stood still for {now - deadline:.0f} s")
            if now >= deadline:
                return "starved"
            if now >= look:
                seen = self._look()
                if seen.resident > self.bounds.resident:
                    return "memory"
                # Threads that work do not show in the state of their process, but in its time.
                if not seen.runnable and seen.busy <= busy:
                    idle += now - last
                busy, last, look = max(busy, seen.busy), now, now + _LOOK
                if busy + idle >= self.bounds.seconds:
                    return "timeout"
            ready = selector.select(max(0.0, min(deadline, look) - now))
            for key, _ in ready:
                if key.fd == gone:
                    return "exited"
                if not self._read(key.fd, once=True):
                    selector.unregister(key.fd)
            if self._printed() > self.bounds.output:
                return "output"

    def _read(self, descriptor: int, once: bool = False) -> bool:
        """Takes what is there, up to just over the bound; false at the end of the file."""
        said = self.said[descriptor]
        while len(said) <= self.bounds.output:
            try:
                data = os.read(descriptor, 65536)
            except BlockingIOError:
                return True
            said += data
            if descriptor == self.names.get("status") and self.inner is None:
                self._find_inner(said)
            if not data:
                return False
            if once:
                return True
        return True

    def _printed(self) -> int:
        own = self.names.get("status")
        return sum(len(said) for descriptor, said in self.said.items() if descriptor != own)

    def _reports(self, said: bytes | bytearray) -> dict[str, int]:
        found: dict[str, int] = {}
        for line in bytes(said).split(b"\n")[:-1]:  # What follows the last newline is not whole.
            found |= json.loads(line)
        return found

    def _find_inner(self, said: bytearray) -> None:
        pid = self._reports(said).get("child-pid")
        if pid is not None:
            self.inner = pid
            with contextlib.suppress(OSError):  # It is gone already.
                self.inner_gone = os.pidfd_open(pid)

    def _wait_for_inner(self) -> None:
        """The first process of a namespace is gone when every other one in it is."""
        if self.inner_gone is not None:
            select.select([self.inner_gone], [], [], 10)

    def _close_inner(self) -> None:
        if self.inner_gone is not None:
            os.close(self.inner_gone)

    def _look(self) -> _Seen:
        """All processes in the sandbox, by its own list of them."""
        if self.inner is None:
            if self.bounds.status:  # The command is not running yet.
                return _Seen(0, 0.0, True)
            return _look_at([Path(f"/proc/{self.process.pid}")])
        with contextlib.suppress(OSError):
            listed = Path(f"/proc/{self.inner}/root/proc")
            if listed.stat().st_dev != Path("/proc").stat().st_dev:  # Else not yet in its own.
                return _look_at(listed.glob("[0-9]*"))
        return _Seen(0, 0.0, True)

    def _result(self, ending: Ending) -> Ran:
        seconds = time.monotonic() - self.started
        stdout, stderr = (
            bytes(self.said.get(self.names.get(name, -1), b""))[: self.bounds.output]
            .decode("utf-8", "replace") for name in ("stdout", "stderr")
        )  # fmt: skip
        if ending != "exited":
            return Ran(ending, -1, stdout, stderr, seconds)
        code = self.process.returncode
        if self.bounds.status:
            reported = self._reports(self.said[self.names["status"]])
            if "exit-code" not in reported:
                raise StartError(stderr.strip() or f"it ended with exit code {code}")
            code = reported["exit-code"]
        # The kernel's own limit, for a process that ended between two looks; as shells and as Python
        # have the signal.
        if code in (128 + signal.SIGXCPU, -signal.SIGXCPU):
            return Ran("timeout", code, stdout, stderr, seconds)
        return Ran("exited", code, stdout, stderr, seconds)


@dataclass(frozen=True)
class _Seen:
    """Processes at one time: bytes of memory, processor time in seconds, and whether any wants a core.

    Memory is all anonymous memory, shared or not. Time is that of children that have ended as well.
    """

    resident: int
    busy: float
    runnable: bool


def _look_at(places: Iterable[Path]) -> _Seen:
    resident, ticks, runnable = 0, 0, False
    for place in places:
        try:
            lines = (place / "status").read_text().splitlines()
            # The name before the last parenthesis may hold anything.
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It ended since it was listed.
            continue
        resident += sum(
            1024 * int(line.split()[1])
            for line in lines
            if line.startswith(("RssAnon:", "RssShmem:"))
        )
        runnable |= fields[0] in "RD"  # Running or waiting for a core, or for a disk.
        ticks += sum(map(int, fields[11:15]))
    return _Seen(resident, ticks * _TICK, runnable)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # Its group is named by its number, which is its own until it has been waited for.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def kill_running() -> None:
    """Ends every program that runs now; whoever waits for it gets :class:`Stopped`."""
    global _stops
    with _LOCK:
        _stops += 1
        for process in _RUNNING:
            _kill(process)
