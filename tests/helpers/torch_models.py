"""Tiny torch models and PEFT adapters with random weights, and their flax twins.

Import it as ``from torch_models import …`` (pytest puts this folder on the path).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from flora_jax.models.family import family_of, read_family_config
from flora_jax.models.model import Model, abstract_model
from flora_jax.models.sharding import named_leaves
from flora_jax.weights.held import reading_of

TINY = dict(
    vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=48, eos_token_id=0
)


def tiny_torch_model(seed: int = 0, **overrides: Any) -> GPTBigCodeForCausalLM:
    """A float32 model in eval mode; biases and norms are random too, so that none can be missed."""
    config = GPTBigCodeConfig(**{**TINY, "bos_token_id": 0, "pad_token_id": None, **overrides})
    config._attn_implementation = "eager"
    return redrawn(GPTBigCodeForCausalLM(config).eval(), seed)


def redrawn(model: Any, seed: int) -> Any:
    """The torch model of any family with random parameters: norms' scales near one, others near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            centre = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
            spread = value.shape[-1] ** -0.5 if value.ndim == 2 else 0.1
            value.copy_(centre + spread * torch.randn(value.shape, generator=generator))
    return model


def to_flax(torch_model: Any) -> Model:
    """The same weights as our model of its family, in float32."""
    config = read_family_config(torch_model.config.to_dict(), "config.json")
    model = abstract_model(config)
    weights = {name: value.detach().numpy() for name, value in torch_model.named_parameters()}
    leaves, structure = named_leaves(model.params)
    table = family_of(config).tensors(config)
    assert set(weights) == {tensor.name for tensor in table.values()}

    def twin(path: str, wanted: Any) -> Any:
        made = reading_of(wanted, None).make(jnp.asarray(weights[table[path].name]))
        assert made.shape == wanted.shape, (path, made.shape, wanted.shape)
        return made

    twins = [twin(path, wanted) for path, wanted in leaves.items()]
    return Model(config, model.graph, jax.tree.unflatten(structure, twins))


def flax_logits(model: Model, tokens_BT: np.ndarray, adapters: Any = None) -> np.ndarray:
    """Logits ``[B, T, V]`` of one adapter (``ModelAdapter.layers``) or none, for all rows."""

    @jax.jit
    def forward(params: Any, tokens_BT: jax.Array, adapters: Any) -> jax.Array:
        return nnx.merge(model.graph, params)(tokens_BT, adapters=adapters)

    return np.asarray(forward(model.params, jnp.asarray(tokens_BT, jnp.int32), adapters))


def torch_logits(torch_model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return torch_model(input_ids=torch.tensor(tokens_BT)).logits.numpy()


def random_tokens(seed: int, rows: int = 2, length: int = 9, vocabulary: int = 97) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocabulary, (rows, length))


def random_peft(torch_model: Any, config: Any, seed: int = 0, spread: float = 0.3) -> Any:
    """The model wrapped by PEFT (in place, as PEFT does) with random adapter parameters.

    PEFT's own start is the identity: every trainable parameter is redrawn.
    """
    from peft import get_peft_model

    model = get_peft_model(torch_model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                centre = 1.0 if "ia3_l" in name else 0.0
                value.copy_(centre + spread * torch.randn(value.shape, generator=generator))
    return model
