"""Output that appears whole or not at all, in a directory that one process writes at a time.

Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import fnmatch
import json
import os
import secrets
import shlex
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from flora_jax.errors import InputError

Target = str | os.PathLike[str]
LOCK = ".lock"
"""The file of :func:`directory_lock` in its directory."""


@contextlib.contextmanager
def directory_lock(target: Target) -> Iterator[Path]:
    """Makes ``target`` if it is missing, and keeps all other processes from it until the end.

    Take it before anything in the directory is read or written. The kernel releases it at any death
    of the process. A file in the directory says who holds it; :func:`entries` leaves it out, and it is
    removed at the end, together with directories made here that stayed empty. A second lock in the
    same process is refused as well.

    Yields:
        The directory as an absolute path, links followed.

    Raises:
        InputError: another process holds it (the message says which), or nothing can be written there.
    """
    path = Path(target).resolve()
    missing = [one for one in (path, *path.parents) if not one.exists()]
    descriptor = _lock(path, target)
    try:
        yield path
    finally:
        # Removed while it is locked: who has opened it meanwhile sees that, and starts again.
        (path / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # Something is in it, as it should be.
            for one in missing:
                one.rmdir()


def _lock(path: Path, target: Target) -> int:
    """The descriptor of the lock file, locked."""
    if _is_no_directory(path):
        raise InputError(f"{target}: is a file, expected a directory")
    last = "its lock file is removed again and again"
    for _ in range(100):
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        # Its last user may have removed it in between, also while `mkdir` saw that it was there.
        except (FileNotFoundError, FileExistsError) as error:
            last = str(error.strerror)
            continue
        except OSError as error:
            raise InputError(f"{target}: cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(descriptor, path / LOCK):
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps(_this_process()).encode())
                return descriptor
        except BlockingIOError:
            said = _holder(descriptor)
            os.close(descriptor)
            raise InputError(f"{target}: {said}") from None
        except OSError as error:
            os.close(descriptor)
            raise InputError(f"{target}: cannot be locked: {error.strerror}") from None
        os.close(descriptor)
    raise InputError(f"{target}: cannot be written to: {last}")


def _is_no_directory(path: Path) -> bool:
    """Whether something else is there; looked at once, as another may remove it between two looks."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _holder(descriptor: int) -> str:
    """Who holds a lock, from the file that it writes at once after locking."""
    for _ in range(20):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            raw = json.loads(os.pread(descriptor, 1 << 20, 0))
            return (
                f"in use by process {raw['pid']} on {raw['host']} since {raw['started']} "
                f"({raw['command']})"
            )
        time.sleep(0.01)
    return "in use by another process"


def entries(path: Path) -> list[Path]:
    """What is in a directory, sorted, but for the file of its lock."""
    return sorted(one for one in path.iterdir() if one.name != LOCK)


def require_new(target: Target, replaces: Sequence[str] = ()) -> Path:
    """``target`` as an absolute path, links followed: a directory that may be written, which is tried.

    Args:
        target: where the directory is to be.
        replaces: patterns of the names that an older output may have, which the new one then replaces;
            with none, nothing may be there.

    Raises:
        InputError: it is a file, a directory with something (else) in it, where a file system is
            mounted, or where nothing can be written.
    """
    path = Path(target).resolve()
    if _is_no_directory(path):
        raise InputError(f"{target}: exists already, and is not an empty directory")
    if path.is_dir():
        names = [one.name for one in entries(path)]
        strange = [n for n in names if not any(fnmatch.fnmatchcase(n, one) for one in replaces)]
        if strange and replaces:
            raise InputError(f"{target}: holds {strange[0]}, which is not overwritten")
        if strange:
            raise InputError(f"{target}: exists already, and is not an empty directory")
    if path.is_mount():  # Nothing can be renamed to it.
        raise InputError(f"{target}: a file system is mounted there; give a directory inside it")
    try:
        place = next(above for above in path.parents if above.exists())
        part = _part(place / path.name)
        part.mkdir()
        part.rmdir()
    except OSError as error:
        raise InputError(f"{target}: cannot be written to: {error.strerror}") from None
    return path


def require_file(target: Target, overwrite: bool, option: str = "output") -> Path:
    """``target`` as the path of a file that is written at the end, tried before the work begins.

    Args:
        target: where the file is to be.
        overwrite: whether it may replace one that is there.
        option: what messages call it.

    Raises:
        InputError: it is there already, is a directory, or cannot be written.
    """
    path = Path(target)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--{option} is {target}, expected a file in an existing directory")
    if path.exists() and not overwrite:
        raise InputError(f"--{option} is {target}, which exists already; --overwrite replaces it")
    part = _part(path.resolve())
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(
            f"--{option} is {target}, which cannot be written: {error.strerror}"
        ) from None
    return path


@contextlib.contextmanager
def whole_directory(target: Target, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A directory to write into that gets the name ``target`` once all is written, or goes away.

    What was there of the names that it ``replaces`` goes away in the same moment.

    Raises:
        InputError: see :func:`require_new`; or nothing can be written there.
    """
    path = require_new(target, replaces)
    part, old = _part(path), _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise InputError(f"{target}: cannot be written to: {error.strerror}") from None
    try:
        yield part
        if path.is_dir() and any(path.iterdir()):
            path.rename(old)
        part.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Target) -> Iterator[TextIO]:
    """A UTF-8 text file to write into; see :func:`whole_path`."""
    with whole_path(target) as part, part.open("w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def whole_path(target: Target) -> Iterator[Path]:
    """Where to write a file that replaces ``target`` once all is written, or goes away.

    What a symbolic link points to is replaced, not the link.
    """
    path = Path(target).resolve()
    part = _part(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Whether this is output that a killed process left half written."""
    return path.name.endswith(".part")


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
