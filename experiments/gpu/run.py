"""Measures the package on a GPU in eight minutes, most valuable first.

    python experiments/gpu/run.py --output DIR
    python experiments/gpu/run.py --output DIR --rehearse       # every stage at tiny shapes on a CPU
    python experiments/gpu/report.py DIR                        # tables and pictures

Every stage is a process of its own with its own limit; ``--seconds`` bounds them all together, and what
does not fit is the last. ``DIR/results.jsonl`` gets a line for every item (``stage``, ``item``;
``failed`` or ``skipped`` with a reason where there is no figure) as soon as it is there, and a line for
every stage (``stage``, ``rc``, ``took_s``); ``DIR/device.json`` has card, driver, versions and commit,
``DIR/log.txt`` what the stages print. What is there survives a kill. A directory that has results
already gets more lines.

Needed: JAX with CUDA, flax, optax; torch, transformers and peft for their parts, whose items are skipped
without. No weights and no data: they are random, and made on the device. Only the standard library here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata as metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.gpu import items  # noqa: E402
from flora_jax.bench.receipts import machine  # noqa: E402

# A stage is not begun with less time left, and is asked to end so long before it is killed.
LEAST_S, GRACE_S = 12.0, 4.0
_VERSIONS = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "flax", "optax",
    "orbax-checkpoint", "numpy", "ml-dtypes", "safetensors", "tokenizers", "torch", "triton",
    "transformers", "peft", "pydantic", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
    "nvidia-nccl-cu13", "nvidia-cuda-runtime", "nvidia-cuda-nvcc",
)  # fmt: skip
_CARD = ("name", "memory.total", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


class Plan(NamedTuple):
    """A stage: its module's words, on a GPU and in a rehearsal, and the seconds it may take."""

    name: str
    limit_s: float
    module: str
    words: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    flags: str = ""


def _decode(name: str, limit_s: float, words: str, rehearsal: str, flags: str = "") -> Plan:
    return Plan(name, limit_s, "decode", tuple(words.split()), tuple(rehearsal.split()), flags)


# Preset, layers (0: all), attention, rows, kinds with their ranks, positions.
STAGES = (
    Plan("ceilings", 50, "ceilings"),
    Plan("ceilings-torch", 30, "ceilings_torch"),
    _decode(
        "decode-attention", 85, "15b 10 gather,loop,gather+looped,cudnn 32 none 512,2048",
        "mini 1 loop,gather+looped,cudnn 2 none 64",
    ),
    _decode(
        "decode-ranks", 60, "15b 10 auto 32 none,flora1,flora8,lora8,flora32,lora32,flora2,lora1 2048",
        "mini 1 auto 2 none,flora2,lora2 64",
    ),
    Plan("layer", 100, "layer"),
    Plan("layer-torch", 45, "layer_torch"),
    Plan(
        "prefill", 50, "prefill", ("15b", "10", "auto,gather,loop", "none,flora8,lora8", "512,2048"),
        ("mini", "1", "auto,gather", "none,flora2", "32"),
    ),
    _decode(
        "decode-whole", 110, "15b 0 auto 32 none,flora8,lora8,flora1,lora1 512",
        "mini 1 auto 2 none 64",
    ),
    Plan("torch-model", 70, "torch_model", ("15b", "10", "32", "8"), ("mini", "1", "2", "2")),
    Plan("train", 60, "train", ("1b", "0", "lora8,flora8"), ("mini", "1", "lora2")),
    Plan("train-peft", 40, "train_peft", ("1b", "0", "8"), ("mini", "1", "2")),
    Plan(
        "engine", 100, "engine", ("1b", "0", "flora8,none,lora8", "32", "256", "128"),
        ("mini", "1", "flora2", "2", "16", "8"),
    ),
    Plan("host", 60, "host", ("1b", "0", "32", "none,flora8,lora8", "512"),
         ("mini", "1", "2", "none,flora2", "64")),
    _decode("decode-1b", 75, "1b 0 auto 32 none,flora1,lora1,flora8,lora8,flora32,lora32 2048",
            "mini 1 auto 2 none 64"),
    _decode("decode-3b", 90, "3b 0 auto 32 none,flora1,lora1,flora8,lora8,flora32,lora32 2048",
            "mini 1 auto 2 none,lora2 64"),
    _decode(
        "decode-1b-looped", 60, "1b 0 auto,gather+looped 32 none,flora8 512", "mini 1 auto 2 none 64",
        "--xla_gpu_enable_command_buffer=+WHILE",
    ),
    _decode(
        "decode-while", 45, "15b 10 gather+looped 32 none 2048", "mini 1 auto 2 none 64",
        "--xla_gpu_enable_command_buffer=+WHILE",
    ),
)  # fmt: skip
NAMES = tuple(plan.name for plan in STAGES)


def describe(commit: str | None) -> dict[str, Any]:
    """Card, driver, machine, versions and commit; what cannot be told is ``None``."""
    versions = machine.versions()
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found = machine.describe()
    cards = _cards()
    return {
        "card": cards[0]["name"] if cards else f"no GPU: {found['cpu']}",
        "driver": cards[0]["driver_version"] if cards else None,
        "cards": cards,
        "machine": found,
        "versions": versions,
        "commit": commit or versions["commit"],
        "command": machine.command(),
        "date": machine.now(),
    }


