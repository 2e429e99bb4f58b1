"""GPTBigCode in flax.nnx: parameters, blocks and learned positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.cache import LayerCache
from flora_jax.models.decoder import Decoder, Parts, Places, attend_in
from flora_jax.models.layers import ACTIVATIONS, LayerNorm, linear, project, random_weight
from flora_jax.models.model import LayerAdapters
from flora_jax.models.starcoder.config import StarCoderConfig


def split_qkv(
    qkv_BTO: jax.Array, config: StarCoderConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits ``c_attn``'s output into ``q [B,T,H,K]`` and ``k``, ``v`` ``[B,T,G,K]``.

    With ``multi_query`` the output is all queries, then one key, then one value; without it, each
    head's query, key and value stand together.
    """
    batch, length, _ = qkv_BTO.shape
    width, heads, head_dim = config.n_embd, config.n_head, config.head_dim
    if config.multi_query:
        q, k, v = jnp.split(qkv_BTO, [width, width + head_dim], axis=-1)
        return (
            q.reshape(batch, length, heads, head_dim),
            k.reshape(batch, length, 1, head_dim),
            v.reshape(batch, length, 1, head_dim),
        )
    q, k, v = jnp.split(qkv_BTO.reshape(batch, length, heads, 3 * head_dim), 3, axis=-1)
    return q, k, v


class Attention(nnx.Module):
    def __init__(self, config: StarCoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes, std = config.projections(), config.initializer_range
        deep = std / (2 * config.n_layer) ** 0.5
        self.c_attn = linear(sizes["attn.c_attn"], std, dtype, rngs)
        self.c_proj = linear(sizes["attn.c_proj"], deep, dtype, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        cache: LayerCache | None,
        adapters: LayerAdapters,
        config: StarCoderConfig,
    ) -> tuple[jax.Array, LayerCache | None]:
        qkv = split_qkv(project(x_BTD, self.c_attn, adapters, "attn.c_attn"), config)
        mixed_BTD, cache = attend_in(places, qkv, cache, config)
        return project(mixed_BTD, self.c_proj, adapters, "attn.c_proj"), cache


class MLP(nnx.Module):
    def __init__(self, config: StarCoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes, std = config.projections(), config.initializer_range
        deep = std / (2 * config.n_layer) ** 0.5
        self.c_fc = linear(sizes["mlp.c_fc"], std, dtype, rngs)
        self.c_proj = linear(sizes["mlp.c_proj"], deep, dtype, rngs)

    def __call__(
        self, x_BTD: jax.Array, adapters: LayerAdapters, config: StarCoderConfig
    ) -> jax.Array:
        h_BTF = project(x_BTD, self.c_fc, adapters, "mlp.c_fc")
        # Checkpointed: its input alone is kept for the backward pass.
        h_BTF = jax.checkpoint(ACTIVATIONS[config.activation_function])(h_BTF)
        return project(h_BTF, self.c_proj, adapters, "mlp.c_proj")


class Block(nnx.Module):
    def __init__(self, config: StarCoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = partial(LayerNorm, config.n_embd, config.layer_norm_epsilon, dtype)
        self.ln_1 = norm()
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = norm()
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        cache: LayerCache | None,
        adapters: LayerAdapters,
        config: StarCoderConfig,
    ) -> tuple[jax.Array, LayerCache | None]:
        mixed_BTD, cache = self.attn(self.ln_1(x_BTD), places, cache, adapters, config)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.ln_2(x_BTD), adapters, config), cache


class StarCoder(Decoder):
    """A GPTBigCode language model.

    Args:
        config: shape and options.
        dtype: of the parameters, and so of the activations.
        rngs: used for the GPT-2 initialisation only.
    """

    def __init__(self, config: StarCoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        std = config.initializer_range
        embedding = dict(embedding_init=nnx.initializers.normal(std), param_dtype=dtype, rngs=rngs)
        self.config = config
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, **embedding)
        self.wpe = nnx.Embed(config.n_positions, config.n_embd, **embedding)
        self.h = nnx.List([Block(config, dtype, rngs) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        if not config.tie_word_embeddings:
            widths = (config.n_embd, config.vocab_size)
            self.lm_head = nnx.Param(random_weight(widths, std, dtype, rngs))

    def parts(self) -> Parts:
        """See :class:`~flora_jax.models.decoder.Decoder`."""
        own = None if self.config.tie_word_embeddings else self.lm_head[...]
        return Parts(self.wte.embedding[...], self.h, self.ln_f, own)

    def embedded(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The tokens' embedding and that of their positions."""
        at_BT = jnp.clip(positions_BT, 0, self.config.n_positions - 1)
        return self.wte.embedding[...][tokens_BT] + self.wpe.embedding[...][at_BT]
