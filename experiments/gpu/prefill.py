"""Prompts through the engine's own programs: one chunk of one prompt by attention, kind and length.

    prefill PRESET LAYERS HOW,… KIND,… LENGTH,…

HOW is as :func:`experiments.gpu.engines.variant` has it; all but the first run the first kind alone.
``TFLOP_s`` counts the projections once for every token, and attention; what an adapter multiplies besides
is not counted, so that kinds may be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.gpu.compiling import Ready, compiled_first
from experiments.gpu.items import Stage, main


def stage(own: Stage, words: list[str]) -> None:
    from experiments.gpu import engines
    from flora_jax.serve.options import EngineOptions
    from flora_jax.serve.sequence import Chunk

    preset, layers, attentions, kinds, numbers = words
    lengths = [int(word) for word in numbers.split(",")]
    model = engines.load(preset, int(layers), 2 * max(lengths), own.rehearse)
    config = model.config
    about: dict[str, Any] = {"preset": preset, "layers": config.n_layer, "rows": 1}
    own.put("weights", **about)

    def begin(attention: str, text: str, length: int) -> tuple[Any, list[Any]]:
        """A rig and its chunk, and its programs."""
        options = EngineOptions(
            max_num_seqs=1, max_model_len=length, chunk=length, prefill_chunks=1,
            max_num_batched_tokens=length + 1,
        )  # fmt: skip
        rig = engines.Rig(model, text, options, engines.variant(attention, own.rehearse))
        # One token more in the prompt, or the chunk would be its last, and draw a token.
        sequence = rig.sequences(0, prompt=length + 1)[0]
        form = rig.form_of(sequence)
        named = f"{form.multiplicative} + {form.additive} components"
        return (rig, Chunk(sequence, 0, length)), rig.lowered(named)

    (chosen, *others), texts = attentions.split(","), kinds.split(",")
    cases = [(chosen, text, length) for length in lengths for text in texts]
    cases += [(attention, texts[0], length) for length in lengths for attention in others]
    weights = config.n_layer * sum(a * b for a, b in config.projections().values())
    for (attention, text, length), ready in compiled_first(own, cases, begin, 12, len(cases)):
        kind, rank = engines.kind_and_rank(text)

        def measure(ready: Callable[[], Ready] = ready, length: int = length) -> Mapping[str, Any]:
            (rig, chunk), compiled_s = ready()
            seconds = timed(rig, chunk, 1 if own.rehearse else 3)
            operations = 2 * weights * length + 2 * config.n_layer * config.hidden_size * length**2
            rates = {"tok_s": length / seconds, "TFLOP_s": operations / seconds / 1e12}
            return {"compiled_s": compiled_s, "ms": 1e3 * seconds, **rates}

        own.attempt(
            "prefill", measure, attention=attention, kind=kind, rank=rank, tokens=length, **about
        )
        del ready  # With the bank and the cache.


def timed(rig: Any, chunk: Any, repeats: int, queued: int = 3) -> float:
    """Median seconds of a dispatch, some queued behind each other."""
    rig.prefill([chunk])
    found = []
    for _ in range(repeats):
        rig.wait()
        began = time.perf_counter()
        for _ in range(queued):
            rig.prefill([chunk])
        rig.wait()
        found.append((time.perf_counter() - began) / queued)
    return statistics.median(found)


if __name__ == "__main__":
    main(stage)