def _cards() -> list[dict[str, str]]:
    """What ``nvidia-smi`` says of each card; none where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_CARD)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(_CARD, row)) for row in rows if len(row) == len(_CARD)]


def environment(plan: Plan, results: Path, deadline: float, rehearse: bool) -> dict[str, str]:
    """Of a stage's process."""
    own = dict(os.environ)
    own[items.STAGE], own[items.RESULTS] = plan.name, str(results.resolve())
    own[items.DEADLINE], own[items.REHEARSE] = str(deadline), str(int(rehearse))
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
    own["PYTHONUNBUFFERED"] = "1"
    own.setdefault("HF_HUB_OFFLINE", "1")
    own.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Stages have programs in common, and a second run has them all.
    kept = Path(own.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flora_jax"
    own.setdefault("JAX_COMPILATION_CACHE_DIR", str(kept / ("rehearsal" if rehearse else "xla")))
    own.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    if rehearse:
        own["JAX_PLATFORMS"], own["CUDA_VISIBLE_DEVICES"] = "cpu", ""
        own.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        return own
    own.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if plan.flags:
        own["XLA_FLAGS"] = " ".join(filter(None, [own.get("XLA_FLAGS"), plan.flags]))
    return own


class Runner:
    """Runs stages one after another, at most ``seconds`` in all.

    Args:
        output: the directory of the results.
        seconds: of all stages together.
        rehearse: tiny shapes on a CPU.
    """

    def __init__(self, output: Path, seconds: float, rehearse: bool):
        self.results, self.log = output / "results.jsonl", output / "log.txt"
        self.rehearse = rehearse
        self.started = time.monotonic()
        self.seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def left(self) -> float:
        """Seconds until all has to be over."""
        return self.seconds - (time.monotonic() - self.started)

    def run(self, plan: Plan, command: Sequence[str] | None = None) -> int | None:
        """Runs a stage and writes its line; its exit code, ``None`` where it was not begun.

        Args:
            plan: the stage.
            command: in place of its module's.
        """
        # Ending a stage that overruns takes time as well.
        limit = min(plan.limit_s, self.left - GRACE_S / 2)
        if self.rehearse:  # On a loaded machine Python alone takes as long.
            limit = self.left - GRACE_S / 2
        if limit < LEAST_S:
            reason = f"{max(0.0, self.left):.0f} s left"
            self._put(plan, rc=None, took_s=0.0, skipped=reason)
            return None
        words = plan.rehearsal if self.rehearse else plan.words
        command = command or [sys.executable, "-m", f"experiments.gpu.{plan.module}", *words]
        own = environment(plan, self.results, time.time() + limit - GRACE_S, self.rehearse)
        began = time.monotonic()
        with self.log.open("ab") as log:
            log.write(f"\n== {plan.name}\n".encode())
            log.flush()
            self._child = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=own, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
            try:
                rc, late = self._child.wait(limit), False
            except subprocess.TimeoutExpired:
                rc, late = self.end(), True
            except BaseException:  # This process is asked to end.
                self.end()
                raise
        took = round(time.monotonic() - began, 2)
        self._child = None
        more = {"timed_out": True} if late else {}
        self._put(plan, rc=rc, took_s=took, limit_s=round(limit, 1), **more)
        return rc

    def end(self) -> int:
        """Ends the stage that runs, and all that it started; its exit code."""
        child = self._child
        assert child is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S / 2)
        # What it started may live on without it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return child.wait()

    def _put(self, plan: Plan, **found: Any) -> None:
        items.append(self.results, {"stage": plan.name, **found})
        print(json.dumps({"stage": plan.name, **found}), flush=True)


@contextlib.contextmanager
def ending_by_exception() -> Iterator[None]:
    """A signal that asks this process to end does so by an exception, which ends the stage as well."""

    def stop(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; bad input ends in one line on standard error and exit code 2."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            self.exit(2, f"run: {message}\n")

    parser = Parser(description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=480.0, help="of all stages together")
    parser.add_argument("--stages", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--commit", help="where the program does not lie in a git checkout")
    asked = parser.parse_args(words)
    asked.stages = tuple(asked.stages.split(","))
    for name in asked.stages:
        if name not in NAMES:
            parser.error(f"--stages has {name!r}, expected of {', '.join(NAMES)}")
    if not asked.seconds > 0:
        parser.error(f"--seconds is {asked.seconds:g}, expected more than 0")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    """Runs the stages asked for, in the order of :data:`STAGES`.

    Returns:
        0 where all that were begun ended by themselves without an error, else 1.
    """
    asked = parse(words)
    try:
        asked.output.mkdir(parents=True, exist_ok=True)
        about = describe(asked.commit) | {"rehearse": asked.rehearse, "seconds": asked.seconds}
        if asked.rehearse:
            about["card"] = f"rehearsal: {about['machine']['cpu']}"
        device = asked.output / "device.json"
        device.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        runner = Runner(asked.output, asked.seconds, asked.rehearse)
        items.append(runner.results, header(about))
    except OSError as error:
        print(f"run: --output is {asked.output}: {error}", file=sys.stderr)
        return 2
    with ending_by_exception():
        codes = [runner.run(plan) for plan in STAGES if plan.name in asked.stages]
    return int(any(codes))


def header(about: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a run: what says whether its figures may stand beside others."""
    names = ("card", "driver", "commit", "date", "rehearse", "versions")
    return {"stage": "run", **{name: about[name] for name in names}}


if __name__ == "__main__":
    sys.exit(main())
