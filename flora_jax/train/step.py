"""The jitted step that trains adapters over a frozen base: N of them at once, each on its own rows.

Everything but the forward pass runs per adapter under ``vmap``: its loss, the clip of its gradient,
its optimizer state. Training N adapters is therefore the same as training each alone on its own
rows. Knows nothing of files, clocks or names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flora_jax.adapters.kind import is_factors, kind_of
from flora_jax.mixing.grouped import grouped_hooks
from flora_jax.models.model import LanguageModel, Remat
from flora_jax.train.data.packing import Batch
from flora_jax.train.loss import HeadChunks, frozen_head_nll, token_scores
from flora_jax.weights.product import rounding_others


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """``params`` is any pytree; ``step`` (int32 scalar) counts the updates already applied."""

    params: Any
    opt_state: optax.OptState
    step: jax.Array


class GroupedBatch(NamedTuple):
    """Rows ``b`` of each of ``N`` adapters: ``tokens [b, N, T + 1]``, the others ``[b, N, T]``.

    Integers are int32, ``mask`` is float32; see :class:`flora_jax.train.data.packing.Batch`.
    """

    tokens: Any
    positions: Any
    segments: Any
    mask: Any


def group(batches: Sequence[Batch]) -> GroupedBatch:
    """One batch of each adapter, of equally many rows, side by side; still in NumPy."""
    return GroupedBatch(*(np.stack(parts, axis=1) for parts in zip(*batches, strict=True)))


def make_schedule(
    shape: Literal["cosine", "linear", "constant"], peak: float, steps: int, warmup: int
) -> optax.Schedule:
    """The learning rate: linear from 0 over ``warmup`` steps, then to 0 at the last, or constant.

    Without a warm-up the first step has the peak already.
    """
    # A warm-up that fills the run leaves no step to the decay, but optax wants one.
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[shape]
    # Joined here, because optax's own warm-ups stay at 0 for ever where the warm-up has no steps.
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    schedule: optax.Schedule, *, clip: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999) behind a clip by the norm of one adapter's gradient."""
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=weight_decay)
    )


def make_optimizer_of_peak(
    schedule_of: Callable[[Any], optax.Schedule], *, clip: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """:func:`make_optimizer` of ``schedule_of(peak)``, where each adapter's state has its own peak.

    :func:`init_adapter_state` puts it there.
    """

    def at(peak: Any) -> optax.GradientTransformation:
        return make_optimizer(schedule_of(peak), clip=clip, weight_decay=weight_decay)

    return optax.inject_hyperparams(at)(peak=0.0)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step's program is made for.

    Args:
        accumulate: splits every adapter's rows into so many parts, run one after another.
        remat: what of a block is computed anew in the backward pass.
        dropout: of the inputs of the adapters' own part, where their kind has one.
        attention: a name of :data:`flora_jax.models.attention.IMPLEMENTATIONS`.
        rounded: projections give the activations' dtype at once, where their kind allows it.
        head: the chunks of the loss.
    """

    accumulate: int = 1
    remat: Remat = "none"
    dropout: float = 0.0
    attention: str = "einsum"
    rounded: bool = False
    head: HeadChunks = dataclasses.field(default_factory=HeadChunks)


def hidden_of(
    model: LanguageModel, batch: GroupedBatch, hooks: Any, options: StepOptions
) -> tuple[jax.Array, jax.Array]:
    """Activations ``[b·N, T, D]`` and targets ``[b·N, T]``."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), batch)
    if options.rounded:
        layers = hooks or [{}] * model.config.n_layer
        hooks = rounding_others(layers, model.config.projections())
    hidden_BTD, _ = model.hidden(
        flat.tokens[:, :-1], flat.positions, segments_BT=flat.segments, adapters=hooks,
        remat=options.remat, attention=options.attention,
    )  # fmt: skip
    return hidden_BTD, flat.tokens[:, 1:]


def per_adapter(values_BT: jax.Array, mask_bNT: jax.Array) -> jax.Array:
    """The sums ``[N]`` of what there is of each of ``b·N`` rows' targets."""
    return jnp.sum(values_BT.reshape(mask_bNT.shape) * mask_bNT, axis=(0, 2))


# Of adapters' layers, what is frozen, a part of a batch and keys ``[N]``: the sum of the loss over each
# adapter's targets, ``[N]``.
Loss = Callable[[Any, Any, GroupedBatch, jax.Array], jax.Array]
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_adapter_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: StepOptions,
    place: jax.sharding.Sharding | None = None,
) -> Step:
    """The :func:`make_step` of next-token cross-entropy; what is frozen are the model's parameters.

    ``keys [N]`` seed each adapter's dropout, folded with the step; the loss is in nats per token.
    """

    def loss(layers: Any, base: Any, part: GroupedBatch, keys_N: jax.Array) -> jax.Array:
        model = nnx.merge(graph, base)
        hooks = grouped_hooks(layers, keys_N, options.dropout, rounded=options.rounded)
        hidden_BTD, targets_BT = hidden_of(model, part, hooks, options)
        nll_BT = frozen_head_nll(hidden_BTD, model.head(), targets_BT, options.head)
        return per_adapter(nll_BT, part.mask)

    return make_step(loss, optimizer, schedule, options.accumulate, place)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    parts: int = 1,
    place: jax.sharding.Sharding | None = None,
) -> Step:
    """A jitted ``(state, frozen, batch, keys_N) → (state, metrics)``; only the state is donated.

    ``state.params`` are an adapter's layers with a leading axis ``N`` on every leaf; ``frozen`` is any
    pytree, which gets no gradient and is not copied. Metrics are float32: ``loss [N]`` per token,
    ``grad_norm [N]`` before clipping, and ``learning_rate``, what ``schedule`` gives. ``parts``: every
    adapter's rows are split into so many, run one after another. ``place`` is where the results are, the
    state's own place: elsewhere, the next step would be compiled anew for it.

    Raises:
        ValueError: an adapter's rows are no multiple of ``parts``.
    """

    def part_loss(
        layers: Any, frozen: Any, part: GroupedBatch, keys_N: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        sum_N = loss(layers, frozen, part, keys_N)
        # No adapter's rows touch another's factors, so the sum's gradient is each one's own.
        return jnp.sum(sum_N), sum_N

    gradient = jax.value_and_grad(part_loss, has_aux=True)

    def step(
        state: TrainState, frozen: Any, batch: GroupedBatch, keys_N: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if batch.tokens.shape[0] % parts:
            raise ValueError(
                f"{batch.tokens.shape[0]} rows an adapter cannot be split into {parts} equal parts"
            )
        count_N = jnp.maximum(jnp.sum(batch.mask, axis=(0, 2)), 1.0)
        keys_N = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(keys_N)

        def one_part(number: jax.Array, part: GroupedBatch) -> tuple[jax.Array, Any]:
            own_N = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_N)
            (_, sum_N), grads = gradient(state.params, frozen, part, own_N)
            return sum_N, grads

        if parts == 1:
            sums = one_part(jnp.int32(0), batch)
        else:
            # Every parts-th row makes a part, so that each device keeps its share of every part.
            cut = jax.tree.map(
                lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), batch
            )
            start = jnp.zeros_like(count_N), jax.tree.map(jnp.zeros_like, state.params)

            def add(total: Any, numbered: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, one_part(*numbered)), None

            sums, _ = jax.lax.scan(add, start, (jnp.arange(parts), cut))
        # Divided only now: in 16 bits the slopes of a mean over many tokens would lose digits.
        loss_N, grads = jax.tree.map(lambda leaf: _divide(leaf, count_N), sums)
        # optax mixes weakly typed scalars with arrays, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            norm_N = jax.vmap(optax.tree.norm)(grads)
            updates, opt_state = jax.vmap(optimizer.update)(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, _hold_frozen(updates))
            rate = jnp.asarray(schedule(state.step), jnp.float32)
        new = TrainState(params, opt_state, state.step + 1)
        return new, {"loss": loss_N, "grad_norm": norm_N, "learning_rate": rate}

    return jax.jit(step, donate_argnums=0, out_shardings=place)


