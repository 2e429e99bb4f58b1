"""What a decode dispatch costs the host: the engine's own code over programs that do nothing."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from flora_jax.adapters.model_adapter import init_adapter
from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.platforms import Platform
from flora_jax.serve import steps
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Request, SamplingParams
from flora_jax.serve.scheduler import Decode
from flora_jax.serve.sequence import Sequence

LAYERS, ROWS, ADAPTERS, RANK, VOCABULARY = 40, 32, 4, 8, 64
CONFIG = StarCoderConfig(
    vocab_size=VOCABULARY, n_positions=256, n_embd=16, n_layer=LAYERS, n_head=2, n_inner=32
)


@functools.partial(
    jax.jit, static_argnames=("definition", "platform"), donate_argnames="cache", keep_unused=True
)
def _forward(
    definition: Any, platform: Any, leaves: Any, layers: Any, cache: Any, rows: Any, packed: Any
) -> tuple[Any, jax.Array]:
    """The arguments and results of :func:`flora_jax.serve.steps.forward`."""
    return cache, jnp.zeros((ROWS, VOCABULARY))


@functools.partial(
    jax.jit, static_argnames=("definition", "platform", "most"), donate_argnames=("cache", "rows"),
    keep_unused=True,
)  # fmt: skip
def _decode(
    definition: Any, platform: Any, leaves: Any, layers: Any, cache: Any, rows: Any, packed: Any,
    *, most: int,
) -> tuple[Any, Any, jax.Array]:  # fmt: skip
    """Those of :func:`flora_jax.serve.steps.decode`."""
    return cache, rows, jnp.zeros((ROWS, most), jnp.int32)


def running_engine(platform: Platform) -> tuple[Engine, list[Sequence]]:
    """An engine whose rows all decode, as far as the host knows, and their sequences."""
    projections = CONFIG.projections()
    adapters = {
        str(n): init_adapter(jax.random.key(n), "flora", projections, LAYERS, rank=RANK)
        for n in range(ADAPTERS)
    }
    options = EngineOptions(max_num_seqs=ROWS, max_model_len=CONFIG.n_positions)
    engine = Engine(init_model(CONFIG), adapters, options=options, platform=platform)
    engine.preload(adapters)
    sequences = []
    for row in range(ROWS):
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        engine.add(Request((1, 2, 3), params, str(row % ADAPTERS)))
        sequence = engine._inbox.pop()
        assert isinstance(sequence, Sequence)
        sequence.row, sequence.blocks = row, list(range(16 * row, 16 * row + 16))
        sequence.stage, sequence.prefilled, sequence.drawn = "decode", 3, 1
        sequences.append(sequence)
    return engine, sequences


def dispatch_seconds(platform: Platform, rounds: int = 30) -> float:
    """Median seconds of the thread that dispatches a decoding of one step, with all that the host does
    for it: lists of adapters and pages, packing, the program's arguments. Sampling's own dispatch is
    among it where that is a program of its own.
    """
    with mock.patch.multiple(steps, forward=_forward, decode=_decode):
        engine, sequences = running_engine(platform)
        device, found = engine.device, []
        for _ in range(rounds + 3):
            began = time.thread_time()
            tokens_BN = device.decode(Decode.of(sequences, 1, False)).tokens_BN
            found.append(time.thread_time() - began)
            jax.block_until_ready((tokens_BN, device.cache, device.state_rows))
            time.sleep(0)
    engine.close()
    return statistics.median(found[3:])
