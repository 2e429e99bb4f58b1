"""Training steps over a frozen base in bfloat16: one adapter, and many in one step for the same tokens.

train PRESET LAYERS KIND,…
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from experiments.gpu.items import Stage, main


def stage(own: Stage, words: list[str]) -> None:
    from experiments.gpu import engines
    from flora_jax.bench.random_arrays import random_model
    from flora_jax.starcoder.config import PRESETS

    preset, layers, kinds = words
    rows, length = (2, 16) if own.rehearse else (8, 512)
    config = PRESETS[preset]
    config = dataclasses.replace(
        config, n_layer=int(layers) or config.n_layer, n_positions=max(512, length)
    )
    model = random_model(config, "float32" if own.rehearse else "bfloat16")
    about: dict[str, Any] = {
        "preset": preset, "layers": config.n_layer, "rows": rows, "tokens": length,
    }  # fmt: skip
    own.put("weights", **about)
    for text in kinds.split(","):
        kind, rank = engines.kind_and_rank(text)
        for count in (rows,) if own.rehearse else (1, rows):
            run = partial(
                measure, model, kind, rank, count, (rows, length), 1 if own.rehearse else 6
            )
            own.attempt(
                "train", run, kind=kind, rank=rank, adapters=count,
                need_s=0 if own.rehearse else 10, **about,
            )  # fmt: skip


def measure(
    model: Any, kind: str, rank: int, count: int, size: tuple[int, int], repeats: int
) -> Mapping[str, Any]:
    """Steps of ``count`` adapters on rows and tokens together, as a run does them: with the platform's
    choices, and a step's loss read once the next is dispatched.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from flora_jax.adapters.model_adapter import init_adapter
    from flora_jax.train.adapt import (
        GroupedBatch,
        StepOptions,
        init_adapter_state,
        make_adapter_step,
        make_optimizer,
    )
    from flora_jax.train.choice import choose

    config, (rows, length) = model.config, size

    def layers() -> Any:
        made = init_adapter(
            jax.random.key(0), kind, config.projections(), config.n_layer, rank=rank
        )
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), made.layers)

    schedule = optax.constant_schedule(1e-3)
    optimizer = make_optimizer(schedule, weight_decay=0.01)
    # Under one compilation: an operation by itself would be a program each.
    own_layers = jax.jit(layers)()
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda own: init_adapter_state(own, optimizer))(own_layers)
    notes: list[str] = []
    dtype = jax.tree.leaves(model.params)[0].dtype
    options = choose(StepOptions(), config, dtype, length, notes.append)
    step = make_adapter_step(model.graph, optimizer, schedule, options)
    each = rows // count
    tokens = jax.random.randint(
        jax.random.key(1), (each, count, length + 1), 1, config.vocab_size, jnp.int32
    )
    shape = (each, count, length)
    batch = GroupedBatch(
        tokens, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
        jnp.ones(shape, jnp.int32), jnp.ones(shape, jnp.float32),
    )  # fmt: skip
    keys_N = jax.random.split(jax.random.key(0), count)
    found = []
    began = time.perf_counter()
    state, measured = step(state, model.params, batch, keys_N)
    jax.block_until_ready(measured)
    compiled_s = time.perf_counter() - began
    ended = time.perf_counter()
    for _ in range(repeats + 2):
        before = measured
        state, measured = step(state, model.params, batch, keys_N)
        loss = float(before["loss"][0])
        found.append(time.perf_counter() - ended)
        ended += found[-1]
    seconds = statistics.median(found[2:] or found)
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {
        "ms": 1e3 * seconds, "tok_s": rows * length / seconds, "loss": loss,
        "attention": options.attention, "notes": notes, "compiled_s": compiled_s,
        "peak_GB": None if peak is None else peak / 1e9,
    }  # fmt: skip


if __name__ == "__main__":
    main(stage)
