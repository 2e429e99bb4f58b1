"""What lies on a card: weights, cache and bank to the byte, temporaries by arithmetic, and what fits.

Weights, cache (the whole state that steps take and return) and bank are exactly what the engine's trees
add up to; a test compares them. Temporaries are the larger of the phases' own buffers, one layer at a
time, of the largest decode and prefill programs: real programs, compiled, say it exactly. With several
devices weights are split as :mod:`flora_jax.models.sharding` has them, keys and values by their heads
where there are several, and the rest is whole on each. Knows nothing of time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

from flora_jax.models.axes import MESH_AXES, logical_axes
from flora_jax.models.family import ModelConfig, family_of
from flora_jax.plan.setting import RESERVED, Setting, int4_group
from flora_jax.platforms import GPU

# The CUDA context, libraries' handles and cuBLAS's workspace: an assumption.
RESERVED_BYTES = 1 << 30
# What JAX takes of a card unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
DEFAULT_FRACTION = 0.75
# Bytes of a row's state beside the cache: token, position, drawn and left; 16 stop tokens; the
# settings of sampling with a key of two words.
_ROW_BYTES = 4 * (4 + 16 + 3 + 2)


class Bytes(NamedTuple):
    """On one device; ``peak`` is the sum of the others."""

    weights: int
    cache: int
    bank: int
    temporaries: int

    @property
    def peak(self) -> int:
        return sum(self)


class Largest(NamedTuple):
    """``max_num_seqs`` that fit at the setting's context, each with a whole cache; ``cache_tokens``:
    positions of the cache that fit beside the setting's own number of sequences. 0: not even one.
    """

    max_num_seqs: int
    cache_tokens: int


def weights_bytes(setting: Setting) -> int:
    """Bytes of one device's parameters."""
    return _weights_bytes(
        cast(Any, setting.config), setting.itemsize, setting.quantize, setting.devices
    )


@functools.lru_cache
def _weights_bytes(config: ModelConfig, itemsize: int, quantize: str, devices: int) -> int:
    family, total = family_of(config), 0
    for path, tensor in family.tensors(config).items():
        shape = tensor.shape[::-1] if tensor.by_outputs else tensor.shape
        axes = [MESH_AXES[axis] for axis in logical_axes(path, len(shape), family.axes)]
        method = quantize if family.is_kernel(path) else "none"
        for held, size in _held(shape, itemsize, method):
            cut = any(axis and n % devices == 0 for n, axis in zip(held, axes))
            total += size * math.prod(held) // (devices if cut else 1)
    return total


