"""StarCoder (GPTBigCode) in flax.nnx: configuration, model, names of its tensors."""

from __future__ import annotations

from flora_jax.models.family import Family, Launches, builder
from flora_jax.models.starcoder.config import PRESETS, StarCoderConfig
from flora_jax.models.starcoder.names import AXES, buffer_problems, hf_tensors

FAMILY = Family(
    title="GPTBigCode (StarCoder)",
    config=StarCoderConfig.from_dict,
    tensors=hf_tensors,
    blocks="h",
    embedding="wte.embedding",
    tied_head="lm_head.weight",
    optional_prefix="transformer.",
    redundant=buffer_problems,
    axes=AXES,
    build=builder("flora_jax.models.starcoder.model", "StarCoder"),
    presets=PRESETS,
    launches=Launches(
        layer={"loop": 20.0, "gather": 20.0, "cudnn": 18.0, "fused": 18.0},
        # The bias, and before the second product of the MLP its activation.
        rounded_saves={"attn.c_attn": 1, "attn.c_proj": 1, "mlp.c_fc": 2, "mlp.c_proj": 2},
        other=6,
    ),
    positions="n_positions",
)
