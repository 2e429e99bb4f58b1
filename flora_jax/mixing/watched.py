"""Looking at what enters a projection: a hook around another one.

Knows nothing of models, nor of what is done with the inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from flora_jax.weights import product


@dataclasses.dataclass(frozen=True)
class Watched:
    """The hook ``inner`` (``None``: the base projection), its inputs ``[B, T, I]`` shown to ``see``.

    ``see`` is called while a pass is traced, with a tracer of that trace: what it makes of it must be a
    result of the function that is traced, and there may be no rematerialisation between.
    """

    inner: Any
    see: Callable[[jax.Array], None]


@product.apply.register
def _apply_watched(
    adapter: Watched, x_BTI: jax.Array, W_IO: product.Weight, bias_O: jax.Array | None = None
) -> jax.Array:
    adapter.see(x_BTI)
    return product.apply(adapter.inner, x_BTI, W_IO, bias_O)


def watched_hooks(
    layers: Sequence[Mapping[str, Any]], see: Callable[[int, str, jax.Array], None]
) -> list[dict[str, Watched]]:
    """Hooks around those of ``layers``; ``see`` is called with the layer, the target and its inputs."""
    return [
        {target: Watched(inner, partial(see, number, target)) for target, inner in layer.items()}
        for number, layer in enumerate(layers)
    ]
