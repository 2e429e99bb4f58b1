"""StarCoder2 in flax.nnx: parameters, blocks and rotary positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.decoder import Decoder, Parts
from flora_jax.models.layers import ACTIVATIONS, LayerNorm, linear, project, random_weight
from flora_jax.models.model import LayerAdapters
from flora_jax.models.self_attention import Rotation, SelfAttention, SelfAttentionBlock, rotation
from flora_jax.models.starcoder2.config import StarCoder2Config


class MLP(nnx.Module):
    def __init__(self, config: StarCoder2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes, std, bias = config.projections(), config.initializer_range, config.use_bias
        deep = std / (2 * config.n_layer) ** 0.5
        self.c_fc = linear(sizes["mlp.c_fc"], std, dtype, rngs, bias=bias)
        self.c_proj = linear(sizes["mlp.c_proj"], deep, dtype, rngs, bias=bias)

    def __call__(
        self, x_BTD: jax.Array, adapters: LayerAdapters, config: StarCoder2Config
    ) -> jax.Array:
        h_BTF = project(x_BTD, self.c_fc, adapters, "mlp.c_fc")
        # Checkpointed: its input alone is kept for the backward pass.
        h_BTF = jax.checkpoint(ACTIVATIONS[config.hidden_act])(h_BTF)
        return project(h_BTF, self.c_proj, adapters, "mlp.c_proj")


class Block(SelfAttentionBlock):
    def __init__(self, config: StarCoder2Config, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = partial(LayerNorm, config.hidden_size, config.norm_epsilon, dtype)
        deep = config.initializer_range / (2 * config.n_layer) ** 0.5
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, layer, deep, dtype, rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, dtype, rngs)


class StarCoder2(Decoder):
    """A StarCoder2 language model.

    Args:
        config: shape and options.
        dtype: of the parameters, and so of the activations.
        rngs: used for the random weights only.
    """

    def __init__(self, config: StarCoder2Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        std = config.initializer_range
        width, vocabulary = config.hidden_size, config.vocab_size
        self.config = config
        self.embed_tokens = nnx.Embed(
            vocabulary,
            width,
            embedding_init=nnx.initializers.normal(std),
            param_dtype=dtype,
            rngs=rngs,
        )
        self.layers = nnx.List([Block(config, n, dtype, rngs) for n in range(config.n_layer)])
        self.norm = LayerNorm(width, config.norm_epsilon, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(random_weight((width, vocabulary), std, dtype, rngs))

    def parts(self) -> Parts:
        """See :class:`~flora_jax.models.decoder.Decoder`."""
        own = None if self.config.tie_word_embeddings else self.lm_head[...]
        return Parts(self.embed_tokens.embedding[...], self.layers, self.norm, own)

    def rotation(self, positions_BT: jax.Array) -> Rotation:
        """See :class:`~flora_jax.models.decoder.Decoder`."""
        dtype = self.embed_tokens.embedding[...].dtype
        return rotation(positions_BT, self.config.rotary, self.config.head_dim, dtype)
