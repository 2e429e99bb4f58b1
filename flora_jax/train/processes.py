"""Several processes that train one run together, each on its own devices: who speaks for all of them.

Every process computes the same on its part of the rows; the first one alone decides what depends on
files, and writes them. Checkpoints are written by all. A process that ends before the others ends them
too: JAX's coordination service tells them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from flora_jax.errors import InputError

Found = TypeVar("Found")
# Seconds without a sign of life after which a process counts as dead. Signs come from a thread of JAX's
# that waits for nobody.
_SILENCE_S = 20


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> bool:
    """Meets the other processes, before JAX computes anything.

    Without arguments it does so where the environment says how: ``JAX_COORDINATOR_ADDRESS``, and the
    numbers from Slurm, Open MPI or Kubernetes.

    Args:
        coordinator: ``HOST:PORT``, at which process 0 listens.
        processes: how many there are.
        process: which one this is, from 0.

    Returns:
        Whether there are others to meet.

    Raises:
        InputError: arguments that are not all there or do not fit, or the others did not come.
    """
    given = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return False
    if missing and len(missing) < len(given):
        raise InputError(f"{missing[0]} is missing, expected all of {', '.join(given)} or none")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"coordinator is {coordinator!r}, expected HOST:PORT")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InputError(f"process_id is {process}, expected 0 to {processes - 1}")
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=_SILENCE_S
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes did not meet: {str(error).splitlines()[0]}") from None
    return True


def is_first() -> bool:
    """Whether this process writes what all of them have found; so does one that is alone."""
    return jax.process_index() == 0


def told(find: Callable[[], Found]) -> Found:
    """What ``find`` gives the first process, something that JSON can hold, for all of them.

    Raises:
        InputError: it was raised there; in every process.
    """
    if jax.process_count() == 1:
        return find()
    message: dict[str, object] = {}
    if is_first():
        try:
            message = {"found": find()}
        except InputError as error:
            message = {"error": str(error)}
    own = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(own.size)))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = own
    text = np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes()
    heard = json.loads(text)
    if "error" in heard:
        raise InputError(heard["error"])
    found: Found = heard["found"]
    return found


def any_of(flag: bool) -> bool:
    """Whether it is set in any process; all of them ask at the same point of the run."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
