"""Distilling what a model predicts under one adapter into another adapter's factors.

Teacher and student are adapters of any kinds on one frozen base. Knows nothing of files, nor of how the
student was started.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.adapters.registry import TRAITS
from flora_jax.mixing.grouped import grouped_hooks
from flora_jax.models.model import Model
from flora_jax.terminal import progress
from flora_jax.train.data.packing import Batch, PackedTokens
from flora_jax.train.evaluation import Evaluator
from flora_jax.train.loop import LoopOptions, Work, run_loop
from flora_jax.train.loss import frozen_head_divergence
from flora_jax.train.step import (
    GroupedBatch,
    Scores,
    StepOptions,
    TrainState,
    group,
    hidden_of,
    init_adapter_state,
    make_optimizer,
    make_schedule,
    make_scorer,
    make_step,
    per_adapter,
)

Module = tuple[int, str]


@dataclasses.dataclass(frozen=True)
class DistilOptions:
    """How long, how fast and on how much text at once.

    Args:
        steps: of AdamW, the rate falling to 0 as a cosine.
        learning_rate: the peak; ``None`` is the kind's own (:attr:`.Traits.learning_rate`).
        rows: of a step.
        length: tokens of a row.
        seed: of the order of the rows.
    """

    steps: int = 200
    learning_rate: float | None = None
    rows: int = 8
    length: int = 512
    seed: int = 0

    def rate(self, kind: str) -> float:
        """The peak for a student of a kind."""
        own = self.learning_rate
        return TRAITS[kind].learning_rate if own is None else own


class Frozen(NamedTuple):
    """What a step does not change: the model's parameters, the teacher's layers, and the student's own
    that are not trained. Layers have a leading axis of one on every leaf.
    """

    base: Any
    teacher: Any
    held: Any


def make_divergence(graph: nnx.GraphDef, options: StepOptions) -> Callable[..., jax.Array]:
    """``(layers, frozen, batch) → KL(teacher ‖ student)`` in nats, summed over the targets: ``[1]``."""

    def divergence(layers: Any, frozen: Frozen, part: GroupedBatch) -> jax.Array:
        model = nnx.merge(graph, frozen.base)
        student = [{**held, **own} for held, own in zip(frozen.held, layers, strict=True)]
        # Only the student's pass is gone back through.
        wanted_BTD, _ = hidden_of(
            model, part, grouped_hooks(frozen.teacher, rounded=options.rounded), options
        )
        own_BTD, _ = hidden_of(
            model, part, grouped_hooks(student, rounded=options.rounded), options
        )
        found_BT = frozen_head_divergence(
            own_BTD, jax.lax.stop_gradient(wanted_BTD), model.head(), options.head
        )
        return per_adapter(found_BT, part.mask)

    return divergence


def _stacked(layers: Any) -> Any:
    """In float32 arrays of their own, which a step may donate, with a leading axis of one."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32)[None], list(layers))


