"""Llama and its kin (Mistral, Qwen2, Qwen3, SmolLM2, Granite-code 3B and 8B) in flax.nnx."""

from __future__ import annotations

from flora_jax.models.family import Family, Launches, builder
from flora_jax.models.llama.config import PRESETS, LlamaConfig
from flora_jax.models.llama.names import AXES, buffer_problems, hf_tensors

FAMILY = Family(
    title="Llama",
    config=LlamaConfig.from_dict,
    tensors=hf_tensors,
    blocks="layers",
    embedding="embed_tokens.embedding",
    tied_head="lm_head.weight",
    optional_prefix="model.",
    redundant=buffer_problems,
    axes=AXES,
    build=builder("flora_jax.models.llama.model", "Llama"),
    presets=PRESETS,
    launches=Launches(
        layer={"loop": 20.0, "gather": 20.0, "cudnn": 18.0, "fused": 18.0},
        # Queries and keys are rounded where they are turned, gate and up where they meet, and the other
        # results where they are added to the block's input.
        rounded_saves={"self_attn.v_proj": 1},
        other=6,
    ),
    limit=lambda config: config.rotary.scaling.limit,
)
