"""A long run of the server over the embedded model: does it stay right, and as small as it began?

    python experiments/soak_http.py --output experiments/results/soak_http.json

20,000 requests from 64 clients at once, each with a connection of its own that it keeps: the requests of
soak.py (1 to 32 tokens, 20 of 100 sampled), over 100 adapter folders of all kinds and ranks 1 to 8 by a
Zipf distribution, 16 of the largest resident, 16 requests running. 3 of 4 are streams. 5 of 100 clients
go away at a random moment. The queue has less room than 64 clients could use, so that some are told to
come back (429), which they do.

It fails (exit code 1) unless

- every answer is 200 or 429, with exactly the tokens asked for, in text, ids and usage; the server ends
  with code 0 at SIGTERM;
- nothing is left at the end: no request running or waiting, no cache in use;
- the server's memory at the end is within 5 % of what it was after the first 20th of the requests (not
  judged under 2,000 of them: it has not settled by then);
- nothing was compiled after the warm-up, by the server's own count at /metrics; adapters were evicted;
- a random 1 % of the requests give the same tokens alone, with soak.py's exception for near ties.

Receipt: 12 minutes on 2 cores of an Intel Xeon at 2.5 GHz, after 6 of compiling: 19,387 answered, 613
went away, 866 told to come back, 3,046 evictions, 0 compilations, memory 0.5 % up, 190 the same alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from server_process import ServerProcess, started
from soak import (
    IN_ENGINE,
    OUTPUT,
    PROMPT,
    RESIDENT,
    ROWS,
    Answered,
    differences,
    random_adapters,
    requests,
)

from flora_jax.bench.receipts import report
from flora_jax.bench.serving.client import Client
from flora_jax.checkpoints.checkpoint import load_model
from flora_jax.cli.common import say
from flora_jax.cli.program import run_function
from flora_jax.files import require_file
from flora_jax.peft.read import write_adapter
from flora_jax.serve.request import Request
from flora_jax.terminal import progress

CLIENTS = IN_ENGINE
# Beside the rows; 64 clients need 48, and who went away may hold a place for a step.
QUEUE = 44
# Requests from which the memory is judged.
SETTLED = 2_000
COMPILED, EVICTED = "flora_jax:compilations_total", "flora_jax:adapter_evictions_total"


def body_of(request: Request, stream: bool) -> bytes:
    """A request as JSON."""
    params = request.sampling_params
    fields: dict[str, Any] = {
        "model": request.adapter or "mini",
        "prompt": [*request.prompt_token_ids],
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    if stream:
        fields["stream_options"] = {"include_usage": True}
    return json.dumps(fields).encode()


class Answer:
    """What came of one request, from a body or from events."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}
        self.error: str | None = None
        self.ended = False

    def take(self, data: bytes) -> None:
        """An event of a stream, or the whole body."""
        if data == b"[DONE]":
            self.ended = True
            return
        part = json.loads(data)
        if "error" in part:
            self.error = part["error"]["message"]
            return
        self.usage = part.get("usage") or self.usage
        for choice in part["choices"]:
            self.tokens += choice["token_ids"] or []
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    def problem(self, request: Request) -> str | None:
        """What is wrong with it."""
        wanted = request.sampling_params.max_tokens
        usage = len(request.prompt_token_ids), wanted
        found = self.usage.get("prompt_tokens"), self.usage.get("completion_tokens")
        if self.error is not None:
            return self.error
        if not self.ended:
            return "the answer has no end"
        if len(self.tokens) != wanted or self.finish_reason != "length" or found != usage:
            return (
                f"{len(self.tokens)} tokens, {self.finish_reason}, usage {found}, "
                f"expected {wanted}, length, {usage}"
            )
        return None


class Soak:
    """The clients, and what came of their requests.

    Args:
        url: of the server.
        traffic: requests to be answered.
        seed: of disconnects and of what is checked.
        on_end: called for every request that ends or is given up, with their number.
    """

    def __init__(
        self, url: str, traffic: Iterator[Request], seed: int, on_end: Callable[[int], None]
    ):
        self.client, self.traffic, self.on_end = Client(url), traffic, on_end
        self.draw = random.Random(seed)
        self.statuses: Counter[int] = Counter()
        self.kept: list[Answered] = []
        self.errors: list[str] = []
        self.ended = self.generated = self.disconnects = 0

    async def run(self) -> None:
        """Has all requests answered."""
        async with self.client, asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(self._client())

    async def _client(self) -> None:
        for request in self.traffic:
            # Wherever it is by then: waiting, reading its prompt, drawing, or at its end.
            stays_s = self.draw.uniform(0.0, 1.5) if self.draw.random() < 0.05 else None
            stream = self.draw.random() < 0.75
            try:
                async with asyncio.timeout(stays_s):
                    await self._one(request, stream)
            except TimeoutError:
                self.disconnects += 1
            except OSError as error:
                self.errors.append(f"request {request.request_id}: {error}")
            self.ended += 1
            self.on_end(self.ended)

    async def _one(self, request: Request, stream: bool) -> None:
        found = await self.ask(request, stream)
        if problem := found.problem(request):
            self.errors.append(f"request {request.request_id}: {problem}")
            return
        self.generated += len(found.tokens)
        if self.draw.random() < 0.01:
            self.kept.append(Answered(request, found.tokens))

    async def ask(self, request: Request, stream: bool) -> Answer:
        """The answer to a request, which is sent again while the queue is full."""
        body = body_of(request, stream)
        while True:
            found = Answer()
            answer = await self.client.call("POST", "/v1/completions", body, found.take)
            self.statuses[answer.status] += 1
            if answer.status != 429:
                break
            await asyncio.sleep(float(answer.headers["retry-after"]))
        if answer.body:
            found.take(answer.body)
            found.ended = True
        return found