def _held(shape: tuple[int, ...], itemsize: int, method: str) -> list[tuple[tuple[int, ...], int]]:
    """Shape and bytes of a number of each array that holds a parameter: values, and scales."""
    if method == "none":
        return [(shape, itemsize)]
    inputs, outputs = shape
    if method == "int8":
        return [(shape, 1), ((1, outputs), 4)]
    return [((inputs // 2, outputs), 1), ((inputs // int4_group(inputs), outputs), 4)]


def cache_bytes_per_position(setting: Setting) -> int:
    """Bytes that one position of the cache takes in all layers, on one device."""
    config = setting.config
    return 2 * config.n_layer * setting.split_kv_heads * config.head_dim * setting.itemsize


def blocks(setting: Setting) -> int:
    """Pages of the cache, with room for every sequence's whole context."""
    return setting.max_num_seqs * -(-setting.context // setting.block_size)


def cache_bytes(setting: Setting) -> int:
    """Bytes of the state of the steps: the cache, and a few dozen bytes a row."""
    cache = blocks(setting) * setting.block_size * cache_bytes_per_position(setting)
    return cache + setting.max_num_seqs * _ROW_BYTES


def bank_bytes(setting: Setting) -> int:
    """Bytes of the adapters' bank on one device: vectors lie beside the part of the weight they scale."""
    total, family = 0, setting.family
    for target, (multiplicative, additive, bias) in setting.room().items():
        inputs, outputs = setting.config.projections()[target]
        if family.splits_outputs(f"{family.blocks}.0.{target}.kernel"):
            outputs //= setting.devices
        else:
            inputs //= setting.devices
        total += 4 * multiplicative * (inputs + outputs)
        total += setting.additive_itemsize * additive * (inputs + outputs)
        total += 4 * bias * outputs if bias > RESERVED[2] else 0
    return setting.config.n_layer * total


def temporaries_bytes(setting: Setting) -> int:
    """Bytes of the larger of the two steps' temporaries."""
    return max(_decode_temporaries(setting), _prefill_temporaries(setting))


def _decode_temporaries(setting: Setting) -> int:
    config, size, rows = setting.config, setting.itemsize, setting.max_num_seqs
    heads, positions = config.n_head // setting.devices, _padded_context(setting)
    gathered = 2 * rows * positions * config.kv_heads * config.head_dim * size
    scores = rows * heads * positions * (4 + size)
    phases = [gathered + scores, rows * config.vocab_size * 4 // setting.devices]
    for target, (inputs, outputs) in config.projections().items():
        multiplied = rows * setting.count(target)[0] if target in setting.adapted else rows
        phases.append(multiplied * (inputs * size + outputs * 4) + rows * outputs * size)
    return max(phases) + 2 * rows * config.hidden_size * size


def _prefill_temporaries(setting: Setting) -> int:
    config, size = setting.config, setting.itemsize
    tokens, rows = prefill_tokens(setting), prefill_rows(setting)
    heads, positions = config.n_head // setting.devices, _padded_context(setting)
    width = config.hidden_size
    attention = 2 * rows * positions * config.kv_heads * config.head_dim * size
    attention += 2 * tokens * config.n_head * config.head_dim * size
    if setting.prompt_attention == "cudnn":
        attention += tokens * positions * size
    else:
        attention += tokens * heads * positions * (4 + size)
    phases = [attention]
    for target, (inputs, outputs) in config.projections().items():
        wide = 4 if target in setting.adapted or not GPU.rounded_results else 0
        own = tokens * (inputs * size + outputs * (wide + size))
        if target in setting.adapted and setting.count(target)[0] > 1:
            own += inputs * outputs * (4 + size)  # A row's factor and its explicit weight.
        phases.append(own)
    return max(phases) + 2 * tokens * width * size


def _padded_context(setting: Setting) -> int:
    return -(-setting.context // setting.block_size) * setting.block_size


def prefill_tokens(setting: Setting) -> int:
    """Tokens of the largest prefill dispatch."""
    return prefill_rows(setting) * min(GPU.chunk, setting.context)


def prefill_rows(setting: Setting) -> int:
    """Chunks of the largest prefill dispatch."""
    return GPU.prefill_chunks


def needed(setting: Setting) -> Bytes:
    """What one device holds."""
    return Bytes(
        weights_bytes(setting),
        cache_bytes(setting),
        bank_bytes(setting),
        temporaries_bytes(setting),
    )


def usable_bytes(setting: Setting) -> int:
    """What a device has for them."""
    return setting.card.memory_bytes - RESERVED_BYTES


def fits(setting: Setting) -> bool:
    """Whether the peak is within one device's memory."""
    return needed(setting).peak <= usable_bytes(setting)


def largest(setting: Setting, most: int = 1 << 20) -> Largest:
    """The largest number of sequences at this context, at most ``most``, and the largest cache."""

    def fitting(rows: int) -> bool:
        return fits(dataclasses.replace(setting, max_num_seqs=rows))

    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    found = needed(setting)
    left = usable_bytes(setting) - (found.peak - found.cache)
    left -= setting.max_num_seqs * _ROW_BYTES
    positions = max(0, left) // cache_bytes_per_position(setting)
    return Largest(low, positions // setting.block_size * setting.block_size)


def memory_fraction(setting: Setting) -> float | None:
    """The XLA_PYTHON_CLIENT_MEM_FRACTION that the peak needs, or ``None`` where JAX's own share does."""
    share = needed(setting).peak / setting.card.memory_bytes
    return None if share <= DEFAULT_FRACTION else min(1.0, round(share + 0.01, 2))
