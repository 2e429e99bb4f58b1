"""What a decode step's programs cost the thread that launches them: arguments and launching apart.

    host PRESET LAYERS ROWS KIND,… POSITIONS

``us_arguments`` is a program that takes the forward pass's arguments and does nothing, ``us_forward`` the
forward pass and ``us_draw`` the drawing, each launched while the device has nothing else to do and timed
until the call returns. ``us_lists`` is what the engine does before them, once a dispatch. Where a forward
pass takes the device less than the host, the engine waits for the host.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.gpu.items import Stage, main

_ROUNDS = 30


def stage(own: Stage, words: list[str]) -> None:
    from experiments.gpu import engines
    from flora_jax.serve.options import EngineOptions

    preset, layers, row_count, kinds, span = words
    rows, positions = int(row_count), int(span)
    model = engines.load(preset, int(layers), positions, own.rehearse)
    about: dict[str, Any] = {"preset": preset, "layers": model.config.n_layer, "rows": rows}
    own.put("weights", **about)
    options = EngineOptions(
        max_num_seqs=rows, max_model_len=positions, row_buckets=(rows,), max_num_batched_tokens=8192,
        decode_steps=1,
    )  # fmt: skip
    for text in kinds.split(","):
        kind, rank = engines.kind_and_rank(text)

        def measure(text: str = text) -> Mapping[str, Any]:
            how = engines.variant("auto+split", own.rehearse)
            return timed(engines.Rig(model, text, options, how), positions)

        own.attempt(
            "host", measure, kind=kind, rank=rank, positions=positions,
            need_s=0 if own.rehearse else 15, **about,
        )  # fmt: skip


def timed(rig: Any, positions: int) -> dict[str, Any]:
    """Medians, in microseconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flora_jax.serve.scheduler import Decode
    from flora_jax.serve.state import pack

    sequences = rig.sequences(positions - 1)
    decode = Decode.of(sequences, 1, False)
    rig.decode(decode)  # Compiles.
    rig.wait()

    def lists() -> Any:
        shape, pairs = rig.lattice.decode([one.version for one in sequences], positions)
        return rig.sent(pack(dataclasses.replace(rig.nothing(shape), pairs=pairs)))

    packed = lists()
    rows_B = rig.sent(jnp.arange(rig.rows, dtype=jnp.int32))
    logits_BV = jnp.zeros((rig.rows, rig.config.vocab_size))
    # An argument that no result depends on would be left out.
    nothing = jax.jit(lambda arguments: jnp.int32(0), keep_unused=True)

    def arguments() -> Any:
        leaves = jax.tree.leaves(rig.forward_call(packed).arguments)
        return nothing([leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)])

    def forward() -> None:
        rig.cache, _ = rig.forward_call(packed).run()

    def draw() -> None:
        tokens_BN = rig.resting(rig.rows)
        rig.state_rows, _ = rig.draw_call(logits_BV, rows_B, tokens_BN, "greedy").run()

    named: dict[str, Callable[[], Any]] = {
        "lists": lists, "arguments": arguments, "forward": forward, "draw": draw
    }  # fmt: skip
    return {f"us_{name}": 1e6 * median(work, rig) for name, work in named.items()}


def median(work: Callable[[], Any], rig: Any) -> float:
    """Seconds until ``work`` returns, the device idle before it."""
    import jax

    found = []
    for _ in range(_ROUNDS + 3):
        rig.wait()
        began = time.perf_counter()
        result = work()
        found.append(time.perf_counter() - began)
        jax.block_until_ready(result)
    return statistics.median(found[3:])


if __name__ == "__main__":
    main(stage)
