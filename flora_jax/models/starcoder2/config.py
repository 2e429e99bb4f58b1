"""The StarCoder2 configuration: every field that changes a result, read from config.json.

Knows nothing of arrays. A field it does not know, or a value it cannot honour, is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flora_jax.adapters.projections import ModuleNames, Projections
from flora_jax.models.config_fields import (
    ACTIVATIONS,
    Fields,
    check_choice,
    check_fields,
    check_multiple,
    check_positive,
    check_size,
    located,
    read_fields,
    write_fields,
)
from flora_jax.models.rotary import ROTARY_FIELDS, Rotary, read_rotary
from flora_jax.models.self_attention_config import SelfAttentionShape

_FIELDS = Fields(
    model_types=("starcoder2",),
    # null, or no such field, means hidden_size / num_attention_heads; read_rotary reads the others.
    types={"head_dim": "int | None"},
    # transformers computes no other MLP and no other norm.
    only={"mlp_type": "default", "norm_type": "layer_norm"},
    # Dropout matters only while pre-training with it. The rest are GPTBigCode's names, which the
    # published files have beside those that count: hidden_act and norm_epsilon.
    without_effect=frozenset(
        "activation_function attention_dropout attention_softmax_in_fp32 embedding_dropout "
        "layer_norm_epsilon residual_dropout scale_attention_softmax_in_fp32 "
        "scale_attn_weights".split()
    )
    | ROTARY_FIELDS,
    kept=("attention_dropout", "embedding_dropout", "residual_dropout"),
    derived=frozenset(("rotary",)),
)
# Sizes by name, and what they are sizes of.
_SIZES = {
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "intermediate_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "head_dim": "width",
    "max_position_embeddings": "positions",
}
# PEFT has no defaults for starcoder2, and asks for targets. These are its own for Llama, whose
# projections have the same names but for the MLP's.
NAMES = ModuleNames(
    blocks="model.layers",
    embeddings=("lm_head", "model.embed_tokens"),
    others=("model", "model.layers", "model.norm", "model.rotary_emb"),
    others_in_block=(
        "", "self_attn", "mlp", "mlp.act", "input_layernorm", "post_attention_layernorm",
    ),
    defaults={"lora": ("q_proj", "v_proj"), "ia3": ("k_proj", "v_proj", "mlp.c_proj")},
    feedforward=("mlp.c_proj",),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StarCoder2Config(SelfAttentionShape):
    """Shape and options of a StarCoder2 model; field names and defaults are transformers'.

    ``head_dim`` is resolved (absent or null in config.json means ``hidden_size / num_attention_heads``).
    ``sliding_window`` is how many of the last positions a token sees, its own among them, in every layer;
    ``None`` is all. ``rotary`` stands for config.json's ``rope_parameters``, or ``rope_theta`` and
    ``rope_scaling``. ``eos_token_ids`` holds the tokens that end a generation; ``dtype`` the
    checkpoint's own ("float32", "bfloat16", "float16"). ``others`` are fields of config.json that have no
    effect here but elsewhere, to be written again.
    """

    model_type: ClassVar[str] = "starcoder2"
    softmax_in_float32: ClassVar[bool] = True
    scale_in_float32: ClassVar[bool] = True
    qk_norm_epsilon: ClassVar[float | None] = None

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int = 2
    head_dim: int = 128
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    initializer_range: float = 0.018042
    eos_token_ids: tuple[int, ...] = (50256,)
    dtype: str = "float32"
    others: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_fields(self, _SIZES)
        self.check_heads()
        check_positive("norm_epsilon", self.norm_epsilon)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window, "positions")

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers

    @property
    def qkv_bias(self) -> bool:
        return self.use_bias

    @property
    def output_bias(self) -> bool:
        return self.use_bias

    def projections(self) -> Projections:
        """The (input, output) features of the six projections of a block, by adapter target."""
        width, inner = self.hidden_size, self.intermediate_size
        widths = {
            **self.attention_widths(),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }
        return Projections(widths, NAMES)

    def summary(self) -> str:
        """The block's shape in words."""
        window = "" if self.sliding_window is None else f", window {self.sliding_window:,}"
        return (
            f"{self.n_layer} x {self.hidden_size} wide, {self.n_head} heads, "
            f"{self.kv_heads} of keys and values{window}"
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> StarCoder2Config:
        """Reads a Hugging Face configuration.

        Raises:
            InputError: another architecture, an unknown field, or a value of an unsupported kind;
                the message starts with ``where``.
        """
        values = read_fields(cls, _FIELDS, raw, where)
        with located(where):
            if values.get("head_dim") is None:
                width = values.get("hidden_size", cls.hidden_size)
                heads = values.get("num_attention_heads", cls.num_attention_heads)
                check_size("num_attention_heads", heads, "heads")
                check_multiple("hidden_size", width, "num_attention_heads", heads)
                values["head_dim"] = width // heads
            positions = values.get("max_position_embeddings", cls.max_position_embeddings)
            check_size("max_position_embeddings", positions, "positions")
            return cls(**values, rotary=read_rotary(raw, positions))

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as Hugging Face's config.json has it."""
        raw = write_fields(self, "Starcoder2ForCausalLM")
        del raw["rotary"]
        return raw | self.rotary.to_dict()


def _preset(
    width: int, layers: int, heads: int, kv_heads: int, base: float, **others: Any
) -> StarCoder2Config:
    return StarCoder2Config(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16384,
        sliding_window=4096,
        rotary=Rotary(base),
        eos_token_ids=(0,),
        **others,
    )


# Shapes for experiments with random weights; a checkpoint's own config.json always wins.
PRESETS = {
    "starcoder2-3b": _preset(3072, 30, 24, 2, 999999.4420358813),
    "starcoder2-7b": _preset(4608, 32, 36, 4, 1e6),
    "starcoder2-15b": _preset(
        6144, 40, 48, 4, 1e5, tie_word_embeddings=False, initializer_range=0.01275
    ),
}
