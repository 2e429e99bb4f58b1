"""How all of a model's weights are trained: the loss, the schedule, the optimizer and the jitted step.

`experiments/pretrain_mini.py` trains with it. Knows nothing of files, clocks or models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flora_jax.train.step import TrainState

LossFunction = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def next_token_loss(
    logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The sum of the masked negative log-likelihoods in nats, and the number of tokens in it.

    ``logits [B, T, V]`` are taken to float32; ``mask [B, T]`` is 1 where a target counts.
    """
    with jax.numpy_dtype_promotion("standard"):
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(
            logits_BTV.astype(jnp.float32), targets_BT
        )
    if mask_BT is None:
        return jnp.sum(nll_BT), jnp.float32(nll_BT.size)
    mask_BT = mask_BT.astype(jnp.float32)
    return jnp.sum(nll_BT * mask_BT), jnp.sum(mask_BT)


WARMUP = 100


def rate_at(step: int, peak: float, steps: int | None, decay: int) -> float:
    """The learning rate of ``step``: up to ``peak`` over the first hundred, constant, down to a tenth.

    It falls over the last ``decay`` of ``steps``; before them it does not depend on ``steps``, so a run
    may be shortened or extended. ``None``: the end is not known yet.
    """
    rate = peak * min(1.0, step / WARMUP)
    if steps is not None and (into := step - (steps - decay)) > 0:
        rate *= 1.0 - 0.9 * min(1.0, into / decay)
    return rate


def adamw(*, weight_decay: float = 0.1, clip: float = 1.0) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95) behind a clip by global norm; vectors (biases, norms) do not decay.

    Its rate is 1: :func:`make_step` multiplies.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            1.0,
            b1=0.9,
            b2=0.95,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def muon(*, weight_decay: float = 0.1, clip: float = 1.0) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, Adam (0.9, 0.95) for embeddings and vectors, behind a clip.

    Updates of matrices are as large as Adam's (root mean square 0.2), so that both have one rate, which
    is 1 here.
    """

    def labels(params: Any) -> Any:
        def label(path: Any, leaf: Any) -> str:
            return "matrix" if leaf.ndim == 2 and "embedding" not in str(path) else "other"

        return jax.tree_util.tree_map_with_path(label, params)

    matrices = optax.contrib.muon(1.0, weight_decay=weight_decay, consistent_rms=0.2)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.partition({"matrix": matrices, "other": optax.adam(1.0, 0.9, 0.95)}, labels),
    )


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; takes ownership of ``params``, which a step donates."""
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def make_step(
    loss_function: LossFunction, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted ``(state, (rate, batch)) → (state, metrics)``; the given state is donated.

    ``loss_function(params, batch)`` returns a sum and its count. The learning rate, a float32 scalar, is
    an argument, so that it may be decided while the run goes on; the optimizer's own is 1. Metrics are
    float32 scalars: ``loss`` (nats per token), ``grad_norm`` (before clipping).
    """

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        total, count = loss_function(params, batch)
        return total / jnp.maximum(count, 1.0)

    def step(
        state: TrainState, given: tuple[jax.Array, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rate, batch = given
        loss, grads = jax.value_and_grad(mean_loss)(state.params, batch)
        # optax mixes weakly typed scalars with arrays, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates = jax.tree.map(lambda update: rate * update, updates)
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(grads)
        new = TrainState(params, opt_state, state.step + 1)
        return new, {"loss": loss, "grad_norm": norm}

    return jax.jit(step, donate_argnums=0)
