"""What all other rooms need to know of a family of models: one description, owned by the family.

A family is a folder beside this file with a ``FAMILY`` in its ``__init__``, and a line in
:data:`FAMILIES` for each ``model_type``. Knows nothing of arrays: importing it, or reading a
configuration, brings no JAX in.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np

from flora_jax.adapters.projections import Projections
from flora_jax.errors import InputError
from flora_jax.models.axes import MESH_AXES, Rules, logical_axes

if TYPE_CHECKING:
    from flora_jax.models.model import LanguageModel

# By config.json's model_type the module that has the family's FAMILY, one for several where they differ
# in values only.
FAMILIES: dict[str, str] = {
    "gpt_bigcode": "flora_jax.models.starcoder",
    "llama": "flora_jax.models.llama",
    "mistral": "flora_jax.models.llama",
    "qwen2": "flora_jax.models.llama",
    "qwen3": "flora_jax.models.llama",
    "starcoder2": "flora_jax.models.starcoder2",
}
DTYPES = ("float32", "bfloat16", "float16")
MOST_PARAMETERS = 10**13


class AttentionConfig(Protocol):
    """What attention reads of a configuration. Hashable: it is static in jitted functions."""

    @property
    def n_head(self) -> int:
        """Heads of the queries, a multiple of ``kv_heads``."""

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by, ``1/sqrt(head_dim)`` as a rule."""

    @property
    def softmax_in_float32(self) -> bool:
        """Whether scores and softmax are float32; else they have the activations' dtype."""

    @property
    def scale_in_float32(self) -> bool:
        """Whether the scores are scaled in float32; else the queries are, in their own dtype."""


class ModelConfig(AttentionConfig, Protocol):
    """What the rooms above read of a model's configuration; a frozen dataclass of its family.

    ``others`` are fields of config.json without effect here, to be written again.
    """

    @property
    def model_type(self) -> str:
        """config.json's: a key of :data:`FAMILIES`. A family may have several."""

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""

    @property
    def n_layer(self) -> int:
        """Blocks."""

    @property
    def n_positions(self) -> int:
        """The longest sequence."""

    @property
    def hidden_size(self) -> int:
        """Width of the activations between blocks."""

    @property
    def dtype(self) -> str:
        """The checkpoint's own: one of :data:`DTYPES`."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""

    @property
    def initializer_range(self) -> float:
        """Standard deviation of random weights."""

    @property
    def others(self) -> tuple[tuple[str, Any], ...]:
        """See the class."""

    def projections(self) -> Projections:
        """The linear projections of a block."""

    def summary(self) -> str:
        """The block's shape in words."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as Hugging Face's config.json has it."""


class Tensor(NamedTuple):
    """A parameter as Hugging Face's files have it.

    ``by_outputs`` where it stands for a weight ``[I, O]``: files, and the model's
    :class:`~flora_jax.weights.dense.Dense`, have ``[O, I]``.
    """

    name: str
    shape: tuple[int, ...]
    by_outputs: bool


class Stored(Protocol):
    """A tensor in a file, as far as a family looks at those that are no parameters."""

    @property
    def name(self) -> str:
        """As the file has it."""

    @property
    def file(self) -> Path:
        """The file that holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file has it."""

    @property
    def dtype(self) -> np.dtype | None:
        """``None`` for a kind that NumPy cannot hold."""

    @property
    def dtype_name(self) -> str:
        """The dtype's name in the file."""

    @property
    def read(self) -> Callable[[int, int], np.ndarray]:
        """``read(start, stop)`` gives those elements of the flattened tensor."""


