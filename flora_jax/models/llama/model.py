"""Llama and its kin in flax.nnx: parameters and blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.decoder import Decoder, Parts
from flora_jax.models.layers import ACTIVATIONS, RMSNorm, linear, project, random_weight
from flora_jax.models.llama.config import LlamaConfig
from flora_jax.models.model import LayerAdapters
from flora_jax.models.self_attention import Rotation, SelfAttention, SelfAttentionBlock, rotation


class MLP(nnx.Module):
    """The product of a gate and a second projection of the same input, projected back."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes, std, bias = config.projections(), config.initializer_range, config.mlp_bias
        self.gate_proj = linear(sizes["mlp.gate_proj"], std, dtype, rngs, bias=bias)
        self.up_proj = linear(sizes["mlp.up_proj"], std, dtype, rngs, bias=bias)
        self.down_proj = linear(sizes["mlp.down_proj"], std, dtype, rngs, bias=bias)

    def __call__(self, x_BTD: jax.Array, adapters: LayerAdapters, config: LlamaConfig) -> jax.Array:
        activation = ACTIVATIONS[config.hidden_act]
        gate_BTF = project(x_BTD, self.gate_proj, adapters, "mlp.gate_proj")
        up_BTF = project(x_BTD, self.up_proj, adapters, "mlp.up_proj")
        # Checkpointed: its inputs alone are kept for the backward pass.
        h_BTF = jax.checkpoint(lambda gate, up: activation(gate) * up)(gate_BTF, up_BTF)
        return project(h_BTF, self.down_proj, adapters, "mlp.down_proj")


class Block(SelfAttentionBlock):
    def __init__(self, config: LlamaConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, epsilon, dtype)
        self.self_attn = SelfAttention(config, layer, config.initializer_range, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(width, epsilon, dtype)
        self.mlp = MLP(config, dtype, rngs)


class Llama(Decoder):
    """A language model of the Llama family.

    Args:
        config: shape and options.
        dtype: of the parameters, and so of the activations.
        rngs: used for random weights only.
    """

    def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
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
        blocks = [Block(config, layer, dtype, rngs) for layer in range(config.n_layer)]
        self.layers = nnx.List(blocks)
        self.norm = RMSNorm(width, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(random_weight((width, vocabulary), std, dtype, rngs))

    def parts(self) -> Parts:
        """See :class:`~flora_jax.models.decoder.Decoder`."""
        own = None if self.config.tie_word_embeddings else self.lm_head[...]
        return Parts(self.embed_tokens.embedding[...], self.layers, self.norm, own)

    def rotation(self, positions_BT: jax.Array) -> Rotation:
        """Sines and cosines, once for all layers."""
        dtype = self.embed_tokens.embedding[...].dtype
        return rotation(positions_BT, self.config.rotary, self.config.head_dim, dtype)
