"""The GPTBigCode configuration: every field that changes a result, read from config.json.

Knows nothing of arrays. A field it does not know, or a value it cannot honour, is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from flora_jax.adapters.projections import ModuleNames, Projections
from flora_jax.errors import InputError
from flora_jax.models.family import DTYPES, check_size

ACTIVATIONS = (
    "gelu_pytorch_tanh",
    "gelu_new",
    "gelu_fast",
    "gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
)

# Written by transformers into every config.json, without effect on the logits of a forward pass.
# Dropout probabilities matter only while pre-training with dropout, which nothing here does.
_WITHOUT_EFFECT = frozenset(
    "architectures attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id "
    "chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty "
    "do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id "
    "id2label inference_runner initializer_range is_encoder_decoder label2id length_penalty "
    "max_batch_size max_length max_sequence_length min_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_key_value_heads num_return_sequences output_attentions output_hidden_states "
    "output_scores pad_key_length pad_token_id pre_allocate_kv_cache prefix problem_type "
    "pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict "
    "return_dict_in_generate sep_token_id summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params "
    "temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers_version typical_p use_bfloat16 use_cache validate_runner_input "
    "model_type eos_token_id".split()
)
# Of these what others read: dropout while they train, and special tokens.
_KEPT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "bos_token_id", "pad_token_id")
# Accepted at the one value this implementation computes.
_ONLY = {"add_cross_attention": False, "is_decoder": False, "quantization_config": None}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
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
        for name, kind in _SIZES.items():
            check_size(name, getattr(self, name), kind)
        if self.n_embd % self.n_head:
            raise InputError(
                f"config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}"
            )
        if not 0 < self.layer_norm_epsilon < math.inf:
            raise InputError(
                f"config: layer_norm_epsilon is {self.layer_norm_epsilon}, expected above 0"
            )
        for token in self.eos_token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise InputError(f"config: eos_token_id is {token!r}, expected token ids")
        if self.activation_function not in ACTIVATIONS:
            raise InputError(
                f"config: activation_function is {self.activation_function!r}, "
                f"expected one of {', '.join(ACTIVATIONS)}"
            )
        if self.dtype not in DTYPES:
            raise InputError(
                f"config: dtype is {self.dtype!r}, expected float32, bfloat16 or float16"
            )

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
        if raw.get("model_type") != cls.model_type:
            raise InputError(
                f"{where}: model_type is {raw.get('model_type')!r}, expected {cls.model_type!r}"
            )
        known = {field.name: field for field in dataclasses.fields(cls) if field.name != "others"}
        values: dict[str, Any] = {}
        unknown: list[str] = []
        for key, value in raw.items():
            name = _ALIASES.get(key, key)
            if name != key and raw.get(name, value) != value:
                raise InputError(f"{where}: {key} is {value!r}, but {name} is {raw[name]!r}")
            if name in ("eos_token_id", "dtype", "torch_dtype", "eos_token_ids"):
                continue
            if name in known:
                values[name] = value
            elif key in _ONLY:
                if value != _ONLY[key]:
                    raise InputError(
                        f"{where}: {key} is {value!r}, only {_ONLY[key]!r} is supported"
                    )
            elif key not in _WITHOUT_EFFECT and not key.startswith("_") and value is not None:
                unknown.append(f"{key}={value!r}")
        if unknown:
            raise InputError(f"{where}: fields of unknown effect: {', '.join(sorted(unknown))}")
        inner = values.pop("n_inner", None)
        for name, value in values.items():
            _check_type(where, name, value, known[name].type)
        if inner is None:
            inner = 4 * values.get("n_embd", known["n_embd"].default)
        values["n_inner"] = inner
        eos = raw.get("eos_token_id", 50256)
        values["eos_token_ids"] = (
            tuple(eos) if isinstance(eos, list) else (eos,) * (eos is not None)
        )
        values["others"] = tuple((name, raw[name]) for name in _KEPT if name in raw)
        values["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        try:
            config = cls(**values)
            heads = raw.get("num_key_value_heads")
            if heads not in (None, config.kv_heads):
                raise InputError(f"num_key_value_heads is {heads!r}, expected {config.kv_heads}")
            return config
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as Hugging Face's config.json has it."""
        raw = dataclasses.asdict(self)
        eos = raw.pop("eos_token_ids")
        first = eos[0] if eos else None
        del raw["others"]
        return {
            "architectures": ["GPTBigCodeForCausalLM"],
            "model_type": self.model_type,
            **raw,
            "bos_token_id": first,
            "eos_token_id": list(eos) if len(eos) > 1 else first,
            **dict(self.others),
        }


def _check_type(where: str, name: str, value: Any, annotation: Any) -> None:
    types: dict[str, Any] = {"int": int, "bool": bool, "str": str, "float": (int, float)}
    expected = types[str(annotation)]
    if not isinstance(value, expected) or (annotation != "bool" and isinstance(value, bool)):
        raise InputError(f"{where}: {name} is {value!r}, expected {annotation}")


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
    "mini": dataclasses.replace(_preset(256, 6, 4, 512), vocab_size=4096),
    "164m": _preset(768, 20, 12),
    "1b": _preset(2048, 24, 16),
    "3b": _preset(2816, 36, 22),
    "15b": _preset(6144, 40, 48),
}
