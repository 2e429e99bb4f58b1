"""What a platform wants of a training step, where the model and the machine allow it.

Decided once, when a run starts. Knows nothing of data, adapters or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flora_jax.models.attention import MAY_REFUSE, cudnn_refuses
from flora_jax.models.attention_trial import fails
from flora_jax.models.family import ModelConfig
from flora_jax.platforms import platform
from flora_jax.train.loss import HeadChunks
from flora_jax.train.step import StepOptions


def choose(
    options: StepOptions,
    config: ModelConfig,
    dtype: Any,
    length: int,
    say: Callable[[str], None],
    *,
    heads_split: bool = False,
) -> StepOptions:
    """``options`` with this platform's attention, rounding and chunks of the head.

    An attention that may refuse is first tried here on random numbers; where it is not usable, ``say``
    is told why.

    Args:
        options: what the user decides.
        config: of the model.
        dtype: of the activations.
        length: tokens of a row.
        say: takes a line for the user.
        heads_split: whether devices have different heads.
    """
    wanted = platform()
    attention = wanted.training_attention
    if attention in MAY_REFUSE:
        why = cudnn_refuses(config, dtype, length)
        if heads_split:
            why = "the heads are split over devices"
        why = why or fails(attention, config, dtype, length)
        if why is not None:
            say(f"attention: einsum instead of {attention} ({why})")
            attention = "einsum"
    return dataclasses.replace(
        options, attention=attention, rounded=wanted.rounded_results,
        head=HeadChunks(wanted.head_numbers, wanted.even_head_chunks),
    )  # fmt: skip
