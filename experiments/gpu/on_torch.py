"""What the stages that use torch have in common: device, timing, CUDA graphs. Needs torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.gpu.items import Skip

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.float16 if CUDA else torch.float32
# Weights take turns over more than the card's cache.
CACHE_BYTES = 180e6


def normal(*shape: int) -> torch.Tensor:
    """Standard normal numbers in half precision, made on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=HALF)


def wait() -> None:
    """Until the device has done all that was asked of it."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], calls: int, repeats: int = 5) -> float:
    """Median seconds of one of ``calls`` calls, queued and then waited for; the first are not timed."""
    for _ in range(2):
        function()
    wait()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        found.append((time.perf_counter() - began) / calls)
    return statistics.median(found)


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of the function, whose inputs stay where they are.

    Raises:
        Skip: there is no GPU.
    """
    if not CUDA:
        raise Skip("a CPU has no CUDA graphs")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By ``torch.compile`` for its shapes.

    Raises:
        Skip: there is no GPU.
    """
    if not CUDA:
        raise Skip("torch.compile is measured on a GPU alone")
    return torch.compile(function, dynamic=False)


def gigabytes() -> float | None:
    """The most that was allocated so far; ``None`` on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