@dataclasses.dataclass(frozen=True)
class Launches:
    """Kernels of a decode step that XLA makes for an H100, counted on compiled programs.

    Args:
        layer: kernels of a layer, its products among them, by implementation of attention.
        rounded_saves: by projection how many fewer where its result is rounded in the product; none
            where it is not named.
        other: of the rest of a step.
    """

    layer: Mapping[str, float]
    rounded_saves: Mapping[str, int]
    other: int


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        title: for people.
        config: reads config.json's object; the second argument says where it stands, for messages.
            ``InputError`` for what it cannot honour.
        tensors: by our dotted path every parameter as the files have it, in the model's order.
        blocks: path of the list of blocks; a projection's kernel is ``blocks.layer.target.kernel``.
        embedding: path of the token embedding, whose dtype is the model's and which is never quantised.
        tied_head: name of the output head in files that have it although it is tied; ``None`` where a
            head is never tied.
        optional_prefix: of names in the files, absent from exports of the model without its head.
        redundant: what is wrong with a stored tensor that is no parameter, nothing where it is known to
            be redundant (a causal mask, say).
        axes: logical axes of every parameter.
        build: ``(config, dtype, seed)`` gives the ``flax.nnx`` model with random parameters.
        presets: shapes for experiments with random weights.
        launches: for :mod:`flora_jax.plan`.
        positions: the configuration's field that says how long a sequence may be.
        limit: why a model has no more positions than it has, where that is not plain; else "".
    """

    title: str
    config: Callable[[Mapping[str, Any], str], ModelConfig]
    tensors: Callable[[Any], dict[str, Tensor]]
    blocks: str
    embedding: str
    tied_head: str | None
    optional_prefix: str
    redundant: Callable[[Stored, Any], Iterator[str]]
    axes: Rules
    build: Callable[[Any, Any, int], LanguageModel]
    presets: Mapping[str, ModelConfig]
    launches: Launches
    positions: str = "max_position_embeddings"
    limit: Callable[[Any], str] = lambda config: ""

    def is_kernel(self, path: str) -> bool:
        """Whether a parameter of this dotted path is a projection's kernel: these are quantised."""
        return path.endswith(".kernel")

    def splits_outputs(self, kernel: str) -> bool:
        """Whether tensor parallelism cuts the kernel of this path by its outputs, not its inputs."""
        return MESH_AXES[logical_axes(kernel, 2, self.axes)[1]] is not None


def builder(module: str, name: str) -> Callable[[Any, Any, int], LanguageModel]:
    """:attr:`Family.build` by the model's class; its module is imported when a model is built."""

    def build(config: Any, dtype: Any, seed: int) -> LanguageModel:
        from flax import nnx

        model: LanguageModel = getattr(importlib.import_module(module), name)(
            config, dtype=dtype, rngs=nnx.Rngs(seed)
        )
        return model

    return build


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return _load(FAMILIES[config.model_type])


def read_family_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration of config.json's object, by its ``model_type``.

    Raises:
        InputError: a family that is not known, or what its own reader refuses; starts with ``where``.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type is {model_type!r}, expected "
            f"{' or '.join(map(repr, sorted(FAMILIES)))}"
        )
    return _load(FAMILIES[model_type]).config(raw, where)


def presets() -> dict[str, ModelConfig]:
    """The presets of all families by name."""
    modules = dict.fromkeys(FAMILIES.values())
    return {name: config for at in modules for name, config in _load(at).presets.items()}


Config = TypeVar("Config", bound=ModelConfig)


def changed(config: Config, **fields: Any) -> Config:
    """The configuration with other values of some fields, checked as at first."""
    return cast(Config, dataclasses.replace(cast(Any, config), **fields))


def with_positions(config: Config, positions: int) -> Config:
    """The configuration of a model with random weights for longer sequences."""
    return changed(config, **{family_of(config).positions: positions})


def positions_in_words(config: ModelConfig) -> str:
    """How long a sequence may be, for messages, and why no longer where that is not plain."""
    why = family_of(config).limit(config)
    return f"{config.n_positions} positions" + (f" ({why})" if why else "")


def parameters(config: ModelConfig) -> int:
    """How many numbers all parameters have."""
    return sum(math.prod(t.shape) for t in family_of(config).tensors(config).values())


def check_parts(config: ModelConfig, size: int, units: Callable[[str, int], int]) -> None:
    """Whether tensor parallelism can cut the model's blocks into ``size`` parts.

    Args:
        config: the model's.
        size: number of devices.
        units: ``(path, inputs)`` of a kernel gives the groups of inputs that stay together.

    Raises:
        InputError: it cannot; names the heads or the tensor. One key and value for all heads is not cut.
    """
    family, groups = family_of(config), config.kv_heads
    given = f"tensor_parallel_size is {size}, expected a number that divides"
    if config.n_head % size:
        raise InputError(f"{given} the model's {config.n_head} heads")
    if groups > 1 and groups % size:
        raise InputError(f"{given} the model's {groups} heads of keys and values")
    for path, tensor in family.tensors(config).items():
        if not family.is_kernel(path):
            continue
        inputs, outputs = tensor.shape[::-1] if tensor.by_outputs else tensor.shape
        count, what = outputs, "outputs"
        if not family.splits_outputs(path):
            count = units(path, inputs)
            what = "inputs" if count == inputs else "groups of inputs"
        if count % size:
            raise InputError(f"{given} the {count} {what} of {path}")


def _load(module: str) -> Family:
    family: Family = importlib.import_module(module).FAMILY
    return family
