"""GPTBigCode in flax.nnx: parameters and the forward pass, with an adapter hook per projection.

Only nnx's pytree subset is used: a model is split into a graph definition and parameters once, and
steps are ``jax.jit`` over the parameters. Adapters arrive as an argument: ``adapters[layer][target]``
is anything that ``flora_jax.adapters.apply`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.attention import Visible, attend_visible, visible
from flora_jax.models.cache import Cache, LayerCache, Paging
from flora_jax.models.cached_attention import attend_cached
from flora_jax.models.model import Adapters, LayerAdapters, Remat
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.weights.dense import Dense
from flora_jax.weights.product import PROJECTED, apply, product

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def _rematerialised(block: Block, remat: Remat) -> Callable[..., Any]:
    policy = jax.checkpoint_policies.save_only_these_names(PROJECTED)
    return jax.checkpoint(
        block, static_argnums=(5,), policy=policy if remat == "products" else None
    )


class LayerNorm(nnx.Module):
    """Scale and bias; the arithmetic is :func:`layer_norm`."""

    def __init__(self, width: int, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))


def layer_norm(x_BTD: jax.Array, norm: LayerNorm, epsilon: float) -> jax.Array:
    """Layer normalisation in float32, rounded to the input's dtype."""
    wide = x_BTD.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (norm.scale, norm.bias))
    return (centred * inverse * scale + bias).astype(x_BTD.dtype)


class Linear(nnx.Module):
    """Holds ``kernel``, a :class:`Dense`, and ``bias [O]``; the product itself goes through the hook."""

    def __init__(self, inputs: int, outputs: int, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(random_dense(inputs, outputs, std, dtype, rngs))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (outputs,), dtype))


def random_dense(inputs: int, outputs: int, std: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> Dense:
    """A weight of normally distributed numbers."""
    return Dense(nnx.initializers.normal(std)(rngs.params(), (inputs, outputs), dtype).T)


def _project(x_BTI: jax.Array, linear: Linear, adapters: LayerAdapters, target: str) -> jax.Array:
    return apply(adapters.get(target), x_BTI, linear.kernel[...], linear.bias[...])


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
        self.c_attn = Linear(*sizes["attn.c_attn"], std, dtype, rngs)
        self.c_proj = Linear(*sizes["attn.c_proj"], deep, dtype, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        seen: Visible | Paging,
        cache: LayerCache | None,
        adapters: LayerAdapters,
        config: StarCoderConfig,
    ) -> tuple[jax.Array, LayerCache | None]:
        q, k, v = split_qkv(_project(x_BTD, self.c_attn, adapters, "attn.c_attn"), config)
        if cache is not None:
            assert isinstance(seen, Paging)
            cache = cache.write(k, v, positions_BT, seen)
            mixed_BTD = attend_cached(q, cache, seen, positions_BT, config)
        else:
            assert isinstance(seen, Visible)
            mixed_BTD = attend_visible(q, k, v, seen, config)
        return _project(mixed_BTD, self.c_proj, adapters, "attn.c_proj"), cache


class MLP(nnx.Module):
    def __init__(self, config: StarCoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes, std = config.projections(), config.initializer_range
        deep = std / (2 * config.n_layer) ** 0.5
        self.c_fc = Linear(*sizes["mlp.c_fc"], std, dtype, rngs)
        self.c_proj = Linear(*sizes["mlp.c_proj"], deep, dtype, rngs)

    def __call__(
        self, x_BTD: jax.Array, adapters: LayerAdapters, config: StarCoderConfig
    ) -> jax.Array:
        h_BTF = _project(x_BTD, self.c_fc, adapters, "mlp.c_fc")
        # Checkpointed: its input alone is kept for the backward pass.
        h_BTF = jax.checkpoint(_ACTIVATIONS[config.activation_function])(h_BTF)
        return _project(h_BTF, self.c_proj, adapters, "mlp.c_proj")


class Block(nnx.Module):
    def __init__(self, config: StarCoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config.n_embd, dtype)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = LayerNorm(config.n_embd, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        seen: Visible | Paging,
        cache: LayerCache | None,
        adapters: LayerAdapters,
        config: StarCoderConfig,
    ) -> tuple[jax.Array, LayerCache | None]:
        epsilon = config.layer_norm_epsilon
        mixed, cache = self.attn(
            layer_norm(x_BTD, self.ln_1, epsilon), positions_BT, seen, cache, adapters, config
        )
        x_BTD = x_BTD + mixed
        return x_BTD + self.mlp(layer_norm(x_BTD, self.ln_2, epsilon), adapters, config), cache


class StarCoder(nnx.Module):
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
        self.ln_f = LayerNorm(config.n_embd, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(
                random_dense(config.n_embd, config.vocab_size, std, dtype, rngs)
            )

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
        at_BT = jnp.clip(positions_BT, 0, self.config.n_positions - 1)
        x_BTD = self.wte.embedding[...][tokens_BT] + self.wpe.embedding[...][at_BT]
        layers: list[LayerCache] = []
        for number, block in enumerate(self.h):
            layer_adapters = {} if adapters is None else adapters[number]
            layer_cache = None if cache is None else cache[number]
            run = block if remat == "none" else _rematerialised(block, remat)
            x_BTD, layer_cache = run(
                x_BTD, positions_BT, seen, layer_cache, layer_adapters, self.config
            )
            if layer_cache is not None:
                layers.append(layer_cache)
        x_BTD = layer_norm(x_BTD, self.ln_f, self.config.layer_norm_epsilon)
        return x_BTD, (None if cache is None else layers)

    def head(self) -> jax.Array:
        """The output projection ``[D, V]``, tied to the embedding or its own."""
        if self.config.tie_word_embeddings:
            return self.wte.embedding[...].T
        return self.lm_head[...].explicit()

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """Scores over the vocabulary ``[..., V]`` in float32."""
        if self.config.tie_word_embeddings:
            return product(hidden_xD, Dense(self.wte.embedding[...]))
        return product(hidden_xD, self.lm_head[...])

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
