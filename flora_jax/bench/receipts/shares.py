"""The least time in which a machine could serve so many tokens: bytes over bandwidth, operations over the
best product rate.

Counted are the base's products alone, which every kind of adapter has to do: each weight's multiplication
once a token, the head's once a drawn token; and the weights' bytes once for every decode step, of which
there are at least as many as the drawn tokens fill rows. Attention, adapters and activations come on top,
so a share of 1 is out of reach. Knows nothing of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

from flora_jax.bench.receipts.machine import least_seconds
from flora_jax.models.family import ModelConfig


def product_weights(config: ModelConfig) -> tuple[int, int]:
    """Numbers of weights: of all layers' projections, and of the head."""
    layer = sum(inputs * outputs for inputs, outputs in config.projections().values())
    return config.n_layer * layer, config.hidden_size * config.vocab_size


def least_prefill_seconds(
    limits: Mapping[str, float], config: ModelConfig, tokens: int, rows: int, itemsize: int
) -> float:
    """For prompts of ``tokens`` altogether, and logits for the last of each of ``rows``."""
    layers, head = product_weights(config)
    operations = 2.0 * (layers * tokens + head * rows)
    return least_seconds(dict(limits), float(itemsize * (layers + head)), operations)


def least_decode_seconds(
    limits: Mapping[str, float], config: ModelConfig, drawn: int, rows: int, itemsize: int
) -> float:
    """For ``drawn`` tokens in steps of at most ``rows``."""
    weights = sum(product_weights(config))
    steps = drawn / rows
    return steps * least_seconds(dict(limits), float(itemsize * weights), 2.0 * weights * rows)


def share_of_limit(
    limits: Mapping[str, float],
    config: ModelConfig,
    rows: int,
    itemsize: int,
    measured: Mapping[str, float],
) -> float:
    """Of a throughput run's ``duration``; ``measured`` is one of its result lines.

    The first token of a request comes with its prompt, the others of decode steps of ``rows``.
    """
    requests = int(measured["completed"])
    drawn = int(measured["total_output_tokens"]) - requests
    prefill = least_prefill_seconds(
        limits, config, int(measured["total_input_tokens"]), requests, itemsize
    )
    decode = least_decode_seconds(limits, config, drawn, rows, itemsize)
    return (prefill + decode) / measured["duration"]
