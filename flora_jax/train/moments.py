"""Second moments of what enters the adapted projections, over windows of text.

Knows nothing of what they are for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.mixing.watched import watched_hooks
from flora_jax.models.model import LanguageModel, Model
from flora_jax.train.data.packing import Batch


def input_moments(
    model: Model, adapter: ModelAdapter, batches: Iterable[Batch]
) -> dict[tuple[int, str], jax.Array]:
    """``E[x²]`` of the inputs of every adapted projection, float32 ``[I]``, by layer and target.

    ``x`` is what the model under ``adapter`` feeds it with. The tokens that count are those with a target
    (:attr:`.data.packing.Batch.mask`): neither padding nor a document's last one.
    """
    count = jnp.float32(0)
    sums = [
        {target: jnp.zeros(model.weight(layer, target).shape[0]) for target in targets}
        for layer, targets in enumerate(adapter.layers)
    ]
    for batch in batches:
        sums, count = _plus(
            model.graph,
            model.params,
            adapter.layers,
            (sums, count),
            jax.tree.map(jnp.asarray, batch),
        )
    return {
        (layer, target): sum_I / count
        for layer, targets in enumerate(sums)
        for target, sum_I in targets.items()
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _plus(graph: Any, params: Any, layers: Any, before: Any, batch: Any) -> Any:
    """The sums of squares and the count with those of one more batch."""
    sums, count = before
    found: list[dict[str, jax.Array]] = [{} for _ in layers]

    def see(layer: int, target: str, x_BTI: jax.Array) -> None:
        squares_BTI = jnp.square(x_BTI.astype(jnp.float32)) * batch.mask[..., None]
        found[layer][target] = sums[layer][target] + jnp.sum(squares_BTI, axis=(0, 1))

    model: LanguageModel = nnx.merge(graph, params)
    model.hidden(
        batch.tokens[:, :-1], batch.positions, segments_BT=batch.segments,
        adapters=watched_hooks(layers, see),
    )  # fmt: skip
    return found, count + jnp.sum(batch.mask)
