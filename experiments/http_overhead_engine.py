"""The engine by itself, for http_overhead.py: a line of JSON a request, a line for its answer.

    python experiments/http_overhead_engine.py MODEL ADAPTERS ROWS MAX_MODEL_LEN

It says ``{"ready": true}`` once everything is compiled, and then, for each line of standard input, the
fields of :class:`http_overhead.Load`, the figures of that load in this process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from http_overhead import MAX_LOGPROBS, Load

from flora_jax.bench.serving.drive import run_latency
from flora_jax.checkpoints import open_checkpoint
from flora_jax.cli.common import dtype_of, prepare_jax
from flora_jax.cli.serve import DECODE_S
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions


def main(model: Path, adapters: Path, rows: int, max_model_len: int) -> None:
    """Serves loads until standard input ends."""
    prepare_jax()
    opened = open_checkpoint(str(model))
    folders = {path.name: path for path in sorted(adapters.iterdir())[:rows]}
    # As the server makes its own: the same weights, adapters, tokenizer, sizes and programs.
    options = EngineOptions(
        max_num_seqs=rows, max_model_len=max_model_len, max_logprobs=MAX_LOGPROBS,
        decode_seconds=DECODE_S,
    )  # fmt: skip
    loaded = opened.load(dtype_of(None))
    with Engine(loaded, folders, tokenizer=opened.tokenizer, options=options) as engine:
        engine.warm_up()
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            load = Load(**json.loads(line))
            drawn = load.workload([*folders])
            found = run_latency(
                engine, drawn.requests, drawn.arrivals_s, max_concurrency=load.concurrency
            )
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
