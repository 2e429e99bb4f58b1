"""Hugging Face's name, shape and orientation of every parameter; its axes; buffers beside the parameters.

Knows nothing of JAX arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from flora_jax.models.axes import Rules
from flora_jax.models.family import Stored, Tensor
from flora_jax.models.llama.config import LlamaConfig

# Keys and values are split like the queries: the cuts fall between their heads where there are at least
# as many of them as devices.
AXES: Rules = (
    ("embed_tokens.embedding", ("vocab", "embed")),
    ("layers.*.input_layernorm.scale", ("embed",)),
    ("layers.*.self_attn.q_proj.kernel", ("embed", "heads")),
    ("layers.*.self_attn.q_proj.bias", ("heads",)),
    ("layers.*.self_attn.k_proj.kernel", ("embed", "qkv")),
    ("layers.*.self_attn.k_proj.bias", ("qkv",)),
    ("layers.*.self_attn.v_proj.kernel", ("embed", "qkv")),
    ("layers.*.self_attn.v_proj.bias", ("qkv",)),
    ("layers.*.self_attn.q_norm.scale", ("head_dim",)),
    ("layers.*.self_attn.k_norm.scale", ("head_dim",)),
    ("layers.*.self_attn.o_proj.kernel", ("heads", "embed")),
    ("layers.*.self_attn.o_proj.bias", ("embed",)),
    ("layers.*.post_attention_layernorm.scale", ("embed",)),
    ("layers.*.mlp.gate_proj.kernel", ("embed", "mlp")),
    ("layers.*.mlp.gate_proj.bias", ("mlp",)),
    ("layers.*.mlp.up_proj.kernel", ("embed", "mlp")),
    ("layers.*.mlp.up_proj.bias", ("mlp",)),
    ("layers.*.mlp.down_proj.kernel", ("mlp", "embed")),
    ("layers.*.mlp.down_proj.bias", ("embed",)),
    ("norm.scale", ("embed",)),
    ("lm_head", ("embed", "vocab")),
)
# Frequencies follow from the configuration; some files have them all the same.
_BUFFER = re.compile(r"(?:model\.)?(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.inv_freq")


def hf_tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Every parameter of the model by our dotted path."""
    width, vocabulary = config.hidden_size, config.vocab_size
    biased = _biased(config)
    table = {
        "embed_tokens.embedding": Tensor("model.embed_tokens.weight", (vocabulary, width), False)
    }

    def norm(path: str, size: int) -> None:
        table[f"{path}.scale"] = Tensor(f"model.{path}.weight", (size,), False)

    for layer in range(config.n_layer):
        block = f"layers.{layer}"
        norm(f"{block}.input_layernorm", width)
        norm(f"{block}.post_attention_layernorm", width)
        if config.qk_norm:
            norm(f"{block}.self_attn.q_norm", config.head_dim)
            norm(f"{block}.self_attn.k_norm", config.head_dim)
        for target, (inputs, outputs) in config.projections().items():
            path, name = f"{block}.{target}", f"model.{block}.{target}"
            table[f"{path}.kernel"] = Tensor(f"{name}.weight", (outputs, inputs), True)
            if biased[target]:
                table[f"{path}.bias"] = Tensor(f"{name}.bias", (outputs,), False)
    norm("norm", width)
    if not config.tie_word_embeddings:
        table["lm_head"] = Tensor("lm_head.weight", (vocabulary, width), True)
    return table


def _biased(config: LlamaConfig) -> dict[str, bool]:
    """By target whether the projection has a bias."""
    return {
        **{f"self_attn.{name}_proj": config.qkv_bias for name in "qkv"},
        "self_attn.o_proj": config.output_bias,
        **{f"mlp.{name}_proj": config.mlp_bias for name in ("gate", "up", "down")},
    }


def buffer_problems(tensor: Stored, config: LlamaConfig) -> Iterator[str]:
    """What is wrong with a tensor that is no parameter: nothing with the frequencies of the positions."""
    where = f"{tensor.name} in {tensor.file.name}"
    match = _BUFFER.fullmatch(tensor.name)
    if match is None or int(match[1] or 0) >= config.n_layer:
        yield f"{where} is unexpected, of shape {tensor.shape}"
    elif tensor.shape != (config.head_dim // 2,):
        yield (
            f"{where} has shape {tensor.shape}, expected {(config.head_dim // 2,)} frequencies of a "
            f"head of {config.head_dim}"
        )
