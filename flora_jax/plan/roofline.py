"""The modelled time of a decode step: bytes, operations and launches on a card.

A step of ``B`` rows that look at ``S`` positions, sampling apart, is the sum of

- ``weights``: every kernel, bias, norm and the head's matrix once, over the bandwidth;
- ``products``: what the projections' and the head's operations take beyond that reading, each
  ``2·P·I·O`` over the product rate, for the ``P`` rows that it multiplies (``B``, and one more for every
  further multiplicative component of FLoRA and HiRA);
- ``attention``: "gather" copies the span's keys and values (read and written), reads them again in
  two products, writes float32 scores, reads them, and writes and reads their softmax in 16 bits;
  "fused" reads keys and values once; "loop" does less than its launches take, and counts by those
  alone;
- ``adapters``: the bank's components that the rows use, once; of every row that they add the scaled
  input (written, read) and the float32 result (written, read). LoRA "fused" reads its vectors once; LoRA
  "bmm", as two batched products, gathers them first (read and written), then reads them;
- ``launches``: 2 µs for every kernel beside the weights' products (their time is above), 4 µs for every
  CUDA graph that the host launches;
- ``links``: with several devices two all-reduces a layer, their latency and their bytes.

Kernels a layer were counted on programs compiled for an H100: 20 with "gather", the four products with
weights among them, 18 with "fused"; with "loop" 20 and 9 for every 128 positions, each trip a graph of
its own. A projection without room for adapters has one or, in the MLP, two kernels fewer where its
results are rounded in the product (bias and GELU as epilogues). FLoRA beyond rank 1 adds half a kernel,
and beyond 16 a loop of two for every 8 components; LoRA one, batched products five. Six more kernels
make the rest of a step.

It leaves out what the second-level cache saves, the host, and autotuned kernels' own efficiency. Knows
nothing of queues.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from flora_jax.plan.cards import ALL_REDUCE_US
from flora_jax.plan.setting import Setting
from flora_jax.platforms import GPU

Lora = Literal["fused", "bmm"]
KERNELS_A_TRIP = 9
KEY_STRETCH = 128
# Further components that a row's sum adds in one pass; beyond two passes, a loop of two kernels.
_GROUP = 8
_SUM_KERNELS = 2
_INT8_SAVES = 0.75  # XLA's own products, which cast the weight as they read it.
_INT4_SLICE = 32 << 20


@dataclasses.dataclass(frozen=True)
class Ways:
    """Implementations that a step is modelled with; by default the platform table's for a GPU."""

    attention: str = GPU.decode_attention
    prompt_attention: str | None = None
    rounded_results: bool = GPU.rounded_results
    lora: Lora = "fused"


DEFAULT = Ways()


@dataclasses.dataclass(frozen=True)
class Work:
    """Decoding's work beside the base: by projection, further rows of its product and additive
    components, over all rows of the batch.
    """

    further: Mapping[str, int]
    additive: Mapping[str, int]


Terms = dict[str, float]


def whole_work(setting: Setting, rows: int) -> Work:
    """The work of ``rows`` that all have an adapter of the setting's kind and rank."""
    counts = {target: setting.count(target) for target in setting.adapted}
    return Work(
        {target: rows * (count[0] - 1) for target, count in counts.items()},
        {target: rows * count[1] for target, count in counts.items()},
    )


def decode(
    setting: Setting, rows: int, span: int, work: Work | None = None, ways: Ways = DEFAULT
) -> Terms:
    """Milliseconds of one decode step by term.

    Args:
        setting: model, card, adapters.
        rows: that the step is padded to.
        span: positions that attention looks at.
        work: what adapters add; every row with the setting's adapter where it is ``None``.
        ways: implementations.
    """
    config, card = setting.config, setting.card
    work = whole_work(setting, rows) if work is None else work
    devices, rate = setting.devices, product_rate(setting)
    weights = products = extra = 0.0
    for target, (inputs, outputs) in config.projections().items():
        read = kernel_bytes(setting, inputs, outputs) / devices
        multiplied = rows + work.further.get(target, 0)
        operations = 2.0 * multiplied * inputs * outputs / devices
        weights += read
        products += max(0.0, operations / rate - read / card.bandwidth)
        if target in setting.adapted:
            extra += _component_bytes(setting, target, rows, work, ways.lora)
    tensors = setting.family.tensors(config).values()
    small = sum(math.prod(tensor.shape) for tensor in tensors if len(tensor.shape) == 1)
    weights = config.n_layer * weights + small * setting.itemsize
    head = config.vocab_size * config.hidden_size * setting.itemsize / devices
    head_operations = 2.0 * rows * config.vocab_size * config.hidden_size / devices
    head_product = max(0.0, head_operations / rate - head / card.bandwidth)
    kernels, graphs = launches(setting, span, work, ways)
    beside = kernels - len(config.projections()) * config.n_layer
    attention = config.n_layer * _attention_bytes(setting, rows, span, ways.attention)
    return {
        "weights": 1e3 * (weights + head) / card.bandwidth,
        "products": 1e3 * (config.n_layer * products + head_product),
        "attention": 1e3 * attention / card.bandwidth,
        "adapters": 1e3 * config.n_layer * extra / card.bandwidth,
        "launches": 1e-3 * (beside * card.launch_us + graphs * card.graph_launch_us),
        "links": links(setting, rows),
    }


