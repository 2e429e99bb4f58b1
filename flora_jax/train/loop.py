"""The training loop: progress, metrics, checkpoints, resumption. Knows nothing of what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp

from flora_jax.errors import RunError
from flora_jax.files import whole_file
from flora_jax.terminal import Bar, progress
from flora_jax.train.interrupt import Interrupt, InterruptedRun
from flora_jax.train.options import CHECKPOINTS, METRICS
from flora_jax.train.processes import any_of, is_first, told
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

    def evaluates(self, done: int) -> bool:
        """Whether the parameters after so many steps are evaluated; of step 0 see ``evaluate_first``."""
        return done > 0 and (done % self.evaluate_every == 0 or done == self.steps)


def _scalars(measured: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: float(value) for name, value in measured.items()}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained, as the loop sees it.

    Args:
        train_step: its measures must have "loss", a scalar or an entry for each thing trained.
        batch_at: gives batch ``n``.
        tokens_per_batch: for the speed.
        evaluate: of the parameters, what is logged as ``"validation"``; may raise ``InterruptedRun``.
        describe: makes a log line's entries of what ``train_step`` measured.
        blame: says of a batch and an entry of the measures whose data they were.
    """

    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batch_at: Callable[[int], Any]
    tokens_per_batch: int
    evaluate: Callable[[Any], dict[str, Any]] | None = None
    describe: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] = _scalars
    blame: Callable[[int, int], str] | None = None


def run_loop(
    state: TrainState,
    work: Work,
    directory: Path | None,
    options: LoopOptions,
    interrupt: Interrupt | None = None,
) -> TrainState:
    """Trains to ``options.steps``, from the newest checkpoint in ``directory`` where there is one.

    ``directory/metrics.jsonl`` has a line for the first, every ``log_every``-th, every evaluated and
    the last step, and with ``evaluate_first`` one for step 0; lines past the checkpoint resumed from
    are cut away. The device never waits for the host between two steps, but where one is saved or
    evaluated: measures are read after the next step was dispatched. Of several processes all save, and
    the first one logs.

    Args:
        state: where to start without a checkpoint; donated.
        work: what is trained.
        directory: of the run; made where it is missing. With ``None`` nothing is kept: no checkpoint and
            no line, whatever ``options`` and ``interrupt`` say.
        options: see there.
        interrupt: looked at between two steps; once it is set, the last step is saved.

    Raises:
        InterruptedRun: ``interrupt`` was set, or an evaluation raised it: its step is saved, and a later
            call evaluates it first. It goes on as if nothing had happened.
        RunError: the newest checkpoint is damaged, or an evaluation raised it: as with a loss that is not
            finite, nothing of its step is logged or saved.
        NonFiniteLossError: a loss or gradient is not finite; looked at when a step is logged or
            saved, it names the first such step, and nothing of it is logged or saved.
    """
    interrupt = interrupt or Interrupt()
    nowhere = Path(os.devnull)
    if directory is None:
        return _logged(state, work, options, None, nowhere, interrupt)
    directory.mkdir(parents=True, exist_ok=True)
    metrics = directory / METRICS
    manager = ocp.CheckpointManager(
        (directory / CHECKPOINTS).resolve(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=options.keep, cleanup_tmp_directories=True
        ),
    )
    # Closing the manager waits for the checkpoint that is being written.
    with contextlib.closing(manager):
        state = _restored(manager, state, directory)
        if is_first():
            _cut_metrics(metrics, int(state.step))
        # The other processes of a run compute the same lines.
        path = metrics if is_first() else nowhere
        return _logged(state, work, options, manager, path, interrupt)


def _logged(
    state: TrainState,
    work: Work,
    options: LoopOptions,
    manager: ocp.CheckpointManager | None,
    path: Path,
    interrupt: Interrupt,
) -> TrainState:
    """The loop with its bar and its lines, which are added to the file ``path``."""
    with progress("step", options.steps, keep=True) as bar:
        bar.show(int(state.step), note="compiling")
        if manager is not None:
            _evaluate_late(state, work, options, path)
        with path.open("a") as log:
            return _Loop(work, options, manager, log, bar, interrupt).run(state)


def _evaluate_late(state: TrainState, work: Work, options: LoopOptions, path: Path) -> None:
    """Evaluates the step resumed from where its evaluation was interrupted, and completes its line."""
    step = int(state.step)
    if work.evaluate is None or not options.evaluates(step):
        return

    def line_of_step() -> dict[str, Any]:
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return next((line for line in lines if line["step"] == step), {"step": step})

    line = told(line_of_step)
    if "validation" in line:
        return
    line["validation"] = work.evaluate(state.params)
    if is_first():
        _cut_metrics(path, step - 1, line)


