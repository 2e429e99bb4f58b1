"""What the card can do at best, by JAX: bandwidth, products, and a call's cost to the host.

Thin products have the shape of a decode step's largest one, 6,144 x 24,576 in float16: they tell from how
many rows on a step is bound by arithmetic instead of by reading its weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from experiments.gpu.items import Stage, main


def stage(own: Stage, _: list[str]) -> None:
    import jax
    import jax.numpy as jnp

    from flora_jax.bench.receipts import machine

    devices = [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
    own.put("devices", devices=devices, jax=jax.__version__)
    megabytes, sizes, shape = (4, (64,), (64, 96)) if own.rehearse else (None, None, (6144, 24576))
    rows = (1, 8) if own.rehearse else (1, 8, 32, 64, 128, 256, 512, 1024)
    dtype = "float32" if own.rehearse else "bfloat16"

    def bandwidth() -> Mapping[str, Any]:
        return {"TB_s": machine.memory_bandwidth(megabytes) / 1e12}

    def square() -> Mapping[str, Any]:
        return {"TFLOP_s": machine.product_rate(dtype, sizes) / 1e12}

    own.attempt("bandwidth", bandwidth)
    own.attempt("square product", square, dtype=dtype)
    for count in rows:

        def thin(count: int = count) -> Mapping[str, Any]:
            least, median = machine.product_seconds(count, *shape, "float16")
            rates = {"TB_s": 2 * shape[0] * shape[1] / median / 1e12}
            rates["TFLOP_s"] = 2 * count * shape[0] * shape[1] / median / 1e12
            return {"us": 1e6 * median, "least_us": 1e6 * least, **rates}

        own.attempt("thin product", thin, rows=count, inputs=shape[0], outputs=shape[1])

    def calls() -> Mapping[str, Any]:
        program, zero = jax.jit(lambda x: x + 1), jnp.float32(0)
        found = {}
        for name, queued in (("waited_us", 1), ("queued_us", 200)):
            jax.block_until_ready(program(zero))
            best = float("inf")
            for _ in range(20):
                began = time.perf_counter()
                for _ in range(queued):
                    y = program(zero)
                jax.block_until_ready(y)
                best = min(best, (time.perf_counter() - began) / queued)
            found[name] = 1e6 * best
        return found

    own.attempt("call", calls)


if __name__ == "__main__":
    main(stage)
