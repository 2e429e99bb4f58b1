"""The configurations of Llama and its kin, one class for all: every field that changes a result.

What the model types do differently stands in :data:`VARIANTS`. Knows nothing of arrays. A field it does
not know, or a value it cannot honour, is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flora_jax.adapters.projections import ModuleNames, Projections
from flora_jax.errors import InputError
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
from flora_jax.models.llama.windows import (
    LayeredWindows,
    NoWindow,
    OneWindow,
    WindowFields,
    Windows,
)
from flora_jax.models.rotary import ROTARY_FIELDS, Llama3, Rotary, read_rotary
from flora_jax.models.self_attention_config import SelfAttentionShape

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
_BIAS_FIELDS = ("attention_bias", "mlp_bias")
# Fields of the class that are made from others of the file, or that only some files have.
_DERIVED = frozenset(("rotary", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "windows"))


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a model type does in its own way.

    Args:
        architecture: transformers' class.
        windows: how its files say what each layer sees.
        ia3: PEFT's own targets for IA3, by the ends of their paths.
        defaults: of fields that a file may leave out, where they are not those of :class:`LlamaConfig`.
        bias_fields: which of ``attention_bias`` and ``mlp_bias`` say whether there are such biases; a
            file may have the other one too, if it is false.
        qkv_bias: whether queries, keys and values have a bias where no field says it.
        qk_norm: whether each head's query and key are normalised.
    """

    architecture: str
    windows: WindowFields
    ia3: tuple[str, ...]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bias_fields: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False

    def fields(self) -> Fields:
        """What config.json may have beside the fields of :class:`LlamaConfig`."""
        optional = {"num_key_value_heads": "int | None", "head_dim": "int | None"}
        without = set(_BIAS_FIELDS).difference(self.bias_fields)
        if self.qkv_bias:
            # False would contradict the biases that there are.
            without.discard("attention_bias")
        return Fields(
            model_types=tuple(VARIANTS),
            types={**optional, **dict.fromkeys(self.bias_fields, "bool"), **self.windows.types},
            only={"rope_interleaved": False, "use_mrope": False, **dict.fromkeys(without, False)},
            # pretraining_tp cuts products into parts that are added up again. The rotary fields have a
            # reader of their own.
            without_effect=ROTARY_FIELDS.union(
                "attention_dropout is_llama_config max_sequence_length pretraining_tp "
                "transformers.js_config".split()
            ),
            kept=("attention_dropout",),
            derived=_DERIVED,
        )

    def options(self, values: dict[str, Any], layers: int) -> dict[str, Any]:
        """Takes the fields that only some model types have out of ``values``, and says what they mean."""
        attention = values.pop("attention_bias", False)
        return {
            "qkv_bias": attention or self.qkv_bias,
            "output_bias": attention,
            "mlp_bias": values.pop("mlp_bias", False),
            "qk_norm": self.qk_norm,
            "windows": self.windows.read(values, layers),
        }

    def written(self, config: LlamaConfig) -> dict[str, Any]:
        """The way back: the fields of the file that mean the configuration's options."""
        biases = {"attention_bias": config.output_bias, "mlp_bias": config.mlp_bias}
        return {
            **{name: biases[name] for name in self.bias_fields},
            **self.windows.write(config.windows),
        }