def init_adapter_state(
    layers: Any,
    optimizer: optax.GradientTransformation,
    peaks_N: jax.Array | None = None,
) -> TrainState:
    """The state before the first update; ``layers`` have a leading axis ``N`` on every leaf.

    The optimizer sees one adapter at a time; one of :func:`make_optimizer_of_peak` needs ``peaks [N]``,
    float32. Takes ownership of ``layers`` and ``peaks``, which a step donates.
    """
    opt_state = jax.vmap(optimizer.init)(layers)
    if peaks_N is not None:
        opt_state = opt_state._replace(hyperparams={"peak": peaks_N})
    return TrainState(layers, opt_state, jnp.int32(0))


def _divide(leaf: jax.Array, count_N: jax.Array) -> jax.Array:
    return leaf / count_N.reshape(-1, *(1,) * (leaf.ndim - 1))


def _hold_frozen(updates: Any) -> Any:
    """No update, not even weight decay's, for what a kind does not train."""
    return jax.tree.map(lambda own: kind_of(own).freeze(own), updates, is_leaf=is_factors)


class Scores(NamedTuple):
    """Sums over an adapter's targets, float32 ``[N]``: nats, right first guesses, targets."""

    nll: jax.Array
    hits: jax.Array
    targets: jax.Array


def make_scorer(
    graph: nnx.GraphDef, options: StepOptions | None = None, place: Any = None
) -> Callable[[Any, Any, GroupedBatch], Scores]:
    """A jitted ``(layers, base, batch) → Scores`` without dropout.

    ``layers`` as in :func:`make_adapter_step`; ``None`` scores the base alone, as one group of rows
    for each of the batch's. Of ``options`` the attention, the rounding and the head's chunks count;
    ``place`` is the sharding of the result.
    """
    options = dataclasses.replace(options or StepOptions(), remat="none")

    def score(layers: Sequence[Mapping[str, Any]] | None, base: Any, batch: GroupedBatch) -> Scores:
        model = nnx.merge(graph, base)
        hooks = None if layers is None else grouped_hooks(layers, rounded=options.rounded)
        hidden_BTD, targets_BT = hidden_of(model, batch, hooks, options)
        nll_BT, hit_BT = token_scores(hidden_BTD, model.head(), targets_BT, options.head)
        return Scores(
            per_adapter(nll_BT, batch.mask),
            per_adapter(hit_BT, batch.mask),
            jnp.sum(batch.mask, axis=(0, 2)),
        )

    return jax.jit(score, out_shardings=place)
