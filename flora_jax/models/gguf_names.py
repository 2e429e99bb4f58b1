"""What GGUF files say of a model in llama.cpp's own words, and what it means here.

Knows nothing of files: they are read in :mod:`flora_jax.checkpoints.gguf`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.rotary import Linear, Llama3, Rotary, Scaling, Yarn, plain_frequencies

# By ``tokenizer.ggml.model``.
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"


class Split(NamedTuple):
    """How text is cut before its merges.

    Args:
        own: by a pattern of its own, which transformers has; else as GPT-2's.
        digits_apart: each digit is split off first.
        whole: a piece that is a token is taken whole, without merges, and the vocabulary's first token
            stands before every text unless the file says otherwise.
    """

    own: bool = False
    digits_apart: bool = False
    whole: bool = False


_DIGITS_APART = "smollm starcoder refact command-r codeshell exaone minerva-7b".split()
_WHOLE = "llama-bpe llama3 llama-v3 falcon3 pixtral tekken".split()
_OWN = "qwen2 deepseek-r1-qwen dbrx smaug-bpe".split()
# By ``tokenizer.ggml.pre``.
SPLITS: Mapping[str, Split] = {
    **dict.fromkeys(("gpt-2", "phi-2"), Split()),
    **dict.fromkeys(_DIGITS_APART, Split(digits_apart=True)),
    **dict.fromkeys(_WHOLE, Split(own=True, whole=True)),
    **dict.fromkeys(_OWN, Split(own=True)),
}

# Metadata of a model's positions, under its architecture's name.
ROTARY_NAMES = (
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
)
# Architectures in whose files the two numbers of each pair that is turned lie beside each other, not in
# the halves of their head.
INTERLEAVED = ("llama",)
# The head's weight, which a model without one takes from its embedding.
OUTPUT = "output.weight"
# The tensor that divides the frequencies of a head's pairs; other factors begin in the same way.
ROTARY_FACTORS = "rope_freqs.weight"
OTHER_FACTORS = "rope_factors"
# Those that all published models with such a tensor have.
_PUBLISHED = Llama3(8.0, 1.0, 4.0, 8192)


def read_rotary(own: Mapping[str, Any], factors: np.ndarray | None, dim: int) -> Rotary:
    """The rotary positions that a file's metadata and its tensor of factors mean.

    Args:
        own: metadata without the architecture's name.
        factors: of :data:`ROTARY_FACTORS`, ``[dim/2]``, or ``None``.
        dim: numbers of a head.

    Raises:
        InputError: a scaling that is not known here, or factors that are no known scaling's.
    """
    base = float(own.get("rope.freq_base", Rotary().base))
    # A factor alone is a linear scaling's in llama.cpp; 0 and 1 leave positions as they are.
    alone = "none" if own.get("rope.scaling.factor", 0) in (0, 1) else "linear"
    kind = own.get("rope.scaling.type", alone)
    if factors is not None:
        if kind != "none":
            raise InputError(
                f"rope.scaling.type is {kind!r} beside {ROTARY_FACTORS}, expected none"
            )
        return Rotary(base, _scaling_of(np.asarray(factors, np.float32), base, dim))
    if kind == "none":
        return Rotary(base)
    if kind not in ("linear", "yarn"):
        raise InputError(f"rope.scaling.type is {kind!r}, expected none, linear or yarn")
    factor = float(_needed(own, "rope.scaling.factor"))
    if kind == "linear":
        return Rotary(base, Linear(factor))
    context = int(_needed(own, "rope.scaling.original_context_length"))
    grown = own.get("rope.scaling.attn_factor")
    amplitude = None if grown is None else float(grown) * (0.1 * math.log(factor) + 1.0)
    return Rotary(base, Yarn(factor, context, amplitude))


def _needed(own: Mapping[str, Any], name: str) -> Any:
    if own.get(name) is None:
        raise InputError(f"{name} is missing, expected beside rope.scaling.type")
    return own[name]


def _scaling_of(factors: np.ndarray, base: float, dim: int) -> Scaling:
    """The scaling that divides by these factors."""
    found = dataclasses.replace(_PUBLISHED, factor=float(factors.max(initial=1.0)))
    expected = plain_frequencies(base, dim) / found.frequencies(base, dim)
    if factors.shape != expected.shape:
        raise InputError(f"{ROTARY_FACTORS} has shape {factors.shape}, expected {expected.shape}")
    if not np.allclose(factors, expected, rtol=1e-3):
        worst = int(np.argmax(abs(factors / expected - 1)))
        raise InputError(
            f"{ROTARY_FACTORS}[{worst}] is {factors[worst]:g}, expected {expected[worst]:g} as under "
            f"{found.rope_type} with factor {found.factor:g}"
        )
    return found
