"""What a figure was measured on: machine, versions, command; and the machine's own limits.

Importing it brings in no JAX; only the measurements do.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata as metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]
_VERSIONS = ("jax", "jaxlib", "flax", "numpy")


def describe() -> dict[str, Any]:
    """CPU, usable cores, memory in GiB and system; ``devices`` where JAX is loaded, else ``None``."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if _is_linux() else os.cpu_count(),
        "memory_gib": _gib(_meminfo("MemTotal")),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": _devices(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, flora_jax and the packages a result depends on; ``commit`` of a git checkout."""
    from flora_jax import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "flora_jax": __version__}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"commit": _commit()}


def command() -> str:
    """The command line as one would type it, without the place that the program lies in."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py" or program.stem == "flora-jax":
        words = ["flora-jax"]
    else:
        here = Path.cwd()
        inside = program.is_absolute() and program.is_relative_to(here)
        words = ["python", str(program.relative_to(here) if inside else program)]
    return shlex.join([*words, *sys.argv[1:]])


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def memory_bytes() -> int | None:
    """Memory that a measurement may count on: the device's, on a CPU what is free now."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return _meminfo("MemAvailable")
    return (device.memory_stats() or {}).get("bytes_limit")


def memory_bandwidth(megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes a second that the device reads or writes at best, over arrays larger than its caches.

    The best of three programs: the largest entry of every row of a float32 matrix and its product with
    a vector, which only read, and its product with a scalar, which reads and writes. The fastest of
    ``repeats`` runs counts.
    """
    import jax
    import jax.numpy as jnp

    from flora_jax.bench.timing import interleaved

    x_XI = jnp.ones((megabytes * 256, 1024), jnp.float32)
    programs = {
        "largest": (jax.jit(lambda x: jnp.max(x, axis=1)), 1),
        "vector": (jax.jit(lambda x: x @ jnp.ones((1024, 1))), 1),
        "scalar": (jax.jit(lambda x: x * 2), 2),
    }
    seconds = interleaved(
        {name: functools.partial(program, x_XI) for name, (program, _) in programs.items()}, repeats
    )
    return max(passes * x_XI.nbytes / min(seconds[n]) for n, (_, passes) in programs.items())


def product_rate(
    dtype: str = "float32", sizes: tuple[int, ...] | None = None, repeats: int = 5
) -> float:
    """Operations a second of the best square matrix product in ``dtype``, summed up in float32.

    A product of ``n × n`` matrices counts ``2·n³``. ``sizes`` defaults to 1,024 and 2,048 on a CPU,
    and to 4,096 and 8,192 elsewhere; the fastest of all runs counts.
    """
    import jax
    import jax.numpy as jnp

    from flora_jax.bench.timing import interleaved

    if sizes is None:
        sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192)
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    squares = {n: jnp.full((n, n), 0.5, dtype) for n in sizes}
    seconds = interleaved(
        {n: functools.partial(multiply, square, square) for n, square in squares.items()}, repeats
    )
    return max(2 * n**3 / min(times) for n, times in seconds.items())


def limits(dtype: str = "float32") -> dict[str, float]:
    """``bytes_per_second`` and ``operations_per_second`` of this machine, measured now."""
    return {
        "bytes_per_second": memory_bandwidth(),
        "operations_per_second": product_rate(dtype),
    }


def least_seconds(found: dict[str, float], moved: float, operations: float) -> float:
    """The shortest time in which a machine of these :func:`limits` could move so many bytes and do so
    many operations: a measured time's share of it says how much is left to gain."""
    return max(moved / found["bytes_per_second"], operations / found["operations_per_second"])


def _is_linux() -> bool:
    return sys.platform == "linux"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    # A virtual machine often hides the model: family and number tell generations apart.
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _meminfo(field: str) -> int | None:
    """Bytes of one line of ``/proc/meminfo``."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(s.split()[1]) for s in lines if s.startswith(f"{field}:")), None)


def _gib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**30, 1)


def _devices() -> list[str] | None:
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]


def _commit() -> str | None:
    """The checkout's commit, with a ``+`` where a tracked file of the package has changed since."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment inside somebody else's repository is not a checkout of this one.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno", ".")
    return commit and commit + ("+" if changed else "")
