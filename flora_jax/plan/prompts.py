"""The modelled time of a prefill dispatch: operations and bytes on a card.

A dispatch of ``T`` tokens that look at ``S`` positions is the sum of

- ``products``: each projection's operations, or its bytes where those take longer;
- ``attention``: "gather" writes float32 scores, reads them, writes their softmax in 16 bits and reads it;
  "cudnn" keeps none and runs at three quarters of the product rate, with a mask from memory; "loop"
  passes nine times over the scores of 128 positions, for every 128;
- ``activations``: norms with additions, slices, turned queries, and float32 results read and rounded
  where the product does not round: bytes, or launches where those take longer;
- ``adapters``: FLoRA beyond rank 1 by explicit weights (of each row and projection, made in one pass: the
  weight read, written and read) or by more rows of the product, whichever takes less; LoRA's two small
  products in float32, with what they read and write;
- ``links``: as of a decode step.

Knows nothing of queues.
"""

from __future__ import annotations

from flora_jax.plan.roofline import (
    DEFAULT,
    KERNELS_A_TRIP,
    KEY_STRETCH,
    Terms,
    Ways,
    Work,
    kernel_bytes,
    kernels_a_layer,
    links,
    product_rate,
    rounded,
)
from flora_jax.plan.setting import Setting

# Passes of the loop over the scores of a block, and over its float32 results.
_LOOP_PASSES = 9
# Of the product rate, with a mask from memory.
_FLASH_SHARE = 0.75


def prefill(setting: Setting, rows: int, length: int, span: int, ways: Ways = DEFAULT) -> Terms:
    """Milliseconds of one prefill dispatch by term.

    Args:
        setting: model, card, adapters.
        rows: chunks.
        length: tokens of each.
        span: positions that attention looks at.
        ways: implementations.
    """
    config, card = setting.config, setting.card
    devices, rate, size = setting.devices, product_rate(setting), setting.itemsize
    tokens = rows * length
    products = adapters = 0.0
    passes = 6.0 * config.hidden_size * size  # Two norms with the additions before them.
    for target, (_, outputs) in config.projections().items():
        seconds = _product_seconds(setting, target, tokens, 1)
        products += seconds
        if target in setting.adapted:
            adapters += _prompt_adapter_seconds(setting, target, rows, tokens, ways) - seconds
        if not rounded(setting, target, ways):
            passes += outputs * (4 + size)
    passes += (
        2.0 * (config.n_head + 2 * config.kv_heads) * config.head_dim * size
    )  # Slices and the cache.
    passes += 4.0 * config.hidden_size * size  # Queries and results, turned round.
    kernels = kernels_a_layer(setting, Work({}, {}), ways) - len(config.projections())
    activations = max(tokens * passes / card.bandwidth, 1e-6 * kernels * card.launch_us)
    head = 2.0 * rows * config.vocab_size * config.hidden_size / devices / rate
    head_read = config.vocab_size * config.hidden_size * size / devices / card.bandwidth
    name = ways.prompt_attention or setting.prompt_attention
    return {
        "products": 1e3 * (config.n_layer * products + max(head, head_read)),
        "attention": 1e3 * config.n_layer * _prompt_attention(setting, rows, length, span, name),
        "activations": 1e3 * config.n_layer * activations,
        "adapters": 1e3 * config.n_layer * adapters,
        "links": links(setting, tokens),
    }


def _product_seconds(setting: Setting, target: str, tokens: int, times: int) -> float:
    """One projection of so many tokens, each multiplied ``times``."""
    inputs, outputs = setting.config.projections()[target]
    operations = 2.0 * times * tokens * inputs * outputs
    read = kernel_bytes(setting, inputs, outputs)
    read += times * tokens * setting.itemsize * (inputs + outputs)
    seconds = max(operations / product_rate(setting), read / setting.card.bandwidth)
    return seconds / setting.devices


def _prompt_adapter_seconds(
    setting: Setting, target: str, rows: int, tokens: int, ways: Ways
) -> float:
    """One adapted projection of a prefill dispatch, its product included."""
    inputs, outputs = setting.config.projections()[target]
    multiplicative, additive, _ = setting.count(target)
    card, size = setting.card, setting.itemsize
    plain = _product_seconds(setting, target, tokens, 1)
    if multiplicative > 1:
        merged = plain + rows * 3.0 * inputs * outputs * size / card.bandwidth / setting.devices
        more = tokens * multiplicative * (2.0 * inputs * size + 8.0 * outputs)
        factored = _product_seconds(setting, target, tokens, multiplicative)
        return min(merged, factored + more / card.bandwidth)
    # The base's pair of ones, and IA3's, scale the inputs.
    moved = 2.0 * tokens * inputs * size
    operations = 0.0
    if additive:
        moved += tokens * (inputs * (size + 4.0) + 8.0 * outputs)
        operations = 2.0 * tokens * additive * (inputs + outputs)
        if ways.lora == "bmm":
            moved += 2.0 * rows * additive * (inputs + outputs) * size
    return plain + moved / card.bandwidth + operations / (product_rate(setting) / 2)


def _prompt_attention(setting: Setting, rows: int, length: int, span: int, name: str) -> float:
    """Seconds of one layer."""
    config, card, size = setting.config, setting.card, setting.itemsize
    tokens, heads = rows * length, config.n_head / setting.devices
    operations = 2.0 * tokens * span * heads * config.head_dim  # Of either product.
    gathered = 4.0 * rows * span * config.kv_heads * config.head_dim * size
    if name == "cudnn":
        mask = tokens * span * size
        return (
            2 * operations / (product_rate(setting) * _FLASH_SHARE)
            + (gathered + mask) / card.bandwidth
        )
    if name == "loop":
        trips = -(-span // KEY_STRETCH)
        block = 4.0 * tokens * heads * max(KEY_STRETCH, config.head_dim)
        moved = _LOOP_PASSES * block / card.bandwidth
        return trips * max(moved, 1e-6 * KERNELS_A_TRIP * card.launch_us)
    scores, rate = tokens * heads * span, product_rate(setting)
    first = max(operations / rate, 4.0 * scores / card.bandwidth)
    second = max(operations / rate, size * scores / card.bandwidth)
    softmax = (4.0 + size) * scores / card.bandwidth
    return first + softmax + second + gathered / card.bandwidth
