"""StarCoder2 in flax.nnx: configuration, model, names of its tensors."""

from __future__ import annotations

from flora_jax.models.family import Family, Launches, builder
from flora_jax.models.starcoder2.config import PRESETS, StarCoder2Config
from flora_jax.models.starcoder2.names import AXES, hf_tensors, redundant

FAMILY = Family(
    title="StarCoder2",
    config=StarCoder2Config.from_dict,
    tensors=hf_tensors,
    blocks="layers",
    embedding="embed_tokens.embedding",
    tied_head="lm_head.weight",
    optional_prefix="model.",
    redundant=redundant,
    axes=AXES,
    build=builder("flora_jax.models.starcoder2.model", "StarCoder2"),
    presets=PRESETS,
    launches=Launches(
        layer={"loop": 23.0, "gather": 23.0, "cudnn": 21.0, "fused": 21.0},
        # The bias, and before the second product of the MLP its activation. Queries and keys get theirs
        # in the kernel that turns them.
        rounded_saves={
            "self_attn.v_proj": 1,
            "self_attn.o_proj": 1,
            "mlp.c_fc": 2,
            "mlp.c_proj": 2,
        },
        other=7,
    ),
    limit=lambda config: config.rotary.scaling.limit,
)
