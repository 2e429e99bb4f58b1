"""The engine's own arrays and verbs over random weights, for stages that time one verb.

Bank, weights and cache are random numbers made on the device; lists of pairs, shapes and programs are the
engine's own (:class:`flora_jax.serve.device.Device`). What it does not have is a scheduler: sequences
stand in their rows, with their pages, from the start.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from experiments.gpu.items import Skip
from flora_jax.bench.receipts.random_arrays import fill, random_model
from flora_jax.mixing.bank import RESERVED, Count, Slots
from flora_jax.mixing.ragged import IDENTITY, NOTHING, TargetBank
from flora_jax.models.family import ModelConfig
from flora_jax.models.model import Model
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.platforms import Platform, platform
from flora_jax.serve.ahead import in_words, programs
from flora_jax.serve.device import Device
from flora_jax.serve.lattice import Lattice
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.placement import Placement
from flora_jax.serve.request import Request, SamplingParams
from flora_jax.serve.residency import Residency
from flora_jax.serve.sequence import Sequence as Scheduled
from flora_jax.serve.stream import Stream

TARGET = "attn.c_attn"
# What the package chooses for the platform.
AUTO = "auto"


def choices(rehearse: bool) -> Platform:
    """The package's for this platform; a rehearsal has a GPU's, to run the programs that one would."""
    return platform("gpu") if rehearse else platform()


def load(preset: str, layers: int, positions: int, rehearse: bool) -> Model:
    """A random model of a preset's shape with so many layers (0: its own) and positions, in float16; in
    a rehearsal in float32, as a CPU computes 16 bits slower.
    """
    config = PRESETS[preset]
    config = dataclasses.replace(
        config, n_layer=layers or config.n_layer, n_positions=max(positions, 512)
    )
    model = random_model(config, "float32" if rehearse else "float16")
    jax.block_until_ready(model.params)
    return model


def kind_and_rank(text: str) -> tuple[str, int]:
    """``flora8`` is FLoRA of rank 8, ``none`` the base alone, of rank 0."""
    kind, rank = re.fullmatch(r"([a-z]+)(\d*)", text).groups()  # type: ignore[union-attr]
    return kind, int(rank or 0)


def variant(how: str, rehearse: bool) -> Platform:
    """The platform's choices with another attention over the cache, another way of stepping, or both.

    ``auto`` is the package's own attention, ``loop``, ``gather`` or ``cudnn`` another for steps and
    prompts; with ``+looped`` a dispatch's steps are a loop on the device, with ``+split`` programs of
    their own.

    Raises:
        Skip: the platform cannot have it.
    """
    own = choices(rehearse)
    attention, _, stepping = how.partition("+")
    if attention == "cudnn" and platform().prompt_attention != "cudnn":
        raise Skip("a CPU has no cuDNN" if rehearse else "no cuDNN on this platform")
    if attention != AUTO:
        own = dataclasses.replace(own, decode_attention=attention, prompt_attention=attention)
    if stepping:
        on_device = {"looped": True, "split": False}[stepping]
        own = dataclasses.replace(own, steps_on_device=on_device)
    return own


class RandomResidency(Residency):
    """``count`` adapters of one kind and rank on c_attn, named 0, 1, …, all resident, none read."""

    def __init__(
        self, config: ModelConfig, kind: str, rank: int, count: int, additive: Any = "float32"
    ):
        sizes = {"none": Count(0, 0, 0), "flora": Count(rank, 0, 0), "lora": Count(1, rank, 0)}
        self.own = sizes[kind]
        room, most = {}, {}
        if kind != "none":
            most = {TARGET: self.own}
            room = {TARGET: Count(*(n + count * m for n, m in zip(RESERVED, self.own)))}
        super().__init__(config, room, most, additive=additive, placement=Placement(allocate=False))
        # The sum over a row's components has about the size of one.
        mean = self.own.multiplicative**-0.5 if kind == "flora" else 0.0
        self.layers = _with_reserved(fill(self.layers, 7, mean=mean, scale=0.02))

    def of(self, version: Any, target: str) -> Slots:
        mul, add, _ = self.own
        if version is None:
            return Slots()
        if add:
            return Slots(additive=tuple(range(1 + version * add, 1 + (version + 1) * add)))
        return Slots(tuple(range(2 + version * mul, 2 + (version + 1) * mul)))


@jax.jit
def _with_reserved(layers: Any) -> Any:
    """The bank with its first slots as an empty one has them: nothing, and the identity."""

    def put(bank: TargetBank) -> TargetBank:
        bank = jax.tree.map(lambda leaf: leaf.at[NOTHING].set(0), bank)
        pre_CI, post_CO = bank.pre_CI.at[IDENTITY].set(1), bank.post_CO.at[IDENTITY].set(1)
        return dataclasses.replace(bank, pre_CI=pre_CI, post_CO=post_CO)

    return tuple({target: put(bank) for target, bank in layer.items()} for layer in layers)


class Rig(Device):
    """The engine's device side with random contents, for adapters of one kind and rank."""

    def __init__(self, model: Model, text: str, options: EngineOptions, own: Platform):
        kind, rank = kind_and_rank(text)
        context = options.max_model_len
        assert context is not None
        additive = own.additive(jax.tree.leaves(model.params["wte"])[0].dtype)
        residency = RandomResidency(model.config, kind, rank, options.max_num_seqs, additive)
        groups = [residency.targets] if residency.targets else []
        lattice = Lattice(residency, options, context, own, groups)
        super().__init__(model, residency, lattice, options, own)
        self.cache = fill(self.cache, 11)

    def sequences(self, position: int, prompt: int | None = None) -> list[Scheduled]:
        """One in every row, each under its own adapter: about to decode at ``position``, or, with
        ``prompt`` tokens, to be prefilled.
        """
        adapted = bool(self.residency.targets)
        width, context = self.lattice.width, self.options.max_model_len
        assert context is not None
        rng = np.random.default_rng(0)
        found = []
        for row in range(self.rows):
            tokens = rng.integers(1, self.config.vocab_size, prompt or 1)
            params = SamplingParams(max_tokens=context, ignore_eos=True)
            request = Request(tokens.tolist(), params, request_id=row, fold_in=row)
            own: Any = row if adapted else None
            stream = Stream(request, (), context)
            sequence = Scheduled(row, row, prompt or position, context, request, own, stream)
            sequence.row, sequence.blocks = row, list(range(row * width, (row + 1) * width))
            if prompt is None:
                sequence.stage, sequence.drawn, sequence.prefilled = "decode", 1, position
            found.append(sequence)
        if prompt is None:
            self.insert(found, [1 + row for row in range(self.rows)])
        return found

    def decoding(self, span: int) -> str:
        """What the program of all rows at so many positions is called."""
        versions = [sequence.version for sequence in self.sequences(1)]
        return in_words(self.lattice.decode(versions, span)[0])

    def lowered(self, *names: str) -> list[Any]:
        """The engine's programs whose names have one of these in them, traced; another thread may compile
        them, and what runs afterwards finds that.
        """
        wanted = [p for p in programs(self) if any(name in p.name for name in names)]
        return [program.call().lower() for program in wanted if program.call is not None]

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        jax.block_until_ready((self.cache, self.state_rows))
