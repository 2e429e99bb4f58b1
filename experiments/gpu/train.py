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

from experiments.gpu.items import Skip, Stage, main


def stage(own: Stage, words: list[str]) -> None:
    from experiments.gpu import engines
    from flora_jax.bench.receipts.random_arrays import random_model
    from flora_jax.models.starcoder.config import PRESETS
    from flora_jax.platforms import platform

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
    chosen = {one: step_options(one, own.rehearse) for one in (engines.AUTO, "cudnn", "einsum")}
    texts = kinds.split(",")
    cases = [(text, rows, engines.AUTO) for text in texts]
    if not own.rehearse:
        cases = [(text, count, engines.AUTO) for text in texts for count in (1, rows)]
    # What the package does not choose, once.
    other = "einsum" if platform().training_attention == "cudnn" else "cudnn"
    cases.append((texts[0], 1, other))
    for text, count, attention in cases:
        kind, rank = engines.kind_and_rank(text)
        run = partial(
            measure, model, (kind, rank, count), (rows, length), chosen[attention],
            1 if own.rehearse else 6,
        )  # fmt: skip
        own.attempt(
            "train", run, kind=kind, rank=rank, adapters=count, attention=attention,
            need_s=0 if own.rehearse else 10, **about,
        )  # fmt: skip


def step_options(attention: str, rehearse: bool) -> Any:
    """The platform's choices of a step with another attention, ``auto`` its own; ``None`` where it cannot
    have it.
    """
    from experiments.gpu import engines
    from flora_jax.platforms import platform
    from flora_jax.train.loss import HeadChunks
    from flora_jax.train.step import StepOptions

    wanted, here = engines.choices(rehearse), platform()
    if attention == engines.AUTO:
        attention = here.training_attention
    elif attention == "cudnn" != here.training_attention:
        return None
    return StepOptions(
        attention=attention, rounded=wanted.rounded_results,
        head=HeadChunks(wanted.head_numbers, wanted.even_head_chunks),
    )  # fmt: skip


def measure(
    model: Any, adapters: tuple[str, int, int], size: tuple[int, int], options: Any, repeats: int
) -> Mapping[str, Any]:
    """Steps of adapters (kind, rank, count) on rows and tokens together, read one by one as a run does.

    Raises:
        Skip: the platform cannot have such a step.
    """
    if options is None:
        raise Skip("a CPU has no cuDNN")
    import jax
    import jax.numpy as jnp
    import optax

    from flora_jax.adapters.model_adapter import init_adapter
    from flora_jax.train.step import (
        GroupedBatch,
        init_adapter_state,
        make_adapter_step,
        make_optimizer,
    )

    config, (rows, length), (kind, rank, count) = model.config, size, adapters

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
        "attention_used": options.attention, "compiled_s": compiled_s,
        "peak_GB": None if peak is None else peak / 1e9,
    }  # fmt: skip


if __name__ == "__main__":
    main(stage)
