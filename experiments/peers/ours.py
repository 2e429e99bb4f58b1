"""Our engine, with the adapters of --adapters, random ones of --kind, or none; see protocol.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import protocol

MAX_COMPONENTS = 8  # The largest rank that is served.


def main(say: Callable[[dict[str, Any]], None]) -> None:
    options = protocol.read_options(
        kind=dict(default="folders", help="folders (of --adapters), base, flora, lora, hira"),
        rank=dict(type=int, default=8, help="of random adapters"),
        target=dict(default="attn.c_attn", help="of random adapters"),
        quantize=dict(help="int8 or int4: the projections' weights in 8 or 4 bits"),
    )
    from flora_jax.checkpoints.checkpoint import load_model
    from flora_jax.peft.read import read_adapter
    from flora_jax.serve.engine import Engine, EngineOptions
    from flora_jax.serve.generate import generate as complete
    from flora_jax.serve.request import Request, SamplingParams

    quantize = options.rest.quantize
    model = load_model(options.model, "float32", quantize=quantize)
    config = model.config
    adapters: dict[str, Any] = {}
    if options.rest.kind == "folders":
        for name, folder in options.adapters.items():
            adapters[name] = read_adapter(folder, config.projections(), config.n_layer)
    elif options.rest.kind != "base":
        adapters = random_adapters(config, options)
    options = dataclasses.replace(options, adapters=adapters)
    engine = Engine(
        model,
        adapters,
        options=EngineOptions(
            max_num_seqs=max(options.batches),
            max_model_len=options.max_model_len,
            max_num_batched_tokens=options.max_batched_tokens,
            max_components=MAX_COMPONENTS,
            row_buckets=options.batches,
            prefix_caching=False,  # A round reads its prompts twice.
        ),
    )
    engine.warm_up()

    def generate(prompts: list[list[int]], names: protocol.Names, n: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=n, ignore_eos=True)
        requests = [
            Request(prompt, params, name) for prompt, name in zip(prompts, names, strict=True)
        ]
        return [[*completion.token_ids] for completion in complete(engine, requests)]

    packages = protocol.versions("flora-jax", "jax", "flax")
    weights = f"{quantize} projections, else float32" if quantize else "float32"
    protocol.serve_generation(say, options, packages, generate, weights=weights)


def random_adapters(config: Any, options: protocol.Options) -> dict[str, Any]:
    """As many as the largest batch has rows, far from the identity."""
    import jax

    from flora_jax.adapters.model_adapter import init_adapter, randomise

    kind, rank, target = options.rest.kind, options.rest.rank, options.rest.target
    start = init_adapter(
        jax.random.key(0), kind, config.projections(), config.n_layer, rank=rank, targets=(target,)
    )
    return {f"{kind}{n:02}": randomise(start, n) for n in range(max(options.batches))}


if __name__ == "__main__":
    protocol.run(main)
