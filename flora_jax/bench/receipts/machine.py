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
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[2]
# Options whose values no result shows.
_KEYS = ("--api-key", "--admin-key")
_VERSIONS = ("jax", "jaxlib", "flax", "numpy")


def receipt() -> dict[str, Any]:
    """What every result says of where it comes from: command, date, machine and versions."""
    return {
        "command": command(),
        "date": now(),
        "machine": describe(),
        "versions": versions(),
    }


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
    """The command line as one would type it, without the place that the program lies in, and without
    keys of servers.
    """
    program = Path(sys.argv[0])
    if program.name == "__main__.py" or program.stem == "flora-jax":
        words = ["flora-jax"]
    else:
        here = Path.cwd()
        inside = program.is_absolute() and program.is_relative_to(here)
        words = ["python", str(program.relative_to(here) if inside else program)]
    return shlex.join([*words, *_without_keys(sys.argv[1:])])


def _without_keys(words: list[str]) -> list[str]:
    found = [
        f"{word.partition('=')[0]}=..."
        if word.startswith(tuple(f"{key}=" for key in _KEYS))
        else word
        for word in words
    ]
    return [
        "..." if before in _KEYS else word
        for before, word in zip(["", *found], found, strict=False)
    ]


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def memory_bytes() -> int | None:
    """Memory that a measurement may count on: the device's, on a CPU what is free now."""
    import jax

    # A CPU's devices have no memory of their own.
    own = jax.devices()[0].memory_stats()
    return _meminfo("MemAvailable") if own is None else own.get("bytes_limit")


def memory_bandwidth(megabytes: int | None = None, repeats: int = 7) -> float:
    """Bytes a second that the device reads or writes at best, over arrays larger than its caches.

    The best of three programs over random numbers: the largest entry of every row of a float32 matrix
    and its product with a vector, which only read, and an elementwise function, which reads and writes.
    The fastest of ``repeats`` runs counts; a run is as
    :mod:`~flora_jax.bench.receipts.device_loop` has it.
    ``megabytes`` of the matrix default to 256 on a CPU and to 2,048 elsewhere.
    """
    import jax
    import jax.numpy as jnp

    from flora_jax.bench.receipts import device_loop
    from flora_jax.bench.receipts.random_arrays import draw
    from flora_jax.bench.receipts.timing import interleaved
    from flora_jax.platforms import platform

    pace = platform()
    if megabytes is None:
        megabytes = 256 if pace.timed_seconds == 0 else 2048
    x_XI = draw((megabytes * 256, 1024), "float32", 0)
    rounds = device_loop.rounds_of(pace, 1, x_XI.nbytes, 0)
    if rounds > 1:
        rounds *= 4  # A loop over the matrix itself begins with a copy of it, which is not counted.
    # The carry is a part of what is read, or all of it, so that no call can be left out.
    programs = {
        "largest": (lambda z_X, x_XI: jnp.max(x_XI + z_X[0], axis=1), jnp.zeros(len(x_XI)), 1),
        "vector": (lambda v_I, x_XI: x_XI @ v_I, draw((1024, 1), "float32", 1, scale=2**-5), 1),
        "scalar": (lambda x_XI, one: one - x_XI, x_XI, 2),
    }

    def made(name: str) -> Any:
        function, first, _ = programs[name]
        own = jnp.float32(1) if name == "scalar" else x_XI

        def program(first: jax.Array, own: jax.Array) -> jax.Array:
            if rounds == 1:
                return function(first, own)

            def again(_: jax.Array, carry: jax.Array) -> jax.Array:
                y = jax.lax.optimization_barrier(function(carry, own))
                return y if y.shape == carry.shape else carry + 2**-10 * y[: len(carry)]

            return jax.lax.fori_loop(0, rounds, again, first)

        return functools.partial(jax.jit(program), first, own)

    seconds = interleaved({name: made(name) for name in programs}, repeats)
    return max(
        passes * rounds * x_XI.nbytes / min(seconds[n]) for n, (_, _, passes) in programs.items()
    )


def product_rate(
    dtype: str = "float32", sizes: tuple[int, ...] | None = None, repeats: int = 5
) -> float:
    """Operations a second of the best square matrix product in ``dtype``, summed up in float32.

    A product of ``n × n`` random matrices counts ``2·n³``. ``sizes`` defaults to 1,024 and 2,048 on a
    CPU, and to 4,096 and 8,192 elsewhere; the fastest of all runs counts.
    """
    from flora_jax.platforms import platform

    if sizes is None:
        sizes = (1024, 2048) if platform().timed_seconds == 0 else (4096, 8192)
    return max(2 * n**3 / product_seconds(n, n, n, dtype, repeats)[0] for n in sizes)


def product_seconds(
    rows: int, inputs: int, outputs: int, dtype: str, repeats: int = 5
) -> tuple[float, float]:
    """Shortest and median seconds of a product ``[rows, inputs] @ [inputs, outputs]`` in ``dtype``.

    Random numbers, weights that exceed the cache together, and each product's input from the result
    before it, as :mod:`~flora_jax.bench.receipts.device_loop` has it.
    """
    import jax
    import jax.numpy as jnp

    from flora_jax.bench.receipts import device_loop
    from flora_jax.bench.receipts.random_arrays import draw
    from flora_jax.bench.receipts.timing import interleaved
    from flora_jax.platforms import platform

    pace, size = platform(), jnp.dtype(dtype).itemsize
    moved = float(size * (inputs * outputs + rows * (inputs + outputs)))
    sets = device_loop.sets_of(pace, size * inputs * outputs)
    rounds = device_loop.rounds_of(pace, sets, moved, 2.0 * rows * inputs * outputs)
    W_IO = draw((inputs, outputs), dtype, 1, scale=inputs**-0.5)
    x_XI = draw((rows, inputs), dtype, 0)

    def multiply(first_XI: jax.Array, *W_N: jax.Array) -> jax.Array:
        def once(_: jax.Array, x_XI: jax.Array) -> jax.Array:
            for W_IO in W_N:
                y_XO = jnp.matmul(x_XI, W_IO, preferred_element_type=jnp.float32).astype(dtype)
                y_XO = jax.lax.optimization_barrier(y_XO)
                # Of the same size as the input, so that a square product costs nothing besides.
                x_XI = y_XO if inputs == outputs else device_loop.follow(first_XI, y_XO)
            return x_XI

        if rounds * sets == 1:
            return jnp.matmul(first_XI, W_N[0], preferred_element_type=jnp.float32)
        return jax.lax.fori_loop(0, rounds, once, first_XI)

    program = functools.partial(jax.jit(multiply), x_XI, *device_loop.several(W_IO, sets))
    times = interleaved({"product": program}, repeats)["product"]
    return min(times) / (rounds * sets), statistics.median(times) / (rounds * sets)


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
