"""Decode steps of the engine's own programs: milliseconds a step by attention, kind, rank and positions.

    decode PRESET LAYERS HOW,… ROWS KIND,… POSITIONS,…

LAYERS 0 is all of them; fewer compile sooner, and the others take as long. HOW is as
:func:`experiments.gpu.engines.variant` has it. All tokens are drawn greedily. ``ms_step`` is from
dispatches queued behind each other, ``ms_step_waited`` from one whose tokens are read before the next,
as the engine does without anything to overlap; ``host_ms`` is until a dispatch is queued.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.gpu.compiling import Ready, compiled_first
from experiments.gpu.items import Stage, main

# Dispatches of one item: not timed, waited for one by one, and queued.
_FIRST, _WAITED, _ROUNDS, _QUEUED = 2, 4, 3, 4


def stage(own: Stage, words: list[str]) -> None:
    from experiments.gpu import engines
    from flora_jax.serve.options import EngineOptions

    preset, layers, attentions, row_count, kinds, spans = words
    rows, positions = int(row_count), [int(word) for word in spans.split(",")]
    steps = 2 if own.rehearse else 16
    began = time.time()
    model = engines.load(preset, int(layers), max(positions), own.rehearse)
    about: dict[str, Any] = {"preset": preset, "layers": model.config.n_layer, "rows": rows}
    own.put("weights", **about, took_s=round(time.time() - began, 2))
    options = EngineOptions(
        max_num_seqs=rows, max_model_len=max(positions), row_buckets=(rows,), decode_steps=steps,
        max_num_batched_tokens=8192,
    )  # fmt: skip

    def begin(attention: str, text: str) -> tuple[Any, list[Any]]:
        """A rig, and its programs."""
        rig = engines.Rig(model, text, options, engines.variant(attention, own.rehearse))
        names = [rig.decoding(span) for span in positions]
        return rig, rig.lowered(*names, f"draw {rows} tokens, greedy")

    cases = [(attention, text) for attention in attentions.split(",") for text in kinds.split(",")]
    need_s = 2.0 * len(cases) * len(positions)
    for (attention, text), ready in compiled_first(own, cases, begin, 8, need_s):
        kind, rank = engines.kind_and_rank(text)
        for span in positions:

            def measure(ready: Callable[[], Ready] = ready, span: int = span) -> Mapping[str, Any]:
                rig, compiled_s = ready()
                return {"compiled_s": compiled_s, **timed(rig, span, steps)}

            own.attempt(
                "decode",
                measure,
                attention=attention,
                kind=kind,
                rank=rank,
                positions=span,
                **about,
            )
        del ready  # With the bank and the cache.


def start(span: int, steps: int) -> int:
    """The position before the first of an item's dispatches, the last of which ends at the span."""
    return max(1, span - steps * (_FIRST + _WAITED + _ROUNDS * _QUEUED) - 1)


def step(rig: Any, sequences: Any, steps: int) -> Any:
    """Queues one dispatch; the tokens, on the device."""
    from flora_jax.serve.scheduler import Decode

    tokens_BN = rig.decode(Decode.of(sequences, steps, False)).tokens_BN
    for sequence in sequences:
        sequence.drawn += steps
    return tokens_BN


def timed(rig: Any, span: int, steps: int) -> dict[str, Any]:
    """Medians of one rig at one number of positions."""
    import numpy as np

    from flora_jax.serve.state import BROKEN

    sequences = rig.sequences(start(span, steps))
    for _ in range(_FIRST):
        tokens_BN = step(rig, sequences, steps)
    rig.wait()
    host, waited, queued = [], [], []
    for _ in range(_WAITED):
        began = time.perf_counter()
        tokens_BN = step(rig, sequences, steps)
        host.append(time.perf_counter() - began)
        tokens = np.asarray(tokens_BN)
        waited.append((time.perf_counter() - began) / steps)
    for _ in range(_ROUNDS):
        rig.wait()
        began = time.perf_counter()
        for _ in range(_QUEUED):
            tokens_BN = step(rig, sequences, steps)
        rig.wait()
        queued.append((time.perf_counter() - began) / steps / _QUEUED)
    seconds = statistics.median(queued)
    return {
        "ms_step": 1e3 * seconds, "ms_step_waited": 1e3 * statistics.median(waited),
        "host_ms": 1e3 * statistics.median(host), "tok_s": rig.rows / seconds,
        "steps": steps, "broken": int((tokens == BROKEN).sum()),
    }  # fmt: skip


if __name__ == "__main__":
    main(stage)
