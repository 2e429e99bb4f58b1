"""A server in a process of its own, for experiments that are its clients. Only the standard library."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flora_jax.errors import RunError


class ServerProcess:
    """A server that answers at ``url``; ``read`` asks it for a path.

    Args:
        process: the server's.
        url: where it listens.
        log: what it prints.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def read(self, path: str) -> str:
        """The body of an answer with status 200; ``OSError`` for any other."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return answer.read().decode()

    def wait_until(self, path: str, seconds: float) -> None:
        """Waits until ``path`` answers 200.

        Raises:
            RunError: it ended before, or took longer.
        """
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                self.read(path)
                return
            time.sleep(0.2)
        tail = " ".join(self.log.read_text(errors="replace")[-500:].split())
        raise RunError(
            f"{self.url}{path} did not answer (exit code {self.process.returncode}): {tail}"
        )

    def resident_bytes(self) -> int:
        """Memory of the process that is in RAM."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def end(self, seconds: float = 60.0) -> int:
        """Asks it to end, and returns its exit code; -9 where it does not end in time."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


@contextlib.contextmanager
def started(
    command: Sequence[str],
    log: Path,
    *,
    ready: str = "/ready",
    seconds: float = 600.0,
    cpus: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """A server, ready, and ended afterwards.

    Args:
        command: gets ``--host`` and ``--port`` behind it.
        log: where its output goes.
        ready: the path that answers 200 once it is.
        seconds: until then, at most.
        cpus: what ``taskset -c`` takes; ``None`` leaves it all.
        environment: added to this process's.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pinned = ["taskset", "-c", cpus] if cpus else []
    words = [*pinned, *command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        # A session of its own: its children end with it, and its processor time is told from others'.
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    server = ServerProcess(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until(ready, seconds)
        yield server
    finally:
        server.end()
