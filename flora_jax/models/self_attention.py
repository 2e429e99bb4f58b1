"""Self-attention with separate projections and rotary positions, for the families that have it.

Grouped queries, biases or none, norms of the queries and keys or none, a window or none: all are said by
the configuration. Knows nothing of a family's names beyond those of a block's four parts and of the four
projections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.cache import LayerCache
from flora_jax.models.decoder import Places, attend_in
from flora_jax.models.family import ModelConfig
from flora_jax.models.layers import Linear, RMSNorm, linear, project
from flora_jax.models.model import LayerAdapters
from flora_jax.models.rotary import Rotary

# Cosine and sine of every position, [B, T, 1, K/2] each, in the activations' dtype.
Rotation = tuple[jax.Array, jax.Array]


class SelfAttentionConfig(ModelConfig, Protocol):
    """What this attention reads of a configuration; its projections are ``self_attn.{q,k,v,o}_proj``."""

    @property
    def rotary(self) -> Rotary:
        """How queries and keys are turned."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """By layer how many of the last positions a token sees; ``None`` is all."""

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""

    @property
    def output_bias(self) -> bool:
        """Whether the projection of the result has one."""

    @property
    def qk_norm_epsilon(self) -> float | None:
        """Of the root-mean-square norms of each head's query and key; ``None`` is without them."""


def rotation(positions_BT: jax.Array, rotary: Rotary, head_dim: int, dtype: Any) -> Rotation:
    """Cosine and sine of every position, computed in float32 and rounded to ``dtype``."""
    turned = positions_BT[:, :, None, None].astype(jnp.float32)
    radians = turned * rotary.frequencies(head_dim)[None, None, None]
    amplitude = jnp.float32(rotary.scaling.amplitude())
    return (jnp.cos(radians) * amplitude).astype(dtype), (jnp.sin(radians) * amplitude).astype(
        dtype
    )


def rotate(x_BTHK: jax.Array, turn: Rotation) -> jax.Array:
    """Turns number ``i`` of a head together with number ``i + K/2``: in float32, rounded once."""
    cosine, sine = (part.astype(jnp.float32) for part in turn)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)


class SelfAttention(nnx.Module):
    """The attention of one layer.

    Args:
        config: shape and options.
        layer: the layer's number, whose window it has.
        std: standard deviation of the random kernel of ``o_proj``; that of the others is the
            configuration's.
        dtype: of the parameters.
        rngs: for the kernels.
    """

    def __init__(
        self, config: SelfAttentionConfig, layer: int, std: float, dtype: Any, rngs: nnx.Rngs
    ):
        widths = {name: config.projections()[f"self_attn.{name}_proj"] for name in "qkvo"}
        inward = config.initializer_range
        self.q_proj = linear(widths["q"], inward, dtype, rngs, bias=config.qkv_bias)
        self.k_proj = linear(widths["k"], inward, dtype, rngs, bias=config.qkv_bias)
        self.v_proj = linear(widths["v"], inward, dtype, rngs, bias=config.qkv_bias)
        self.o_proj = linear(widths["o"], std, dtype, rngs, bias=config.output_bias)
        epsilon, self.window = config.qk_norm_epsilon, config.windows[layer]
        self.q_norm = None if epsilon is None else RMSNorm(config.head_dim, epsilon, dtype)
        self.k_norm = None if epsilon is None else RMSNorm(config.head_dim, epsilon, dtype)

    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        cache: LayerCache | None,
        adapters: LayerAdapters,
        config: SelfAttentionConfig,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The result ``[B, T, D]``, and the cache with these tokens in it.

        ``places.rotation`` is that of :func:`rotation`.
        """

        def heads(holder: Linear, name: str) -> jax.Array:
            flat_BTO = project(x_BTD, holder, adapters, f"self_attn.{name}")
            return flat_BTO.reshape(*flat_BTO.shape[:2], -1, config.head_dim)

        q_BTHK, k_BTGK = heads(self.q_proj, "q_proj"), heads(self.k_proj, "k_proj")
        v_BTGK = heads(self.v_proj, "v_proj")
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BTHK, k_BTGK = rotate(q_BTHK, places.rotation), rotate(k_BTGK, places.rotation)
        qkv = q_BTHK, k_BTGK, v_BTGK
        mixed_BTI, cache = attend_in(places, qkv, cache, config, self.window)
        return project(mixed_BTI, self.o_proj, adapters, "self_attn.o_proj"), cache


class SelfAttentionBlock(nnx.Module):
    """A layer: attention, then the MLP, each of the normalised input and added to it.

    A family derives its own, whose constructor makes the four parts.
    """

    input_layernorm: Callable[[jax.Array], jax.Array]
    self_attn: SelfAttention
    post_attention_layernorm: Callable[[jax.Array], jax.Array]
    mlp: Callable[[jax.Array, LayerAdapters, Any], jax.Array]

    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        cache: LayerCache | None,
        adapters: LayerAdapters,
        config: Any,
    ) -> tuple[jax.Array, LayerCache | None]:
        """See :class:`~flora_jax.models.decoder.Block`."""
        normal_BTD = self.input_layernorm(x_BTD)
        mixed_BTD, cache = self.self_attn(normal_BTD, places, cache, adapters, config)
        x_BTD = x_BTD + mixed_BTD
        normal_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + self.mlp(normal_BTD, adapters, config), cache
