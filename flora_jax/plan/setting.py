"""What is planned: a model on a card, its engine's sizes and its adapters; checked, nothing computed.

Knows nothing of arrays: importing it brings no JAX in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flora_jax.adapters.projections import match_targets
from flora_jax.adapters.registry import TRAITS
from flora_jax.errors import InputError
from flora_jax.models.family import Family, ModelConfig, check_parts, family_of, positions_in_words
from flora_jax.plan.cards import Card
from flora_jax.platforms import GPU

KINDS = ("none", *TRAITS)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
METHODS = ("none", "int8", "int4")
# Slots that every bank begins with: multiplicative, additive, bias.
RESERVED = (2, 1, 1)
Count = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, a card and an engine.

    Args:
        name: the model's, for people.
        config: the model's.
        card: one of them.
        devices: how many of it, tensor-parallel.
        dtype: of weights, activations and cache.
        quantize: "none", "int8" or "int4".
        kind: of all adapters; "none" is the base alone.
        rank: of all adapters; 0 for "none".
        targets: full names of the projections that they are on; PEFT's for LoRA where it is ``None``.
        max_num_seqs: sequences that run at once.
        max_model_len: prompt and output together; the model's positions where it is ``None``.
        resident_adapters: on the device; ``max_num_seqs`` where it is ``None``.
        block_size: positions of a block of the cache.

    Raises:
        InputError: a value that no engine can have.
    """

    name: str
    config: ModelConfig
    card: Card
    devices: int = 1
    dtype: str = "float16"
    quantize: str = "none"
    kind: str = "none"
    rank: int = 0
    targets: tuple[str, ...] | None = None
    max_num_seqs: int = 16
    max_model_len: int | None = None
    resident_adapters: int | None = None
    block_size: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise InputError(f"--dtype is {self.dtype!r}, expected {', '.join(ITEMSIZE)}")
        if self.quantize not in METHODS:
            raise InputError(f"--quantize is {self.quantize!r}, expected int8, int4 or none")
        if self.kind not in KINDS:
            raise InputError(f"--kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.kind == "none":
            expected = None if self.rank == 0 else "0"
        else:
            expected = TRAITS[self.kind].rank_problem(self.rank)
        if expected is not None:
            raise InputError(f"--rank is {self.rank}, expected {expected} with --kind {self.kind}")
        for option, value in (
            ("max-num-seqs", self.max_num_seqs), ("max-model-len", self.max_model_len),
            ("resident-adapters", self.resident_adapters), ("devices", self.devices),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise InputError(f"--{option} is {value}, expected at least 1")
        if self.kind == "none" and self.resident_adapters is not None:
            raise InputError(
                f"--resident-adapters is {self.resident_adapters}, expected none with --kind none"
            )
        if self.context > self.config.n_positions:
            raise InputError(
                f"--max-model-len is {self.context}, {self.name} has "
                f"{positions_in_words(self.config)}"
            )
        check_parts(self.config, self.devices, self._input_units)
        if self.quantize == "int4":
            for target, (inputs, _) in self.config.projections().items():
                if not int4_group(inputs):
                    raise InputError(
                        f"--quantize is int4, and {target} of {self.name} has {inputs} input "
                        "features, which no even group of 8 to 64 divides"
                    )

    def _input_units(self, path: str, inputs: int) -> int:
        group = int4_group(inputs) if self.quantize == "int4" else 0
        return inputs // (group or 1)

    @property
    def context(self) -> int:
        """Positions of the longest sequence."""
        return self.max_model_len or self.config.n_positions

    @property
    def itemsize(self) -> int:
        """Bytes of an activation, a weight that is not quantised, and a cached number."""
        return ITEMSIZE[self.dtype]

    @property
    def additive_itemsize(self) -> int:
        """Bytes of a number of an additive vector in the bank."""
        return 4 if GPU.additive_dtype == "float32" else self.itemsize

    @property
    def adapted(self) -> tuple[str, ...]:
        """The projections that have room for adapters."""
        if self.kind == "none":
            return ()
        if self.targets is not None:
            return self.targets
        projections = self.config.projections()
        return match_targets(projections.names.default_targets("lora"), projections)

    @property
    def family(self) -> Family:
        """The model's."""
        return family_of(self.config)

    @property
    def split_kv_heads(self) -> int:
        """Heads of keys and values on one device; the one of multi-query models is on all."""
        return max(1, self.config.kv_heads // self.devices)

    @property
    def residents(self) -> int:
        """Adapters that the bank has room for."""
        if self.kind == "none":
            return 0
        return self.resident_adapters or self.max_num_seqs

    @property
    def prompt_attention(self) -> str:
        """The implementation for chunks of prompts: cuDNN takes 16 bits and heads of up to 128."""
        size = self.config.head_dim
        if GPU.prompt_attention == "cudnn" and (self.itemsize != 2 or size % 8 or size > 128):
            return "gather"
        return GPU.prompt_attention

    def count(self, target: str) -> Count:
        """Components of one adapter on a projection: multiplicative, additive, bias offsets."""
        if self.kind == "none":
            return (1, 0, 0)
        traits = TRAITS[self.kind]
        # Where a kind scales either, it is the inputs of that one.
        return *traits.pairs(self.rank), int(
            traits.scales_bias and target not in self._scaled_inputs
        )

    @property
    def _scaled_inputs(self) -> tuple[str, ...]:
        """The projections of which IA3 scales the inputs."""
        projections = self.config.projections()
        return match_targets(projections.names.feedforward, projections)

    def room(self) -> Mapping[str, Count]:
        """By projection the bank's numbers of components, those that it begins with included."""

        def whole(target: str) -> Count:
            multiplicative, additive, bias = (
                reserved + self.residents * own
                for reserved, own in zip(RESERVED, self.count(target), strict=True)
            )
            return multiplicative, additive, bias

        return {
            target: whole(target) for target in self.config.projections() if target in self.adapted
        }


def int4_group(inputs: int) -> int:
    """How many inputs share a scale in int4: the largest even number of 8 to 64 that divides them, 0
    where there is none.
    """
    return next((size for size in range(64, 7, -2) if inputs % size == 0), 0)