def total(terms: Terms) -> float:
    """Milliseconds in all."""
    return sum(terms.values())


def launches(setting: Setting, span: int, work: Work, ways: Ways = DEFAULT) -> tuple[float, float]:
    """Kernels of a decode step, and the CUDA graphs that the host launches for them."""
    layers = setting.config.n_layer
    kernels, graphs = kernels_a_layer(setting, work, ways), 0.0
    if ways.attention == "loop":
        trips = -(-span // KEY_STRETCH)
        kernels += trips * KERNELS_A_TRIP
        graphs += 1 + trips if trips > 1 else 0
    groups = sum(
        _loops(setting, target) for target in setting.adapted if any(work.further.values())
    )
    graphs += groups
    return layers * kernels + setting.family.launches.other, layers * graphs or 1.0


def kernels_a_layer(setting: Setting, work: Work, ways: Ways) -> float:
    """Of a decode step, the loop over keys aside."""
    counted = setting.family.launches
    kernels = counted.layer[ways.attention]
    for target, (inputs, outputs) in setting.config.projections().items():
        kernels -= counted.rounded_saves.get(target, 0) * rounded(setting, target, ways)
        if work.further.get(target):
            kernels += 0.5
            if trips := _loops(setting, target):
                kernels += _SUM_KERNELS * trips + 2.5
        if work.additive.get(target):
            kernels += 5 if ways.lora == "bmm" else 1
        kernels -= _INT8_SAVES * (setting.quantize == "int8")
        if setting.quantize == "int4":
            kernels += 3 * max(2, -(-2 * inputs * outputs // _INT4_SLICE)) - 1
    return kernels


def _loops(setting: Setting, target: str) -> int:
    """Trips of the loop that adds a row's further components, 0 where there is none."""
    groups = (setting.count(target)[0] - 1) // _GROUP
    return groups if groups > 1 else 0


def rounded(setting: Setting, target: str, ways: Ways) -> bool:
    """Whether a projection gives its results in 16 bits at once."""
    wide = target in setting.adapted or setting.quantize != "none" or setting.itemsize == 4
    return ways.rounded_results and not wide


def kernel_bytes(setting: Setting, inputs: int, outputs: int) -> float:
    """Bytes of a projection's kernel as it is held, its scales aside."""
    each = {"none": float(setting.itemsize), "int8": 1.0, "int4": 0.5}[setting.quantize]
    return each * inputs * outputs


def product_rate(setting: Setting) -> float:
    """Operations a second that products reach; in float32 (TF32) half of those in 16 bits."""
    return setting.card.products / (2 if setting.itemsize == 4 else 1)


def _component_bytes(setting: Setting, target: str, rows: int, work: Work, lora: Lora) -> float:
    """Of one layer's adapted projection in decoding, beside its weight."""
    inputs, outputs = setting.config.projections()[target]
    further, additive = work.further.get(target, 0), work.additive.get(target, 0)
    found = 4.0 * (rows + further) * (inputs + outputs)
    if further:
        found += 2.0 * (rows + further) * (inputs * setting.itemsize + outputs * 4)
    if additive:
        size = setting.itemsize * 3 if lora == "bmm" else setting.additive_itemsize
        found += float(additive * (inputs + outputs) * size)
        if lora == "bmm":  # Without the multiplicative pair of ones.
            found -= 4.0 * rows * (inputs + outputs)
    return found


def _attention_bytes(setting: Setting, rows: int, span: int, name: str) -> float:
    config, size = setting.config, setting.itemsize
    cached = 2.0 * rows * span * setting.split_kv_heads * config.head_dim * size
    if name == "loop":
        return 0.0
    if name == "fused":
        return cached
    scores = rows * config.n_head / setting.devices * span * (8 + 2 * size)
    return 3 * cached + scores


def links(setting: Setting, tokens: int) -> float:
    """Milliseconds of two all-reduces a layer, as a ring moves them."""
    if setting.devices == 1:
        return 0.0
    moved = 2.0 * (setting.devices - 1) / setting.devices
    moved *= tokens * setting.config.hidden_size * setting.itemsize
    each = 1e-6 * ALL_REDUCE_US + moved / setting.card.peak_link
    return 1e3 * 2 * setting.config.n_layer * each