def alone(url: str, kept: list[Answered]) -> list[list[int]]:
    """The tokens of requests that are sent one after another."""

    async def main() -> list[list[int]]:
        soak = Soak(url, iter(()), 0, lambda _: None)
        async with soak.client:
            return [(await soak.ask(one.request, stream=False)).tokens for one in kept]

    return asyncio.run(main())


def metric(server: ServerProcess, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = server.read("/metrics").splitlines()
    values = [
        float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name
    ]
    if not values:
        raise ValueError(f"/metrics has no {name}")
    return sum(values)


def left_behind(server: ServerProcess) -> tuple[float, ...]:
    """Requests running and waiting, and the share of the cache in use, once the last have ended."""
    ends = time.monotonic() + 20
    while True:
        status = json.loads(server.read("/v1/status"))
        found = status["running"], status["waiting"], status["cache_usage"]
        if not any(found) or time.monotonic() > ends:
            return found
        time.sleep(0.2)


@dataclasses.dataclass
class Memory:
    """The server's memory when so many of the requests have ended."""

    server: ServerProcess
    count: int
    found: dict[str, int] = dataclasses.field(default_factory=dict)

    def at(self, ended: int) -> None:
        for part in (1, 5, 10, 15):
            if ended == max(1, self.count * part // 20):
                self.found[f"after {5 * part} %"] = self.server.resident_bytes()


def main(
    count: Annotated[int, typer.Option("--requests", help="At least 100.", min=100)] = 20_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Has the requests answered, checks all of the above, and fails if anything is wrong."""
    if output is not None:
        require_file(output, overwrite=True)
    model = load_model("mini", "float32")
    adapters = random_adapters(model.config, seed)
    with tempfile.TemporaryDirectory() as home, progress("requests", count) as bar:
        command = [sys.executable, "-m", "flora_jax.cli", "serve", "mini"]
        command += ["--max-num-seqs", str(ROWS), "--max-model-len", str(PROMPT + OUTPUT)]
        command += ["--max-loras", str(RESIDENT), "--max-queue", str(QUEUE)]
        for name, adapter in adapters.items():
            write_adapter(adapter, Path(home, name), "mini")
            command += ["--adapter", f"{name}={Path(home, name)}"]
        with started(command, Path(home, "log")) as server:
            memory = Memory(server, count)
            compiled, evicted = metric(server, COMPILED), metric(server, EVICTED)
            traffic = requests(count, [*adapters], model.config, seed)

            def on_end(ended: int) -> None:
                bar.advance()
                memory.at(ended)

            began = time.perf_counter()
            soak = Soak(server.url, traffic, seed, on_end)
            asyncio.run(soak.run())
            seconds = time.perf_counter() - began
            left = left_behind(server)
            memory.found["at the end"] = server.resident_bytes()
            compiled = metric(server, COMPILED) - compiled
            evicted = metric(server, EVICTED) - evicted
            expected = alone(server.url, soak.kept)
            code = server.end()
            tail = server.log.read_text(errors="replace")[-2000:]
    ties, wrong = differences(model, adapters, soak.kept, expected)
    growth = memory.found["at the end"] / memory.found["after 5 %"] - 1
    problems = [*soak.errors, *wrong]
    strange = {status for status in soak.statuses if status not in (200, 429)}
    for bad, problem in (
        (strange, f"answers with {sorted(strange)}, expected 200 or 429"),
        (any(left), f"left behind: {left} (running, waiting, cache usage)"),
        (
            count >= SETTLED and abs(growth) > 0.05,
            f"memory changed by {growth:.1%}, expected at most 5 %",
        ),
        (compiled, f"{compiled:g} programs compiled after the warm-up, expected 0"),
        (not evicted, "no adapter was evicted"),
        (not soak.disconnects, "no client went away"),
        (count >= SETTLED and not soak.kept, "no request was checked alone"),
        (code, f"the server ended with code {code}: {tail}"),
        ("Traceback" in tail, f"the server printed a traceback: {tail}"),
    ):
        if bad:
            problems.append(problem)
    result = {
        "requests": count,
        "seconds": seconds,
        "answered": soak.ended - soak.disconnects - len(soak.errors),
        "disconnects": soak.disconnects,
        "told_to_come_back": soak.statuses[429],
        "generated_tokens": soak.generated,
        "adapter_evictions": evicted,
        "compilations": compiled,
        "checked_alone": len(soak.kept),
        "near_ties": ties,
        "memory_bytes": memory.found,
        "memory_growth": growth,
        "problems": problems,
    }
    report.table(
        "soak over HTTP",
        [result],
        [name for name in result if name not in ("memory_bytes", "problems")],
    )
    if output is not None:
        report.write_results(output, result)
    for problem in problems[:20]:
        say(f"soak_http: {problem}")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    run_function(main)
