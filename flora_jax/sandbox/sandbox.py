"""Where generated programs run: bubblewrap with nothing to read, nothing to keep and little to use.

Inside there is no network, no home, none of the caller's environment, a read-only ``/usr`` and a
private ``/tmp`` in memory. Knows nothing of languages.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flora_jax.errors import InputError, RunError
from flora_jax.sandbox import seccomp
from flora_jax.sandbox.supervise import Process, Ran, StartError

_PATH = "/usr/local/bin:/usr/bin:/bin"
_ENVIRONMENT = {"PATH": _PATH, "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
# All of /etc that a toolchain of Debian looks at.
_ETC = ("alternatives", "ld.so.cache", "ldc2.conf", "dmd.conf", "racket", "perl")
_NOBODY = 65534
_TRIES = 3


@dataclass(frozen=True)
class Limits:
    """Bounds of one program, in bytes where not said otherwise.

    ``memory`` is the address space of a process, which runtimes reserve beyond what they use;
    ``resident`` is what all processes together really hold. ``wall`` times the seconds that a command
    may take by itself may pass in all, waiting for a core included.
    """

    memory: int = 4 << 30
    resident: int = 2 << 30
    wall: float = 4.0
    processes: int = 64
    open_files: int = 256
    file: int = 64 << 20
    tmp: int = 256 << 20
    output: int = 1 << 20


@dataclass(frozen=True)
class Sandbox:
    """Runs commands. ``root`` is the directory whose ``usr`` holds the toolchains.

    With ``unsafe`` commands run with the caller's rights in a new directory, with some of the limits.
    """

    root: str = "/"
    unsafe: bool = False
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Tries it once.

        Raises:
            InputError: no program can be run in it; the message says why and what to do.
        """
        if not sys.platform.startswith("linux"):
            raise InputError(f"programs are run on Linux only, this is {sys.platform}")
        needed = ["prlimit", *([] if self.unsafe else ["bwrap"])]
        needed += ["setpriv"] if os.geteuid() == 0 and not self.unsafe else []
        missing = [name for name in needed if shutil.which(name) is None]
        try:
            if not missing:
                found = self._once(("true",), {}, 10, None)[0]
                if found.exit_code == 0:
                    return
                said = found.stderr or f"{found.ending}, exit code {found.exit_code}"
                missing = [f"a command in it failed: {said}"]
            else:
                missing = [f"{', '.join(missing)} not found"]
        except StartError as error:
            missing = [str(error)]
        raise InputError(
            f"no sandbox: {missing[0].strip()}; generated programs are not to be trusted: install "
            "bubblewrap and util-linux and allow user namespaces, or say --unsafe to run them with "
            "your own rights"
        )

    def run(
        self,
        command: Sequence[str],
        files: Mapping[str, bytes],
        seconds: float,
        keep: str | None = None,
    ) -> tuple[Ran, bytes]:
        """Runs ``command`` beside ``files`` (executable, by name) for ``seconds`` at most.

        Its own processor time and the time that it sleeps are counted, not the time that it waits for
        a core; see :class:`~flora_jax.sandbox.supervise.Process`.

        Returns:
            What came of it, and the content of the file ``keep`` where the command exited with 0.

        Raises:
            RunError: the sandbox itself failed, several times.
        """
        for attempt in range(_TRIES):
            try:
                return self._once(command, files, seconds, keep)
            except StartError as error:
                last = error
                time.sleep(0.2 * (attempt + 1))
        raise RunError(f"the sandbox failed {_TRIES} times: {last}")

    def _once(
        self, command: Sequence[str], files: Mapping[str, bytes], seconds: float, keep: str | None
    ) -> tuple[Ran, bytes]:
        run = self._bare if self.unsafe else self._wrapped
        return run(command, files, seconds, keep)

    def _wrapped(
        self, command: Sequence[str], files: Mapping[str, bytes], seconds: float, keep: str | None
    ) -> tuple[Ran, bytes]:
        with contextlib.ExitStack() as stack:
            opened = {name: stack.enter_context(_memory(data)) for name, data in files.items()}
            kept = None if keep is None else stack.enter_context(_memory(b""))
            arguments = [*_outer(os.geteuid() == 0), *_namespace(self.root, self.limits)]
            for name, descriptor in opened.items():
                arguments += ["--perms", "0755", "--file", str(descriptor), f"/tmp/{name}"]
            filters = [stack.enter_context(_memory(code)) for code in (seccomp.program(),) if code]
            for descriptor in filters:
                arguments += ["--seccomp", str(descriptor)]
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            arguments += ["--json-status-fd", str(writing), "--", *self._limited(seconds)]
            if keep is not None:
                # The only way out of the sandbox is what is printed.
                arguments += [
                    "sh",
                    "-c",
                    'keep="$1"; shift; "$@" 1>&2 && exec cat "$keep"',
                    "sh",
                    keep,
                ]
            ran = Process(
                [*arguments, *command],
                # bubblewrap's own environment can be read inside, at /proc/1/environ.
                env=_ENVIRONMENT,
                cwd="/",
                seconds=seconds,
                wall=self.limits.wall * seconds,
                resident=self.limits.resident,
                output=self.limits.output,
                inherited=[*opened.values(), *filters],
                status=(reading, writing),
                stdout=kept,
            ).run()
            if kept is None or ran.exit_code != 0:
                return ran, b""
            return ran, _content(kept)

    def _bare(
        self, command: Sequence[str], files: Mapping[str, bytes], seconds: float, keep: str | None
    ) -> tuple[Ran, bytes]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            for name, data in files.items():
                path = Path(directory, name)
                path.write_bytes(data)
                path.chmod(0o755)
            env = _ENVIRONMENT | {
                key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ
            }
            ran = Process(
                [*self._limited(seconds), *command], env | {"TMPDIR": directory}, directory, seconds,
                self.limits.wall * seconds, self.limits.resident, self.limits.output,
            ).run()  # fmt: skip
            kept = Path(directory, keep) if keep is not None and ran.exit_code == 0 else None
            return ran, kept.read_bytes() if kept is not None and kept.is_file() else b""

    def _limited(self, seconds: float) -> list[str]:
        """Set inside: the count of processes is then the sandbox's own, not one of the whole user."""
        limits, whole = self.limits, math.ceil(seconds) + 1
        bounds = {
            "as": limits.memory, "fsize": limits.file, "nofile": limits.open_files, "core": 0,
            # Of each process, behind the watch over all of them. At the second the kernel kills.
            "cpu": f"{whole}:{whole + 1}",
        }  # fmt: skip
        if not self.unsafe:
            bounds["nproc"] = limits.processes
        return ["prlimit", *(f"--{name}={value}" for name, value in bounds.items()), "--"]


@functools.lru_cache
def _outer(root: bool) -> tuple[str, ...]:
    # No limit of processes binds the machine's root, whatever his number inside a namespace.
    number = str(_NOBODY)
    user = ("setpriv", "--reuid", number, "--regid", number, "--clear-groups", "--")
    return (*(user if root else ()), "bwrap")


@functools.lru_cache
def _namespace(root: str, limits: Limits) -> tuple[str, ...]:
    """bubblewrap's arguments but for the files and the command."""
    arguments = [
        # Namespaces of its own would give a program new, unbounded file systems.
        "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv",
    ]  # fmt: skip
    for name, value in _ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    arguments += ["--ro-bind", str(Path(root, "usr")), "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path(root, name)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), f"/{name}"]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), f"/{name}"]
    for name in _ETC:
        arguments += ["--ro-bind-try", str(Path(root, "etc", name)), f"/etc/{name}"]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--size", str(limits.tmp), "--tmpfs", "/tmp"]
    # What is mounted by default for the rest has no bound on its size.
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    return tuple(arguments)


@contextlib.contextmanager
def _memory(data: bytes) -> Iterator[int]:
    """A descriptor of a file that has no place on the disk."""
    descriptor = os.memfd_create("sandbox")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _content(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read()
