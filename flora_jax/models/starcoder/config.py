"""The GPTBigCode configuration: every field that changes a result, read from config.json.

Knows nothing of arrays. A field it does not know, or a value it cannot honour, is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flora_jax.adapters.projections import ModuleNames, Projections
from flora_jax.errors import InputError
from flora_jax.models.config_fields import (
    ACTIVATIONS,
    Fields,
    check_choice,
    check_fields,
    check_multiple,
    check_positive,
    located,
    read_fields,
    write_fields,
)

_FIELDS = Fields(
    model_types=("gpt_bigcode",),
    # null means 4 * n_embd; and the number of key and value heads follows from multi_query.
    types={"n_inner": "int | None", "num_key_value_heads": "int | None"},
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    # Dropout probabilities matter only while pre-training with dropout, which nothing here does.
    without_effect=frozenset(
        "attn_pdrop embd_pdrop inference_runner max_batch_size max_sequence_length pad_key_length "
        "pre_allocate_kv_cache resid_pdrop summary_activation summary_first_dropout "
        "summary_proj_to_labels summary_type summary_use_proj validate_runner_input".split()
    ),
    kept=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
)
# Sizes by name, and what they are sizes of.
_SIZES = {
    "vocab_size": "vocabulary",
    "n_positions": "positions",
    "n_embd": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "n_inner": "width",
}
# PEFT's tables for gpt_bigcode: c_attn is query, key and value at once.
NAMES = ModuleNames(
    blocks="transformer.h",
    embeddings=("lm_head", "transformer.wte", "transformer.wpe"),
    others=("transformer", "transformer.drop", "transformer.h", "transformer.ln_f"),
    others_in_block=(
        "", "ln_1", "attn", "attn.resid_dropout", "ln_2", "mlp", "mlp.act", "mlp.dropout",
    ),
    defaults={"lora": ("c_attn",), "ia3": ("c_attn", "mlp.c_proj")},
    feedforward=("mlp.c_proj",),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StarCoderConfig:
    """Shape and options of a GPTBigCode model; field names and defaults are transformers'.

    ``n_inner`` is resolved (null in config.json means ``4 * n_embd``). ``eos_token_ids`` holds the
    tokens that end a generation; ``dtype`` the checkpoint's own ("float32", "bfloat16", "float16").
    ``others`` are fields of config.json that have no effect here but elsewhere, to be written again.
    """

    model_type: ClassVar[str] = "gpt_bigcode"

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    activation_function: str = "gelu_pytorch_tanh"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    attention_softmax_in_fp32: bool = True
    scale_attention_softmax_in_fp32: bool = True
    multi_query: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = (50256,)
    dtype: str = "float32"
    others: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_fields(self, _SIZES)
        check_multiple("n_embd", self.n_embd, "n_head", self.n_head)
        check_positive("layer_norm_epsilon", self.layer_norm_epsilon)
        check_choice("activation_function", self.activation_function, ACTIVATIONS)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return 1 if self.multi_query else self.n_head

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale_attn_weights else 1.0

    @property
    def softmax_in_float32(self) -> bool:
        return self.attention_softmax_in_fp32

    @property
    def scale_in_float32(self) -> bool:
        return self.attention_softmax_in_fp32 and self.scale_attention_softmax_in_fp32

    def projections(self) -> Projections:
        """The (input, output) features of the four projections of a block, by adapter target."""
        widths = {
            "attn.c_attn": (self.n_embd, self.n_embd + 2 * self.kv_heads * self.head_dim),
            "attn.c_proj": (self.n_embd, self.n_embd),
            "mlp.c_fc": (self.n_embd, self.n_inner),
            "mlp.c_proj": (self.n_inner, self.n_embd),
        }
        return Projections(widths, NAMES)

    def summary(self) -> str:
        """The block's shape in words."""
        heads = "multi-query" if self.multi_query else "multi-head"
        return f"{self.n_layer} x {self.n_embd} wide, {self.n_head} heads, {heads}"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> StarCoderConfig:
        """Reads a Hugging Face configuration.

        Raises:
            InputError: another architecture, an unknown field, or a value of an unsupported kind;
                the message starts with ``where``.
        """
        values = read_fields(cls, _FIELDS, raw, where)
        heads = values.pop("num_key_value_heads", None)
        if values.get("n_inner") is None:
            values["n_inner"] = 4 * values.get("n_embd", cls.n_embd)
        with located(where):
            config = cls(**values)
            if heads not in (None, config.kv_heads):
                raise InputError(f"num_key_value_heads is {heads!r}, expected {config.kv_heads}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as Hugging Face's config.json has it."""
        return write_fields(self, "GPTBigCodeForCausalLM")


def _preset(width: int, layers: int, heads: int, positions: int = 8192) -> StarCoderConfig:
    return StarCoderConfig(
        vocab_size=49152,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=4 * width,
        eos_token_ids=(0,),
    )


# Shapes for experiments with random weights; a checkpoint's own config.json always wins.
PRESETS = {
    "mini": dataclasses.replace(_preset(256, 6, 4, 512), vocab_size=8192),
    "164m": _preset(768, 20, 12),
    "1b": _preset(2048, 24, 16),
    "3b": _preset(2816, 36, 22),
    "15b": _preset(6144, 40, 48),
}
