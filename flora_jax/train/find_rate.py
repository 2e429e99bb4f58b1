"""The learning rate that suits a model, a kind and data: a short run at several rates, side by side.

Every rate has its own copy of every adapter, with the same start, the same rows in the same order and
the same dropout. All copies are trained in one step, and scored on the same held-out windows before and
after. Nothing is kept of them but how well they did. Knows nothing of files or the command line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flora_jax.errors import InputError
from flora_jax.terminal import progress
from flora_jax.train.options import TrainOptions, check_rates, rates_around
from flora_jax.train.run import prepare

# Rows of validation that are scored where the options do not say.
WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Trial:
    """One adapter at one rate: its loss in the first and the last step (nats a token), and its held-out
    bits per byte before and after. ``broken_at`` is the first step whose loss or gradient was not finite.
    """

    name: str
    rate: float
    first_loss: float
    last_loss: float
    bits_before: float
    bits_after: float
    broken_at: int | None = None

    @property
    def problem(self) -> str | None:
        """Why the rate is no good, in words; ``None`` where it is."""
        if self.broken_at is not None:
            return f"not finite in step {self.broken_at}"
        if not math.isfinite(self.bits_after):
            return "not finite after the last step"
        return "worse than at the start" if self.bits_after > self.bits_before else None


@dataclasses.dataclass(frozen=True)
class Search:
    """What :func:`find_rate` found: ``trials`` are in the order of the rising rates, at each rate in the
    order of the data.
    """

    options: TrainOptions
    trials: tuple[Trial, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """All that were tried, rising."""
        return tuple(dict.fromkeys(trial.rate for trial in self.trials))

    def best(self, name: str | None = None) -> float | None:
        """The rate with the fewest held-out bits per byte; of equal ones the smallest.

        Args:
            name: of an adapter; without one all count, by their mean.

        Returns:
            ``None`` where every rate had a problem with one of them.
        """
        means = {}
        for rate in self.rates:
            own = [t for t in self.trials if t.rate == rate and name in (None, t.name)]
            if not any(trial.problem for trial in own):
                means[rate] = math.fsum(trial.bits_after for trial in own) / len(own)
        return min(means, key=lambda rate: means[rate], default=None)

    def edge(self) -> str | None:
        """Whether :meth:`best` is the ``lowest`` or the ``highest`` rate that was tried, so that one
        beyond it may be better.
        """
        return {self.rates[0]: "lowest", self.rates[-1]: "highest"}.get(self.best() or math.nan)

    def to_json(self) -> dict[str, Any]:
        """All of it for JSON; a number may be NaN or infinite."""
        trials = [
            dataclasses.asdict(trial) | {"problem": trial.problem, "diverged": bool(trial.problem)}
            for trial in self.trials
        ]
        return {
            "options": json.loads(self.options.model_dump_json()),
            "rates": list(self.rates),
            "trials": trials,
            "best": {name: self.best(name) for name in self.options.data},
            "recommended": self.best(),
            "edge": self.edge(),
        }


def find_rate(
    options: TrainOptions,
    rates: Sequence[float] | None = None,
    *,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
) -> Search:
    """Tries learning rates for the run that ``options`` describe, in one compiled step.

    A step has ``len(rates)`` times the rows of the run's, and costs as much more time and memory.

    Args:
        options: of the run, with as many steps as the trial is to have. Every adapter needs validation;
            ``eval_windows`` of each are scored, 64 by default.
        rates: peaks to try; by default seven, :func:`rates_around` the options' own.
        cache: where tokenised data is kept between runs.
        say: takes notes for the user, a line each.

    Raises:
        InputError: anything in the options, the rates, the data or the model that does not fit, or
            there are several processes.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"{jax.process_count()} processes, expected one: rates are tried in one alone"
        )
    rates = rates_around(options.rate) if rates is None else check_rates(rates)
    for name in options.data:
        if name not in options.validation:
            raise InputError(
                f"validation of {name} is missing, expected NAME=PATH of held-out text, on which the "
                "rates are compared"
            )
    options = options.effective(jax.default_backend())
    options = options.model_copy(update={"eval_windows": options.eval_windows or WINDOWS})
    say(
        f"{len(rates)} rates x {len(options.data)} adapters x {options.rows} rows = "
        f"{len(rates) * len(options.data) * options.rows} rows a step, {options.steps} steps"
    )
    run = prepare(options, None, cache=cache, say=say).at_rates(rates)
    state, train_step = run.start()
    evaluate = run.evaluator().measure
    before = evaluate(state.params)
    losses, broken_at = [], np.zeros(len(run.training), int)

    def look(number: int, measured: dict[str, jax.Array]) -> None:
        losses.append(np.asarray(measured["loss"]))
        fine = np.isfinite(losses[-1]) & np.isfinite(np.asarray(measured["grad_norm"]))
        broken_at[~fine & (broken_at == 0)] = number + 1
        spread = losses[-1][fine]
        note = f"loss {spread.min():.3f} to {spread.max():.3f}" if spread.size else "none is finite"
        bar.show(number + 1, note=note)

    with progress("step", options.steps, keep=True) as bar:
        bar.show(0, note="compiling")
        late: dict[str, jax.Array] | None = None
        for number in range(options.steps):
            state, measured = train_step(state, run.batch_at(number))
            # Read once the device has the next step to do.
            if late is not None:
                look(number - 1, late)
            late = measured
        if late is not None:
            look(options.steps - 1, late)
    after = evaluate(state.params)
    trials = []
    for number, (rate, name) in enumerate(itertools.product(rates, options.data)):
        label = f"{name}@{rate}"
        trials.append(
            Trial(
                name, rate, float(losses[0][number]), float(losses[-1][number]),
                before[label]["bits_per_byte"], after[label]["bits_per_byte"],
                int(broken_at[number]) or None,
            )
        )  # fmt: skip
    return Search(options, tuple(trials))
