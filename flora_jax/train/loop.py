"""The training loop: progress, metrics, checkpoints, resumption. Knows nothing of what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flora_jax.files import whole_file
from flora_jax.train.step import TrainState


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message names the step it was seen at."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How long to run and what to keep.

    Times are in seconds, the rest counts steps. The last ``keep`` checkpoints stay on disk.
    """

    steps: int
    save_seconds: float = 300.0
    log_every: int = 10
    evaluate_every: int = 500
    keep: int = 2


def run_loop(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batch_at: Callable[[int], Any],
    directory: Path,
    options: LoopOptions,
    *,
    tokens_per_batch: int,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
) -> TrainState:
    """Trains to ``options.steps``, from the newest checkpoint in ``directory`` where there is one.

    ``batch_at(n)`` gives batch ``n``; ``evaluate(params)`` what is logged as ``"validation"``.
    ``directory/metrics.jsonl`` has a line for the first, every ``log_every``-th, every evaluated and
    the last step; lines past the checkpoint resumed from are cut away.

    Raises:
        NonFiniteLossError: at the first step logged or saved whose loss or gradient is not finite;
            it is neither logged nor saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metrics = directory / "metrics.jsonl"
    manager = ocp.CheckpointManager(
        (directory / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=options.keep),
    )
    newest = manager.latest_step()
    if newest is not None:
        state = manager.restore(newest, args=ocp.args.StandardRestore(state))
    _cut_metrics(metrics, int(state.step))

    progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=Console(stderr=True),
    )  # fmt: skip
    # Closing the manager waits for the checkpoint that is being written.
    with contextlib.closing(manager), progress, metrics.open("a") as log:
        task = progress.add_task("", total=options.steps, completed=int(state.step), note="")
        saved = logged = time.monotonic()
        since = 0
        previous = math.nan
        for number in range(int(state.step), options.steps):
            state, measured = train_step(state, batch_at(number))
            since += 1
            done = number + 1
            last = done == options.steps
            validate = evaluate is not None and (done % options.evaluate_every == 0 or last)
            save = last or time.monotonic() - saved > options.save_seconds
            report = done == 1 or done % options.log_every == 0 or validate or last
            if save or report:
                previous = _finite_loss(measured, done, previous)
            if report:
                now = time.monotonic()
                rate = since * tokens_per_batch / (now - logged)
                logged, since = now, 0
                line: dict[str, Any] = {"step": done, "tokens_per_second": round(rate, 1)}
                line |= {name: float(value) for name, value in measured.items()}
                if evaluate is not None and validate:
                    line["validation"] = evaluate(state.params)
                    logged = time.monotonic()
                log.write(json.dumps(line) + "\n")
                log.flush()
                note = f"loss {previous:.3f}  {rate:,.0f} tokens/s"
                progress.update(task, completed=done, note=note)
            if save:
                manager.save(done, args=ocp.args.StandardSave(state))
                saved = time.monotonic()
    return state


def _finite_loss(measured: dict[str, jax.Array], done: int, previous: float) -> float:
    """The loss; a gradient that is not finite has spoilt the parameters just as a loss would."""
    for name in sorted(measured, key=lambda name: name != "loss"):
        if not math.isfinite(value := float(measured[name])):
            raise NonFiniteLossError(
                f"{name} is {value} at step {done}, the loss looked at before was {previous:.4f}"
            )
    return float(measured["loss"])


def _cut_metrics(path: Path, step: int) -> None:
    """Keeps the lines up to ``step``; a line that a killed process left unfinished goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    with whole_file(path) as file:
        file.write("".join(kept))
