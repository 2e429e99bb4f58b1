"""Tiny torch GPTBigCode models and PEFT adapters with random weights, and their flax twins.

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

from flora_jax.models.model import Model, abstract_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.weights.held import reading_of

TINY = dict(
    vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=48, eos_token_id=0
)


def tiny_torch_model(seed: int = 0, **overrides: Any) -> GPTBigCodeForCausalLM:
    """A float32 model in eval mode; biases and norms are random too, so that none can be missed."""
    generator = torch.Generator().manual_seed(seed)
    config = GPTBigCodeConfig(**{**TINY, "bos_token_id": 0, "pad_token_id": None, **overrides})
    config._attn_implementation = "eager"
    model = GPTBigCodeForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            spread = value.shape[-1] ** -0.5 if value.ndim == 2 else 0.1
            value.copy_(centre + spread * torch.randn(value.shape, generator=generator))
    return model


def to_flax(torch_model: GPTBigCodeForCausalLM) -> Model:
    """The same weights as our model, in float32."""
    config = StarCoderConfig.from_dict(torch_model.config.to_dict())
    model = abstract_model(config)
    weights = {name: value.detach().numpy() for name, value in torch_model.named_parameters()}

    def twin(path: tuple[Any, ...], wanted: Any) -> Any:
        names = [str(part) for part in path]
        *parents, leaf = names
        if names == ["lm_head"]:
            value = weights["lm_head.weight"]
        else:
            torch_leaf = "bias" if leaf == "bias" else "weight"
            value = weights[".".join(["transformer", *parents, torch_leaf])]
        made = reading_of(wanted[...], None).make(jnp.asarray(value))
        assert made.shape == wanted.shape, (names, made.shape, wanted.shape)
        return wanted.replace(made)

    flat = [(path, twin(path, wanted)) for path, wanted in nnx.to_flat_state(model.params)]
    return Model(config, model.graph, nnx.from_flat_state(flat))


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
