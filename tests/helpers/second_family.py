"""A small second family of models: nothing in it is named, biased, tied or shared as in StarCoder.

Root-mean-square norms, no biases, no position embedding, grouped queries, an untied head, and separate
projections for queries, keys and values. No checkpoint of anyone's has it.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from flora_jax.adapters.projections import ModuleNames, Projections
from flora_jax.models.decoder import Decoder, Parts, attend_in
from flora_jax.models.family import Family, Launches, Tensor
from flora_jax.models.layers import RMSNorm, linear, project, random_weight

NAMES = ModuleNames(
    blocks="model.layers",
    embeddings=("lm_head", "model.embed_tokens"),
    others=("model", "model.norm"),
    others_in_block=("", "mixer", "norm_in", "norm_out"),
    defaults={"lora": ("q_proj", "v_proj"), "ia3": ("k_proj", "v_proj", "down_proj")},
    feedforward=("down_proj",),
)


@dataclasses.dataclass(frozen=True)
class EchoConfig:
    model_type: ClassVar[str] = "echo"

    vocab_size: int = 97
    num_hidden_layers: int = 2
    max_position_embeddings: int = 96
    hidden_size: int = 16
    n_head: int = 4
    kv_heads: int = 2
    initializer_range: float = 0.4
    eos_token_ids: tuple[int, ...] = (0,)
    dtype: str = "float32"
    others: tuple = ()
    softmax_in_float32: ClassVar[bool] = True
    scale_in_float32: ClassVar[bool] = True

    @property
    def n_layer(self):
        return self.num_hidden_layers

    @property
    def n_positions(self):
        return self.max_position_embeddings

    @property
    def head_dim(self):
        return self.hidden_size // self.n_head

    @property
    def score_scale(self):
        return self.head_dim**-0.5

    def projections(self):
        width, keys = self.hidden_size, self.kv_heads * self.head_dim
        return Projections(
            {
                "mixer.q_proj": (width, width),
                "mixer.k_proj": (width, keys),
                "mixer.v_proj": (width, keys),
                "mixer.o_proj": (width, width),
                "up_proj": (width, 3 * width),
                "down_proj": (3 * width, width),
            },
            NAMES,
        )

    def summary(self):
        return f"{self.n_layer} x {self.hidden_size} wide"

    def to_dict(self):
        return {"model_type": self.model_type} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw, where):
        values = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        return cls(**values | {"eos_token_ids": tuple(raw["eos_token_ids"]), "others": ()})


def tensors(config):
    width, vocabulary = config.hidden_size, config.vocab_size
    table = {"embed": Tensor("model.embed_tokens.weight", (vocabulary, width), False)}
    for n in range(config.n_layer):
        for norm in ("norm_in", "norm_out"):
            name = f"model.layers.{n}.{norm}.weight"
            table[f"blocks.{n}.{norm}.scale"] = Tensor(name, (width,), False)
        for target, (inputs, outputs) in config.projections().items():
            name = f"model.layers.{n}.{target}.weight"
            table[f"blocks.{n}.{target}.kernel"] = Tensor(name, (outputs, inputs), True)
    table["norm.scale"] = Tensor("model.norm.weight", (width,), False)
    table["head_DV"] = Tensor("lm_head.weight", (vocabulary, width), True)
    return table


def redundant(tensor, config):
    yield f"{tensor.name} is unexpected"


class Mixer(nnx.Module):
    def __init__(self, config, linear):
        self.q_proj, self.k_proj = linear("mixer.q_proj"), linear("mixer.k_proj")
        self.v_proj, self.o_proj = linear("mixer.v_proj"), linear("mixer.o_proj")

    def __call__(self, x_BTD, places, cache, adapters, config):
        qkv = tuple(
            project(x_BTD, holder, adapters, f"mixer.{name}_proj").reshape(
                *x_BTD.shape[:2], heads, config.head_dim
            )
            for name, holder, heads in (
                ("q", self.q_proj, config.n_head),
                ("k", self.k_proj, config.kv_heads),
                ("v", self.v_proj, config.kv_heads),
            )
        )
        mixed_BTD, cache = attend_in(places, qkv, cache, config)
        return project(mixed_BTD, self.o_proj, adapters, "mixer.o_proj"), cache


class Block(nnx.Module):
    def __init__(self, config, dtype, rngs):
        def own(target):
            widths = config.projections()[target]
            return linear(widths, config.initializer_range, dtype, rngs, bias=False)

        self.mixer = Mixer(config, own)
        self.up_proj, self.down_proj = own("up_proj"), own("down_proj")
        self.norm_in = RMSNorm(config.hidden_size, 1e-5, dtype)
        self.norm_out = RMSNorm(config.hidden_size, 1e-5, dtype)

    def __call__(self, x_BTD, places, cache, adapters, config):
        mixed_BTD, cache = self.mixer(self.norm_in(x_BTD), places, cache, adapters, config)
        x_BTD = x_BTD + mixed_BTD
        h_BTF = jax.nn.silu(project(self.norm_out(x_BTD), self.up_proj, adapters, "up_proj"))
        return x_BTD + project(h_BTF, self.down_proj, adapters, "down_proj"), cache


class Echo(Decoder):
    def __init__(self, config, dtype, rngs):
        init = nnx.initializers.normal(config.initializer_range)
        width, vocabulary = config.hidden_size, config.vocab_size
        self.config = config
        self.embed = nnx.Param(init(rngs.params(), (vocabulary, width), dtype))
        self.blocks = nnx.List([Block(config, dtype, rngs) for _ in range(config.n_layer)])
        self.norm = RMSNorm(width, 1e-5, dtype)
        self.head_DV = nnx.Param(
            random_weight((width, vocabulary), config.initializer_range, dtype, rngs)
        )

    def parts(self):
        return Parts(self.embed[...], self.blocks, self.norm, self.head_DV[...])


def build(config: Any, dtype: Any, seed: int) -> Echo:
    return Echo(config, dtype, nnx.Rngs(seed))


FAMILY = Family(
    title="Echo",
    config=EchoConfig.from_dict,
    tensors=tensors,
    blocks="blocks",
    embedding="embed",
    tied_head=None,
    optional_prefix="model.",
    redundant=redundant,
    axes=(
        ("embed", ("vocab", "embed")),
        ("blocks.*.norm_in.scale", ("embed",)),
        ("blocks.*.norm_out.scale", ("embed",)),
        ("blocks.*.mixer.q_proj.kernel", ("embed", "heads")),
        ("blocks.*.mixer.k_proj.kernel", ("embed", "qkv")),
        ("blocks.*.mixer.v_proj.kernel", ("embed", "qkv")),
        ("blocks.*.mixer.o_proj.kernel", ("heads", "embed")),
        ("blocks.*.up_proj.kernel", ("embed", "mlp")),
        ("blocks.*.down_proj.kernel", ("mlp", "embed")),
        ("norm.scale", ("embed",)),
        ("head_DV", ("embed", "vocab")),
    ),
    build=build,
    presets={},
    launches=Launches(layer={}, rounded_saves={}, other=0),
)
