"""Many calls of a function in one program, to time those that take less than a call costs.

On a GPU the host needs some 30 µs to start a program and wait for it, and a projection of 10 to 50 µs
whose weight is a few megabytes would be read from the cache. There the calls run in a loop on the device,
each one's input made from the output before it, over several sets of arguments in turn which exceed the
cache together. On a CPU a run is one call. Knows nothing of adapters.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.platforms import Platform

# How much of the output before is in a call's input: little, so that the numbers stay where they are.
SHARE = 1 / 16


# Each set is a call of its own in the program, which takes the longer to compile for it.
_MOST_SETS = 32
# What a call's length is guessed by, so that a run has about the length that the platform asks for.
_BYTES_PER_SECOND, _OPERATIONS_PER_SECOND = 3e12, 6e14


def sets_of(own: Platform, held_bytes: float) -> int:
    """How many sets of arguments, of so many bytes each, take turns; of small ones too few to exceed the
    cache.
    """
    return min(_MOST_SETS, max(1, math.ceil(own.timed_bytes / held_bytes)))


def rounds_of(own: Platform, sets: int, moved: float, operations: float) -> int:
    """How often all sets are gone through, for calls that move so many bytes and do such operations."""
    one = max(moved / _BYTES_PER_SECOND, operations / _OPERATIONS_PER_SECOND)
    return max(1, math.ceil(own.timed_seconds / (sets * one)))


def several(tree: Any, sets: int) -> list[Any]:
    """So many different sets of a tree's arrays: itself, and others rolled along their last axis."""
    return [tree, *(_rolled(tree, jnp.int32(number)) for number in range(1, sets))]


@jax.jit
def _rolled(tree: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jnp.roll(leaf, number, axis=-1) if leaf.ndim else leaf, tree)


def follow(x_xI: jax.Array, y_xO: jax.Array) -> jax.Array:
    """The next call's input: the first one's, and a little of the output ``[..., O]`` before."""
    width = x_xI.shape[-1]
    y_xO = y_xO[..., :width]
    rest = [(0, 0)] * (y_xO.ndim - 1) + [(0, width - y_xO.shape[-1])]
    added = jnp.float32(SHARE) * jnp.pad(y_xO, rest).astype(jnp.float32)
    return (x_xI.astype(jnp.float32) + added).astype(x_xI.dtype)


def looped(
    function: Callable[..., jax.Array], rounds: int
) -> Callable[[jax.Array, Sequence[tuple[Any, ...]]], jax.Array]:
    """``(x, sets) → y``: calls ``function(x_n, *own)`` with every set in turn, in so many rounds.

    ``x_0`` is ``x``, the next ones come from :func:`follow`; the last call's output is returned. A
    barrier after each keeps XLA from computing a part of it alone, or nothing. One call in all is the
    function itself.
    """

    def program(x: jax.Array, sets: Sequence[tuple[Any, ...]]) -> jax.Array:
        if rounds * len(sets) == 1:
            return function(x, *sets[0])

        def one_round(_: jax.Array, y: jax.Array) -> jax.Array:
            for own in sets:
                y = jax.lax.optimization_barrier(function(follow(x, y), *own))
            return y

        shape = jax.eval_shape(function, x, *sets[0])
        return jax.lax.fori_loop(0, rounds, one_round, jnp.zeros(shape.shape, shape.dtype))

    return program


class Calls(NamedTuple):
    """A compiled program and how many calls of what is measured one run of it has."""

    run: Callable[[], Any]
    calls: int


class Compiler:
    """Compiles programs in threads: XLA lets go of the interpreter, tracing does not."""

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def submit(self, lowered: Any) -> concurrent.futures.Future[Any]:
        """The compiled program, when it is there."""
        return self._threads.submit(lowered.compile)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
