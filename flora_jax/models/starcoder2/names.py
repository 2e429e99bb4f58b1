"""Hugging Face's name, shape and orientation of every parameter, and its axes.

Knows nothing of JAX arrays.
"""

from __future__ import annotations

from collections.abc import Iterator

from flora_jax.models.axes import Rules
from flora_jax.models.family import Stored, Tensor
from flora_jax.models.starcoder2.config import StarCoder2Config

AXES: Rules = (
    ("embed_tokens.embedding", ("vocab", "embed")),
    ("layers.*.input_layernorm.*", ("embed",)),
    ("layers.*.self_attn.q_proj.kernel", ("embed", "heads")),
    ("layers.*.self_attn.q_proj.bias", ("heads",)),
    ("layers.*.self_attn.k_proj.kernel", ("embed", "qkv")),
    ("layers.*.self_attn.k_proj.bias", ("qkv",)),
    ("layers.*.self_attn.v_proj.kernel", ("embed", "qkv")),
    ("layers.*.self_attn.v_proj.bias", ("qkv",)),
    ("layers.*.self_attn.o_proj.kernel", ("heads", "embed")),
    ("layers.*.self_attn.o_proj.bias", ("embed",)),
    ("layers.*.post_attention_layernorm.*", ("embed",)),
    ("layers.*.mlp.c_fc.kernel", ("embed", "mlp")),
    ("layers.*.mlp.c_fc.bias", ("mlp",)),
    ("layers.*.mlp.c_proj.kernel", ("mlp", "embed")),
    ("layers.*.mlp.c_proj.bias", ("embed",)),
    ("norm.*", ("embed",)),
    ("lm_head", ("embed", "vocab")),
)


def hf_tensors(config: StarCoder2Config) -> dict[str, Tensor]:
    """Every parameter of the model by our dotted path."""
    width, vocabulary = config.hidden_size, config.vocab_size
    table = {
        "embed_tokens.embedding": Tensor("model.embed_tokens.weight", (vocabulary, width), False)
    }

    def norm(path: str) -> None:
        table[f"{path}.scale"] = Tensor(f"model.{path}.weight", (width,), False)
        table[f"{path}.bias"] = Tensor(f"model.{path}.bias", (width,), False)

    for layer in range(config.n_layer):
        norm(f"layers.{layer}.input_layernorm")
        norm(f"layers.{layer}.post_attention_layernorm")
        for target, (inputs, outputs) in config.projections().items():
            path = f"layers.{layer}.{target}"
            table[f"{path}.kernel"] = Tensor(f"model.{path}.weight", (outputs, inputs), True)
            if config.use_bias:
                table[f"{path}.bias"] = Tensor(f"model.{path}.bias", (outputs,), False)
    norm("norm")
    if not config.tie_word_embeddings:
        table["lm_head"] = Tensor("lm_head.weight", (vocabulary, width), True)
    return table


def redundant(tensor: Stored, config: StarCoder2Config) -> Iterator[str]:
    """What is wrong with a tensor that is no parameter: always its being there."""
    yield f"{tensor.name} in {tensor.file.name} is unexpected, of shape {tensor.shape}"