_IN_LAYERS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_QWEN = {**_IN_LAYERS, "layer_types": None, "num_key_value_heads": 32}
VARIANTS: Mapping[str, Variant] = {
    "llama": Variant(
        "LlamaForCausalLM",
        NoWindow(),
        ia3=("k_proj", "v_proj", "down_proj"),
        defaults={"eos_token_ids": (2,)},
        bias_fields=("attention_bias", "mlp_bias"),
    ),
    "mistral": Variant(
        "MistralForCausalLM",
        OneWindow(),
        ia3=("k_proj", "v_proj", "down_proj"),
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "eos_token_ids": (2,),
        },
    ),
    "qwen2": Variant(
        "Qwen2ForCausalLM",
        LayeredWindows(),
        ia3=("q_proj", "v_proj", "down_proj"),
        defaults={
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            **_QWEN,
        },
        qkv_bias=True,
    ),
    "qwen3": Variant(
        "Qwen3ForCausalLM",
        LayeredWindows(),
        ia3=("q_proj", "v_proj", "down_proj"),
        defaults={
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            "head_dim": 128,
            **_QWEN,
        },
        bias_fields=("attention_bias",),
        qk_norm=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(SelfAttentionShape):
    """Shape and options of a model; names of fields and their defaults are transformers'.

    Args:
        windows: by layer how many of the last positions a token sees; ``None`` is all. Empty means all
            in every layer.
        eos_token_ids: the tokens that end a generation.
        dtype: the checkpoint's own ("float32", "bfloat16", "float16").
        others: fields of config.json that have no effect here but elsewhere, to be written again.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: Windows = ()
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    others: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, tuple(VARIANTS))
        check_fields(self, _SIZES)
        self.check_heads()
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_hidden_layers)
        if len(self.windows) != self.num_hidden_layers:
            raise InputError(
                f"config: windows are for {len(self.windows)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )

    @property
    def softmax_in_float32(self) -> bool:
        return True

    @property
    def scale_in_float32(self) -> bool:
        return True

    @property
    def qk_norm_epsilon(self) -> float | None:
        return self.rms_norm_eps if self.qk_norm else None

    def projections(self) -> Projections:
        """The (input, output) features of the seven projections of a block, by adapter target."""
        width, inner = self.hidden_size, self.intermediate_size
        widths = {
            **self.attention_widths(),
            "mlp.gate_proj": (width, inner),
            "mlp.up_proj": (width, inner),
            "mlp.down_proj": (inner, width),
        }
        return Projections(widths, NAMES[self.model_type])

    def summary(self) -> str:
        """The block's shape in words."""
        own = [window for window in self.windows if window is not None]
        seen = f", window {own[0]} in {len(own)} layers" if own else ""
        return (
            f"{self.n_layer} x {self.hidden_size} wide, {self.n_head} heads of {self.head_dim}, "
            f"{self.kv_heads} of keys and values{seen}"
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
        """Reads a Hugging Face configuration, with the defaults of its model type.

        Raises:
            InputError: another architecture, an unknown field, or a value of an unsupported kind;
                the message starts with ``where``.
        """
        # An unknown model type is refused by read_fields.
        variant = VARIANTS.get(str(raw.get("model_type")), VARIANTS["llama"])
        found = read_fields(cls, variant.fields(), raw, where)
        values = {"num_key_value_heads": None, "head_dim": None, **variant.defaults, **found}
        with located(where):
            heads = values.get("num_attention_heads", cls.num_attention_heads)
            width = values.get("hidden_size", cls.hidden_size)
            if values["num_key_value_heads"] is None:
                values["num_key_value_heads"] = heads
            if values["head_dim"] is None:
                check_size("num_attention_heads", heads, "heads")
                check_multiple("hidden_size", width, "num_attention_heads", heads)
                values["head_dim"] = width // heads
            layers = values.get("num_hidden_layers", cls.num_hidden_layers)
            check_size("num_hidden_layers", layers, "layers")
            positions = values.get("max_position_embeddings", cls.max_position_embeddings)
            check_size("max_position_embeddings", positions, "positions")
            options = variant.options(values, layers)
            return cls(**values, **options, rotary=read_rotary(raw, positions))

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as Hugging Face's config.json has it."""
        variant = VARIANTS[self.model_type]
        raw = write_fields(self, variant.architecture)
        own = {name: value for name, value in raw.items() if name not in _DERIVED}
        return {**own, **variant.written(self), **self.rotary.to_dict()}


def _names(variant: Variant) -> ModuleNames:
    norms = ("self_attn.q_norm", "self_attn.k_norm") if variant.qk_norm else ()
    return ModuleNames(
        blocks="model.layers",
        embeddings=("lm_head", "model.embed_tokens"),
        others=("model", "model.layers", "model.norm", "model.rotary_emb"),
        others_in_block=(
            "", "input_layernorm", "self_attn", *norms, "post_attention_layernorm", "mlp", "mlp.act_fn",
        ),
        defaults={"lora": ("q_proj", "v_proj"), "ia3": variant.ia3},
        feedforward=("down_proj",),
    )  # fmt: skip


# By model type, for PEFT's defaults are.
NAMES = {model_type: _names(variant) for model_type, variant in VARIANTS.items()}

# Shapes for experiments with random weights; a checkpoint's own config.json always wins.
_LLAMA3 = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
PRESETS = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rotary=Rotary(100000.0),
        initializer_range=1 / 24,
        eos_token_ids=(0,),
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rotary=Rotary(500000.0, Llama3(**_LLAMA3, original_max_position_embeddings=8192)),
        eos_token_ids=(128001,),
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rotary=Rotary(500000.0),
        eos_token_ids=(128001,),
    ),
    "mistral-7b": LlamaConfig(
        model_type="mistral",
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        windows=(4096,) * 32,
        eos_token_ids=(2,),
    ),
    "qwen2.5-7b": LlamaConfig(
        model_type="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rotary=Rotary(1e6),
        qkv_bias=True,
        eos_token_ids=(151643,),
    ),
}
