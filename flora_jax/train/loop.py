"""The training loop: progress, metrics, checkpoints, resumption. Knows nothing of what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flora_jax.errors import RunError
from flora_jax.files import whole_file
from flora_jax.train.step import TrainState


class NonFiniteLossError(RunError):
    """The loss or the gradient became NaN or infinite; the message names the step and the data."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How long to run and what to keep.

    Times are in seconds, the rest counts steps; a checkpoint is saved when either is due, and at the
    end. The last ``keep`` checkpoints stay on disk.
    """

    steps: int
    save_seconds: float = 300.0
    save_every: int | None = None
    log_every: int = 10
    evaluate_every: int = 500
    evaluate_first: bool = False
    keep: int = 2


def _scalars(measured: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: float(value) for name, value in measured.items()}


def run_loop(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batch_at: Callable[[int], Any],
    directory: Path,
    options: LoopOptions,
    *,
    tokens_per_batch: int,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    describe: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] = _scalars,
    blame: Callable[[int, int], str] | None = None,
) -> TrainState:
    """Trains to ``options.steps``, from the newest checkpoint in ``directory`` where there is one.

    ``directory/metrics.jsonl`` has a line for the first, every ``log_every``-th, every evaluated and
    the last step, and with ``evaluate_first`` one for step 0; lines past the checkpoint resumed from
    are cut away. The device never waits for the host between two steps, but where one is saved or
    evaluated: measures are read after the next step was dispatched.

    Args:
        state: where to start without a checkpoint; donated.
        train_step: its measures must have "loss", a scalar or an entry for each thing trained.
        batch_at: gives batch ``n``.
        directory: of the run.
        options: see there.
        tokens_per_batch: for the speed.
        evaluate: of the parameters, what is logged as ``"validation"``.
        describe: makes a log line's entries of what ``train_step`` measured.
        blame: says of a batch and an entry of the measures whose data they were.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; looked at when a step is logged or
            saved, it names the first such step, and nothing of it is logged or saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metrics = directory / "metrics.jsonl"
    manager = ocp.CheckpointManager(
        (directory / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=options.keep, cleanup_tmp_directories=True
        ),
    )
    newest = manager.latest_step()
    if newest is not None:
        try:
            state = manager.restore(newest, args=ocp.args.StandardRestore(state))
        except Exception as error:  # Whatever orbax and what it stands on make of damage.
            older = [step for step in manager.all_steps() if step != newest]
            manager.close()
            instead = f"from step {max(older)}" if older else "from the start"
            raise RunError(
                f"{directory / 'checkpoints' / str(newest)}: damaged ({str(error).splitlines()[0]}); "
                f"without that directory the run goes on {instead}"
            ) from error
    _cut_metrics(metrics, int(state.step))

    progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=Console(stderr=True),
    )  # fmt: skip
    # Closing the manager waits for the checkpoint that is being written.
    with contextlib.closing(manager), progress, metrics.open("a") as log:

        def write(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()

        task = progress.add_task("", total=options.steps, completed=int(state.step), note="")
        first = options.evaluate_first and not int(state.step) and not metrics.stat().st_size
        if evaluate is not None and first:
            write({"step": 0, "validation": evaluate(state.params)})
        saved = logged = time.monotonic()
        since = 0
        unseen: dict[int, dict[str, jax.Array]] = {}
        previous = math.nan

        def look(done: int) -> dict[str, np.ndarray]:
            """The measures of the last of the first ``done`` steps; waits for it."""
            nonlocal previous
            own = {number: unseen.pop(number) for number in list(unseen) if number < done}
            measured, previous = _look(own, previous, blame)
            return measured

        def report(done: int, steps: int, measured: dict[str, np.ndarray], validate: bool) -> None:
            nonlocal logged
            now = time.monotonic()
            rate = steps * tokens_per_batch / (now - logged)
            logged = now
            line = {"step": done, "tokens_per_second": round(rate, 1), **describe(measured)}
            if evaluate is not None and validate:
                line["validation"] = evaluate(state.params)
                logged = time.monotonic()
            write(line)
            note = f"loss {previous:.3f}  {rate:,.0f} tokens/s"
            progress.update(task, completed=done, note=note)

        late: tuple[int, int] | None = None
        for number in range(int(state.step), options.steps):
            state, unseen[number] = train_step(state, batch_at(number))
            if late is not None:
                report(*late, look(late[0]), validate=False)
                late = None
            since += 1
            done = number + 1
            last = done == options.steps
            validate = evaluate is not None and (done % options.evaluate_every == 0 or last)
            save = last or time.monotonic() - saved > options.save_seconds
            save |= options.save_every is not None and done % options.save_every == 0
            logs = done == 1 or done % options.log_every == 0 or validate or last
            if save or validate:
                measured = look(done)
                if logs:
                    report(done, since, measured, validate)
            elif logs:
                # Read once the device has the next step to do.
                late = done, since
            if logs:
                since = 0
            if save:
                manager.save(done, args=ocp.args.StandardSave(state))
                saved = time.monotonic()
    return state


def _look(
    unseen: Mapping[int, Mapping[str, jax.Array]],
    previous: float,
    blame: Callable[[int, int], str] | None,
) -> tuple[dict[str, np.ndarray], float]:
    """The last step's measures and mean loss, once those of all steps since are known as finite.

    A gradient that is not finite has spoilt the parameters just as a loss would.
    """
    for number, arrays in unseen.items():
        measured = {name: np.asarray(value) for name, value in arrays.items()}
        for name in sorted(measured, key=lambda name: name != "loss"):
            values = measured[name].reshape(-1)
            for entry in np.flatnonzero(~np.isfinite(values))[:1]:
                whose = "" if blame is None else f"; {blame(number, int(entry))}"
                raise NonFiniteLossError(
                    f"{name} is {values[entry]} at step {number + 1}, the loss before was "
                    f"{previous:.4f}{whose}"
                )
        previous = float(np.mean(measured["loss"]))
    return measured, previous


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