def _restored(manager: ocp.CheckpointManager, state: TrainState, directory: Path) -> TrainState:
    """The newest checkpoint, or ``state`` where there is none."""
    newest = manager.latest_step()
    if newest is None:
        return state
    try:
        return manager.restore(newest, args=ocp.args.StandardRestore(state))
    except Exception as error:  # Whatever orbax and what it stands on make of damage.
        older = [step for step in manager.all_steps() if step != newest]
        instead = f"from step {max(older)}" if older else "from the start"
        raise RunError(
            f"{directory / CHECKPOINTS / str(newest)}: damaged ({str(error).splitlines()[0]}); "
            f"without that directory the run goes on {instead}"
        ) from error


class _Loop:
    """One call of :func:`run_loop`: which measures are not yet looked at, and since when it counts."""

    def __init__(
        self,
        work: Work,
        options: LoopOptions,
        manager: ocp.CheckpointManager | None,
        log: TextIO,
        bar: Bar,
        interrupt: Interrupt,
    ) -> None:
        self.work, self.options, self.manager = work, options, manager
        self.log, self.bar, self.interrupt = log, bar, interrupt
        self.unseen: dict[int, dict[str, jax.Array]] = {}
        self.loss = math.nan
        self.logged = self.saved = time.monotonic()

    def run(self, state: TrainState) -> TrainState:
        options, work = self.options, self.work
        start = int(state.step)
        if (
            work.evaluate is not None
            and options.evaluate_first
            and not start
            and told(lambda: not self.log.tell())
        ):
            self.write({"step": 0, "validation": work.evaluate(state.params)})
        self.saved = self.logged = time.monotonic()
        since = 0
        # A step and the steps before it that are still to be logged.
        late: tuple[int, int] | None = None
        for number in range(start, options.steps):
            if self.asked(number):
                self.leave(state, start, number, late)
            state, self.unseen[number] = work.train_step(state, work.batch_at(number))
            if late is not None:
                self.report(*late, self.look(late[0]))
                late = None
            since += 1
            done = number + 1
            last = done == options.steps
            validate = work.evaluate is not None and options.evaluates(done)
            save = last or time.monotonic() - self.saved > options.save_seconds
            save |= options.save_every is not None and done % options.save_every == 0
            logs = done == 1 or done % options.log_every == 0 or validate or last
            if save or validate:
                measured = self.look(done)
                if logs:
                    self.report(done, since, measured, state if validate else None)
            elif logs:
                # Read once the device has the next step to do.
                late = done, since
            if logs:
                since = 0
            if save:
                self.save(done, state)
        return state

    def asked(self, number: int) -> bool:
        """Whether the run is to end before step ``number``: with several processes, whether any of them
        was asked to, which they tell one another at the steps that are logged.
        """
        if jax.process_count() == 1:
            return self.interrupt.requested
        if number % self.options.log_every or not any_of(self.interrupt.requested):
            return False
        if not self.interrupt.requested:
            self.interrupt.request(signal.SIGTERM)
        return True

    def leave(
        self, state: TrainState, start: int, done: int, late: tuple[int, int] | None
    ) -> NoReturn:
        """Ends after ``done`` steps, all that is known of them written and saved."""
        if late is not None:
            self.report(*late, self.look(late[0]))
        newest = None if self.manager is None else self.manager.latest_step()
        if done > start and newest != done:
            if self.unseen:
                self.look(done)
            self.save(done, state)
        self.interrupt.check(f"at step {done} of {self.options.steps}")
        raise AssertionError("an interrupt that is set must raise")

    def look(self, done: int) -> dict[str, np.ndarray]:
        """The measures of the last of the first ``done`` steps; waits for it."""
        own = {number: self.unseen.pop(number) for number in list(self.unseen) if number < done}
        measured, self.loss = _look(own, self.loss, self.work.blame)
        return measured

    def report(
        self,
        done: int,
        steps: int,
        measured: dict[str, np.ndarray],
        validate: TrainState | None = None,
    ) -> None:
        """Logs step ``done``, the last of ``steps``; with the validation of its state, if given."""
        now = time.monotonic()
        rate = steps * self.work.tokens_per_batch / (now - self.logged)
        self.logged = now
        line = {
            "step": done, "tokens_per_second": round(rate, 1), **self.work.describe(measured)
        }  # fmt: skip
        if self.work.evaluate is not None and validate is not None:
            try:
                line["validation"] = self.work.evaluate(validate.params)
            except InterruptedRun:
                # The line without it tells a later call what is missing.
                self.write(line)
                self.save(done, validate)
                raise
            self.logged = time.monotonic()
        self.write(line)
        self.bar.show(done, note=f"loss {self.loss:.3f}, {rate:,.0f} tokens/s")

    def write(self, line: dict[str, Any]) -> None:
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()

    def save(self, done: int, state: TrainState) -> None:
        if self.manager is not None:
            self.manager.save(done, args=ocp.args.StandardSave(state))
        self.saved = time.monotonic()


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


def _cut_metrics(path: Path, step: int, then: dict[str, Any] | None = None) -> None:
    """Keeps the lines up to ``step``, and adds the line ``then``, if given; a line that a killed process
    left unfinished goes too.
    """
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    if then is not None:
        kept.append(json.dumps(then) + "\n")
    with whole_file(path) as file:
        file.write("".join(kept))
