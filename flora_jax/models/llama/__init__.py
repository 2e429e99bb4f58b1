"""Llama and its kin (Mistral, Qwen2, Qwen3, SmolLM2, Granite-code 3B and 8B) in flax.nnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flora_jax.models.family import Family, Launches
from flora_jax.models.llama.config import PRESETS, LlamaConfig
from flora_jax.models.llama.names import AXES, buffer_problems, hf_tensors

if TYPE_CHECKING:
    from flora_jax.models.model import LanguageModel


def _build(config: LlamaConfig, dtype: Any, seed: int) -> LanguageModel:
    from flax import nnx

    from flora_jax.models.llama.model import Llama

    return Llama(config, dtype=dtype, rngs=nnx.Rngs(seed))


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
    build=_build,
    presets=PRESETS,
    launches=Launches(
        layer={"loop": 20.0, "gather": 20.0, "cudnn": 18.0, "fused": 18.0},
        rounded_saves={},
        other=6,
    ),
)
