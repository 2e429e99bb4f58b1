"""The engine from end to end: all requests at once, each with its own adapter, from prompt to last token.

    engine PRESET LAYERS KIND,… ROWS PROMPT NEW

``ready_s`` is from the engine's making to the end of a first run that is not timed, all programs
compiled; a rehearsal compiles only what its requests need. ``compilations`` of the timed run is 0 where
nothing was left to compile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from experiments.gpu.items import Stage, main

# Different contents; the names repeat them.
_CONTENTS = 4


def stage(own: Stage, words: list[str]) -> None:
    import numpy as np

    from experiments.gpu import engines
    from flora_jax.bench.serving.drive import run_throughput
    from flora_jax.bench.serving.setup import Contender, make_adapters
    from flora_jax.serve.engine import Engine
    from flora_jax.serve.options import EngineOptions
    from flora_jax.serve.request import Request, SamplingParams

    preset, layers, kinds, *numbers = words
    rows, prompt, new = map(int, numbers)
    model = engines.load(preset, int(layers), prompt + new, own.rehearse)
    about: dict[str, Any] = {
        "preset": preset, "layers": model.config.n_layer, "rows": rows, "prompt": prompt, "new": new,
    }  # fmt: skip
    own.put("weights", **about)
    tokens_BT = np.random.default_rng(0).integers(1, model.config.vocab_size, (rows, prompt))

    def measure(kind: str, rank: int) -> Mapping[str, Any]:
        names = [str(row) for row in range(rows)]
        adapters = make_adapters(model.config, Contender(kind, rank), names, contents=_CONTENTS)
        requests = [
            Request(
                tokens.tolist(), SamplingParams(max_tokens=new, ignore_eos=True),
                adapter=names[row] if adapters else None,
            )
            for row, tokens in enumerate(tokens_BT)
        ]  # fmt: skip
        options = EngineOptions(
            max_num_seqs=rows, max_model_len=prompt + new, row_buckets=(rows,),
            prefix_caching=False,  # Both runs read the same prompts.
        )  # fmt: skip
        began = time.perf_counter()
        engine = Engine(model, adapters, options=options, platform=engines.choices(own.rehearse))
        try:
            if not own.rehearse:
                engine.warm_up()
            run_throughput(engine, requests)
            ready = time.perf_counter() - began
            found = run_throughput(engine, requests)
        finally:
            engine.close()
        wanted = (
            "output_throughput", "total_token_throughput", "duration", "iterations", "compilations",
        )  # fmt: skip
        more = {name: found[name] for name in wanted if name in found}
        return {"prompts": "read", "ready_s": ready, "requests_failed": found["failed"], **more}

    for text in kinds.split(","):
        kind, rank = engines.kind_and_rank(text)
        own.attempt(
            "engine", partial(measure, kind, rank), kind=kind, rank=rank,
            need_s=0 if own.rehearse else 15, **about,
        )  # fmt: skip


if __name__ == "__main__":
    main(stage)