def distil(
    model: Model,
    teacher: ModelAdapter,
    student: ModelAdapter,
    text: PackedTokens,
    options: DistilOptions,
    program: StepOptions | None = None,
    held: frozenset[Module] = frozenset(),
) -> ModelAdapter:
    """``student`` after some steps towards the teacher's predictions of ``text``.

    Args:
        model: the base of both.
        teacher: stays as it is.
        student: where to start.
        text: read window by window, epoch after epoch.
        options: see there.
        program: what a step is compiled for.
        held: layers and targets of the student that are not trained.

    Raises:
        NonFiniteLossError: the loss or the gradient became NaN or infinite.
    """
    program = program or StepOptions()
    trained: list[dict[str, Any]] = [{} for _ in student.layers]
    fixed: list[dict[str, Any]] = [{} for _ in student.layers]
    for number, layer in enumerate(student.layers):
        for target, params in layer.items():
            part = fixed if (number, target) in held else trained
            part[number][target] = params
    frozen = Frozen(model.params, _stacked(teacher.layers), _stacked(fixed))
    schedule = make_schedule(
        "cosine", options.rate(student.kind), options.steps, min(100, options.steps // 10)
    )
    optimizer = make_optimizer(schedule)
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(_stacked(trained), optimizer)
    divergence = make_divergence(model.graph, program)
    step = make_step(
        lambda layers, frozen, part, keys_N: divergence(layers, frozen, part), optimizer, schedule
    )
    # Nothing is drawn in a step.
    unused_N = jax.random.split(jax.random.key(0), 1)

    def train_step(state: TrainState, batch: GroupedBatch) -> tuple[TrainState, Any]:
        return step(state, frozen, batch, unused_N)

    def batch_at(number: int) -> GroupedBatch:
        return _placed(text.batch(number, options.rows, options.length, options.seed))

    work = Work(
        train_step, batch_at, tokens_per_batch=options.rows * options.length,
        describe=lambda measured: {name: value.item() for name, value in measured.items()},
    )  # fmt: skip
    # Short enough to be begun anew: no directory, so that nothing of the run is kept. Every step is
    # shown, as there are few.
    state = run_loop(state, work, None, LoopOptions(options.steps, log_every=1))
    layers = tuple(
        {
            target: jax.tree.map(lambda leaf: leaf[0], {**held_layer, **own}[target])
            for target in whole
        }
        for whole, held_layer, own in zip(student.layers, frozen.held, state.params, strict=True)
    )
    return dataclasses.replace(student, layers=layers)


def _placed(batch: Batch) -> GroupedBatch:
    return jax.tree.map(jnp.asarray, group([batch]))


class Quality(NamedTuple):
    """What an adapter predicts of held-out text beside the one it was made of.

    ``divergence`` is ``KL(source ‖ made)`` in nats a token; the others are bits per byte of the text
    under no adapter, under the source and under what was made of it; ``tokens`` are those predicted.
    """

    divergence: float
    base: float
    source: float
    made: float
    tokens: int

    @property
    def kept(self) -> float | None:
        """The share of the source's gain over the base that is left; ``None`` where it gains nothing."""
        gain = self.base - self.source
        return (self.base - self.made) / gain if gain > 0 else None


@dataclasses.dataclass(frozen=True)
class Judge:
    """Measures adapters on one held-out text, beside the adapter ``source`` and the base.

    ``most`` bounds the windows that are looked at; ``piece_bytes [V]`` are the bytes of text that a
    token stands for.
    """

    model: Model
    source: ModelAdapter
    text: PackedTokens
    piece_bytes: np.ndarray
    options: DistilOptions
    most: int | None = None
    program: StepOptions = dataclasses.field(default_factory=StepOptions)

    def bits(self, adapter: ModelAdapter | None) -> dict[str, float]:
        """The measures of :class:`.evaluation.Evaluator`; ``None`` is the base alone."""
        return self._measured(self._scorer, self.model.params, adapter)

    def divergence(self, adapter: ModelAdapter) -> float:
        """``KL(source ‖ adapter)`` in nats a token."""
        none: list[dict[str, Any]] = [{} for _ in adapter.layers]
        frozen = Frozen(self.model.params, _stacked(self.source.layers), none)
        return self._measured(self._divergence, frozen, adapter)["loss"]

    def __call__(self, adapter: ModelAdapter) -> Quality:
        """How well ``adapter`` does what the source does."""
        base, source = self._others
        made = self.bits(adapter)["bits_per_byte"]
        return Quality(
            self.divergence(adapter), base["bits_per_byte"], source["bits_per_byte"], made,
            int(base["tokens"]),
        )  # fmt: skip

    @functools.cached_property
    def _others(self) -> tuple[dict[str, float], dict[str, float]]:
        return self.bits(None), self.bits(self.source)

    @functools.cached_property
    def _scorer(self) -> Callable[..., Scores]:
        return make_scorer(self.model.graph, self.program)

    @functools.cached_property
    def _divergence(self) -> Callable[..., Scores]:
        divergence = make_divergence(self.model.graph, self.program)

        @jax.jit
        def scorer(layers: Any, frozen: Frozen, batch: GroupedBatch) -> Scores:
            found_N = divergence(layers, frozen, batch)
            return Scores(found_N, jnp.zeros_like(found_N), jnp.sum(batch.mask, axis=(0, 2)))

        return scorer

    def _measured(
        self, scorer: Callable[..., Scores], frozen: Any, adapter: ModelAdapter | None
    ) -> dict[str, float]:
        length, rows = self.options.length, self.options.rows
        windows = self.text.windows(length)
        batches = -(-min(windows, self.most or windows) // rows)
        with progress("held-out batch", batches) as bar:
            evaluate = Evaluator(
                scorer, frozen, {"text": self.text}, ("text",), length, rows, self.most,
                self.piece_bytes, lambda batch: jax.tree.map(jnp.asarray, batch), bar.advance,
            )  # fmt: skip
            return evaluate(None if adapter is None else _stacked(adapter.layers))["text"]
