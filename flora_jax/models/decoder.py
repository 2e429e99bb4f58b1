"""The pass that all families share: embedding, a stack of blocks over the cache, final norm, head.

A family derives its model from :class:`Decoder` and makes the parts under names of its own. What differs
by layer (a sliding window, say) a block keeps itself, as a static attribute; what all blocks need of the
tokens' positions is computed once, in :meth:`Decoder.rotation`. Only nnx's pytree subset is used: a model
is split into a graph definition and parameters once, and steps are ``jax.jit`` over the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.attention import Visible, attend_visible, visible
from flora_jax.models.cache import Cache, LayerCache, Paging
from flora_jax.models.cached_attention import attend_cached
from flora_jax.models.family import AttentionConfig
from flora_jax.models.model import Adapters, LayerAdapters, Remat
from flora_jax.weights.dense import Dense
from flora_jax.weights.held import Held
from flora_jax.weights.product import PROJECTED, explicit, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of a pass stand and what they see: the same for every block.

    Args:
        positions_BT: of the tokens in their sequences.
        seen: without a cache what the tokens see of one another, with one its blocks.
        rotation: what :meth:`Decoder.rotation` made of the positions; ``None`` in most families.
    """

    positions_BT: jax.Array
    seen: Visible | Paging
    rotation: Any = None


def attend_in(
    places: Places,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    cache: LayerCache | None,
    config: AttentionConfig,
    window: int | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """Attention of a layer's tokens over what they see, ``[B, T, H·K]``, and the cache with them in it.

    Args:
        places: of the tokens.
        qkv: queries ``[B, T, H, K]``, keys and values ``[B, T, G, K]``.
        cache: the layer's; ``None`` without one.
        config: of the model.
        window: how many of the last positions a token of this layer sees, its own among them; ``None``
            is all.
    """
    q_BTHK, k_BTGK, v_BTGK = qkv
    seen, positions_BT = places.seen, places.positions_BT
    if cache is None:
        assert isinstance(seen, Visible)
        return attend_visible(q_BTHK, k_BTGK, v_BTGK, seen, config, window), None
    assert isinstance(seen, Paging)
    cache = cache.write(k_BTGK, v_BTGK, positions_BT, seen)
    return attend_cached(q_BTHK, cache, seen, positions_BT, config, window), cache


class Block(Protocol):
    """A layer of the stack; an ``nnx.Module``."""

    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        cache: LayerCache | None,
        adapters: LayerAdapters,
        config: Any,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The activations after this layer, and its cache with these tokens in it."""


class Parts(NamedTuple):
    """What the shared pass needs of a model. ``head`` is ``None`` where the embedding is the head."""

    embedding_VD: jax.Array
    blocks: Iterable[Block]
    norm: Callable[[jax.Array], jax.Array]
    head: Held | None

    @property
    def head_DV(self) -> Held:
        """The head, the embedding or its own."""
        return Dense(self.embedding_VD) if self.head is None else self.head


class Decoder(nnx.Module):
    """A :class:`~flora_jax.models.model.LanguageModel` but for its parts."""

    config: Any

    def parts(self) -> Parts:
        """The parts, under whatever names the family's checkpoints have."""
        raise NotImplementedError

    def embedded(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """What enters the first block, ``[B, T, D]``; positions may lie outside the model's."""
        return self.parts().embedding_VD[tokens_BT]

    def rotation(self, positions_BT: jax.Array) -> Any:
        """What every block needs of the positions, a pytree: rotary sines and cosines, say."""
        return None

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        *,
        cache: Cache | None = None,
        paging: Paging | None = None,
        segments_BT: jax.Array | None = None,
        adapters: Adapters | None = None,
        remat: Remat = "none",
        attention: str = "einsum",
    ) -> tuple[jax.Array, Cache | None]:
        """See :class:`~flora_jax.models.model.LanguageModel`."""
        seen: Visible | Paging
        if cache is None:
            seen = visible(positions_BT, segments_BT, attention)
        else:
            assert paging is not None
            seen = paging
        places = Places(positions_BT, seen, self.rotation(positions_BT))
        x_BTD = self.embedded(tokens_BT, positions_BT)
        layers: list[LayerCache] = []
        parts = self.parts()
        for number, block in enumerate(parts.blocks):
            layer_adapters = {} if adapters is None else adapters[number]
            layer_cache = None if cache is None else cache[number]
            run = block if remat == "none" else _rematerialised(block, remat)
            x_BTD, layer_cache = run(x_BTD, places, layer_cache, layer_adapters, self.config)
            if layer_cache is not None:
                layers.append(layer_cache)
        return parts.norm(x_BTD), (None if cache is None else layers)

    def head(self) -> jax.Array:
        """See :class:`~flora_jax.models.model.LanguageModel`."""
        return explicit(self.parts().head_DV)

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """See :class:`~flora_jax.models.model.LanguageModel`."""
        return product(hidden_xD, self.parts().head_DV)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        adapters: Adapters | None = None,
    ) -> jax.Array:
        """See :class:`~flora_jax.models.model.LanguageModel`."""
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        positions_BT = jnp.cumsum(segments_BT > 0, axis=1) - 1
        hidden_BTD, _ = self.hidden(
            tokens_BT, positions_BT, segments_BT=segments_BT, adapters=adapters
        )
        return self.logits(hidden_BTD)


def _rematerialised(block: Block, remat: Remat) -> Block:
    policy = jax.checkpoint_policies.save_only_these_names(PROJECTED)
    return jax.checkpoint(
        block, static_argnums=(4,), policy=policy if remat == "products" else None
    )
