"""The weight products of a decode step alone: what no engine of ours can be faster than.

See flora_jax/bench/layer/products.py; the prefill has B times the prompt's rows, and B in the head. It
also says what the machine itself allows: flora_jax/bench/receipts/shares.py. See protocol.py for
the rest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import protocol


def main(say: Callable[[dict[str, Any]], None]) -> None:
    options = protocol.read_options()
    import jax

    from flora_jax.bench.layer.products import products_alone
    from flora_jax.bench.receipts.machine import limits
    from flora_jax.bench.receipts.shares import least_decode_seconds, least_prefill_seconds
    from flora_jax.checkpoints.checkpoint import load_model

    loaded = load_model(options.model, "float32")

    @functools.cache
    def program(rows: int, tokens: int, steps: int) -> Callable[[], Any]:
        return products_alone(loaded, rows, tokens, steps)

    def seconds(rows: int, tokens: int, steps: int) -> float:
        run = program(rows, tokens, steps)
        started = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - started

    def measure(number: int, rows: int) -> dict[str, Any]:
        seconds(rows, options.prompt_len, 1)  # See protocol.py: the memory may be cold.
        prefill = seconds(rows, options.prompt_len, 1)
        decode = seconds(rows, 1, options.new_tokens - 1)
        return {"prefill_seconds": prefill, "total_seconds": prefill + decode}

    found, config, least = limits(), loaded.config, {}
    for rows in options.batches:
        measure(0, rows)
        drawn = rows * (options.new_tokens - 1)
        least[str(rows)] = {
            "prefill": least_prefill_seconds(found, config, rows * options.prompt_len, rows, 4),
            "decode": least_decode_seconds(found, config, drawn, rows, 4),
        }
    about = {"versions": protocol.versions("jax"), "limits": found, "least_seconds": least}
    protocol.serve_rounds(say, options, about, measure)


if __name__ == "__main__":
    protocol.run(main)
