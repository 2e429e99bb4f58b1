"""A long run of the engine over the embedded model: does it stay right, and as small as it began?

    python experiments/soak.py --output experiments/results/soak.json

20,000 requests of 1 to 32 tokens of output over 100 random adapters of all kinds and ranks 1 to 8, in
memory, on c_attn and c_fc, with room for 16 of the largest on the device. Adapters are drawn by a Zipf
distribution, 2 of 100 requests use none; 5 of 100 are cancelled at a random moment, 20 of 100 draw at
temperature 0.8. At most 64 requests are in the engine at once, 16 of them running, and the cache has
less room than they could use, so that some are set aside.

It fails (exit code 1) unless

- no request fails, and each ends with exactly the tokens it asked for; nothing comes after a cancel;
- nothing is left at the end: no rows, no cache, no waiting request;
- the process's memory at the end is within 5 % of what it was after the first 20th of the requests;
- nothing was compiled after the warm-up; adapters were evicted and came back;
- a random 1 % of the requests give the same tokens alone in the engine, sampled ones by their own seeds.
  Alone means another padded shape, where sums round differently: a greedy request's first difference is
  excused only if a full forward pass has both tokens within 1e-4 of each other, and such cases are
  counted; a sampled one's never.

Receipt: passed in 10 minutes on one core of an Intel Xeon (Emerald Rapids): 20,000 requests, 602 of
them cancelled, 319,000 tokens, 6,128 preemptions, 3,094 adapter loads, nothing compiled, memory 0.7 %
more at the end than after 5 %, 206 requests the same alone without a near tie
(experiments/results/soak.json).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx

from flora_jax.adapters.model_adapter import ModelAdapter, init_adapter, randomise
from flora_jax.bench.receipts import report
from flora_jax.checkpoints.checkpoint import load_model
from flora_jax.cli.common import prepare_jax, say
from flora_jax.cli.program import run_function
from flora_jax.errors import RunError
from flora_jax.files import require_file
from flora_jax.models.family import ModelConfig
from flora_jax.models.model import Model
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Request, RequestId, SamplingParams
from flora_jax.terminal import progress

ADAPTERS, RESIDENT, LARGEST = 100, 16, 8
PROMPT, OUTPUT, ROWS, IN_ENGINE = 64, 32, 16, 64
# Rows could use 16 * 96 positions, and use about half of that.
OPTIONS = EngineOptions(
    max_num_seqs=ROWS, max_model_len=PROMPT + OUTPUT, cache_tokens=640, resident_adapters=RESIDENT
)
TARGETS = ("attn.c_attn", "mlp.c_fc")
MARGIN = 1e-4


def random_adapters(config: ModelConfig, seed: int) -> dict[str, ModelAdapter]:
    """Adapters of all kinds and ranks."""
    draw = random.Random(seed)
    found = {}
    for number in range(ADAPTERS):
        kind = ("flora", "lora", "ia3", "hira")[number % 4]
        rank = 1 if kind == "ia3" else draw.choice((1, 2, 4, LARGEST))
        fresh = init_adapter(
            jax.random.key(number), kind, config.projections(), config.n_layer,
            rank=rank, targets=TARGETS,
        )  # fmt: skip
        found[f"{number}-{kind}-{rank}"] = randomise(fresh, seed + number)
    return found


def requests(count: int, names: Sequence[str], config: ModelConfig, seed: int) -> Iterator[Request]:
    """Requests one by one, so that none of them is held for longer than it is needed."""
    rng = np.random.default_rng(seed)
    weight_N = 1 / np.arange(1, len(names) + 1)
    weight_N /= weight_N.sum()
    for index in range(count):
        ids = rng.integers(32, config.vocab_size, size=rng.integers(1, PROMPT + 1))
        name = None if rng.random() < 0.02 else names[rng.choice(len(names), p=weight_N)]
        sampled = rng.random() < 0.2
        params = SamplingParams(
            max_tokens=int(rng.integers(1, OUTPUT + 1)), temperature=0.8 if sampled else 0.0,
            seed=index, ignore_eos=True,
        )  # fmt: skip
        yield Request(ids.tolist(), params, name, request_id=index)


class Answered(NamedTuple):
    """A request, and the tokens that it got among others."""

    request: Request
    tokens: list[int]


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Soak:
    """The traffic and what came of it.

    Args:
        engine: warmed up.
        traffic: requests to be served.
        seed: of cancellations and of what is checked.
        on_end: called for every request that ends or is cancelled.
    """

    def __init__(
        self, engine: Engine, traffic: Iterator[Request], seed: int, on_end: Callable[[], None]
    ):
        self.engine, self.traffic, self.on_end = engine, traffic, on_end
        self.draw = random.Random(seed)
        self.running: dict[RequestId, Request] = {}
        self.tokens: dict[RequestId, list[int]] = {}
        self.doomed: dict[RequestId, int] = {}
        self.cancelled: set[RequestId] = set()
        self.kept: list[Answered] = []
        self.errors: list[str] = []
        self.ended = self.generated = self.cancellations = 0

    def run(self, at_share: Callable[[int], None]) -> None:
        """Serves everything; ``at_share`` is told how many requests have ended, after each step."""
        more = True
        idle_since = time.monotonic()
        while more or self.running:
            while more and len(self.running) < IN_ENGINE:
                request = next(self.traffic, None)
                more = request is not None
                if request is not None:
                    self._add(request)
            self.engine.wait(1.0)
            updates = self.engine.step()
            for update in updates:
                self._take(update)
            self._cancel()
            if updates:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > 60:
                self.errors.append(f"nothing came for a minute, {len(self.running)} requests left")
                return
            at_share(self.ended)
        for _ in range(2):  # The last cancellations are still to be received.
            self.engine.step()

    def _add(self, request: Request) -> None:
        request_id = self.engine.add(request)
        self.running[request_id], self.tokens[request_id] = request, []
        if self.draw.random() < 0.05:  # After so many steps, if it lives that long.
            self.doomed[request_id] = self.draw.randint(1, 40)

    def _take(self, update: Any) -> None:
        if update.request_id in self.cancelled or update.request_id not in self.running:
            self.errors.append(
                f"request {update.request_id}: an update after its end or cancellation"
            )
            return
        self.tokens[update.request_id] += update.token_ids
        if update.error is None and update.completion is None:
            return
        request, tokens = self._remove(update.request_id)
        if update.error is not None:
            self.errors.append(f"request {request.request_id}: {update.error}")
        elif (
            tokens != [*update.completion.token_ids]
            or len(tokens) != request.sampling_params.max_tokens
        ):
            self.errors.append(
                f"request {request.request_id}: {len(tokens)} tokens in updates, "
                f"{len(update.completion.token_ids)} in the completion, "
                f"expected {request.sampling_params.max_tokens}"
            )
        else:
            self.generated += len(tokens)
            if self.draw.random() < 0.01:
                self.kept.append(Answered(request, tokens))

    def _cancel(self) -> None:
        for request_id in list(self.doomed):
            self.doomed[request_id] -= 1
            if not self.doomed[request_id]:
                self.engine.cancel(request_id)
                self.cancelled.add(request_id)
                self.cancellations += 1
                self._remove(request_id)

    def _remove(self, request_id: RequestId) -> tuple[Request, list[int]]:
        self.doomed.pop(request_id, None)
        self.ended += 1
        self.on_end()
        return self.running.pop(request_id), self.tokens.pop(request_id)


def alone(engine: Engine, request: Request) -> list[int]:
    """The request's tokens where nothing else runs."""
    engine.add(request)
    found: list[int] = []
    while engine.has_work:
        engine.wait()
        for update in engine.step():
            found += update.token_ids
    return found


def near_tie(
    model: Model, adapter: ModelAdapter | None, ids: Sequence[int], tokens: tuple[int, int]
) -> bool:
    """Whether both tokens are equally good after ``ids``, to rounding, in a full forward pass."""
    whole = nnx.merge(model.graph, model.params)
    layers = None if adapter is None else adapter.layers
    logits_V = whole(jnp.asarray([ids], jnp.int32), adapters=layers)[0, -1]
    first, second = (float(logits_V[token]) for token in tokens)
    return abs(first - second) <= MARGIN


def differences(
    model: Model,
    adapters: Mapping[str, ModelAdapter],
    kept: Sequence[Answered],
    expected: Sequence[list[int]],
) -> tuple[int, list[str]]:
    """How many requests got other tokens alone (``expected``) by a near tie, and those that did
    otherwise.
    """
    ties, wrong = 0, []
    for (request, tokens), own in zip(kept, expected, strict=True):
        if own == tokens:
            continue
        place = next((n for n, pair in enumerate(zip(own, tokens)) if len({*pair}) > 1), None)
        adapter = None if request.adapter is None else adapters[request.adapter]
        greedy = request.sampling_params.temperature == 0
        if greedy and place is not None and near_tie(
            model, adapter, [*request.prompt_token_ids, *tokens[:place]],
            (own[place], tokens[place]),
        ):  # fmt: skip
            ties += 1
        else:
            wrong.append(f"request {request.request_id}: {tokens} among others, {own} alone")
    return ties, wrong


def main(
    count: Annotated[int, typer.Option("--requests", help="At least 40.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Serves the requests, checks all of the above, and fails if anything is wrong."""
    if output is not None:
        require_file(output, overwrite=True)
    prepare_jax()
    model = load_model("mini", "float32")
    adapters = random_adapters(model.config, seed)
    engine = Engine(model, adapters, options=OPTIONS)
    if not engine.warm_up():
        raise RunError("no compilation was counted while warming up: the counter does not count")
    memory: dict[str, int] = {"after warm-up": resident_bytes()}
    marks = {count * part // 20: f"after {5 * part} %" for part in (1, 5, 10, 15)}

    def at_share(ended: int) -> None:
        for mark in [mark for mark in marks if mark <= ended]:
            memory[marks.pop(mark)] = resident_bytes()

    began = time.perf_counter()
    with progress("requests", count) as bar:
        soak = Soak(engine, requests(count, [*adapters], model.config, seed), seed, bar.advance)
        soak.run(at_share)
    seconds = time.perf_counter() - began
    memory["at the end"] = resident_bytes()
    compiled, stats = engine.compilations.count, engine.stats
    expected = [alone(engine, one.request) for one in soak.kept]
    ties, wrong = differences(model, adapters, soak.kept, expected)
    engine.close()

    growth = memory["at the end"] / memory["after 5 %"] - 1
    problems = [*soak.errors, *wrong]
    left = stats.running, stats.waiting, stats.cache_usage
    for bad, problem in (
        (any(left), f"left behind: {left} (running, waiting, cache usage)"),
        (abs(growth) > 0.05, f"memory changed by {growth:.1%}, expected at most 5 %"),
        (compiled, f"{compiled} programs compiled after the warm-up, expected 0"),
        (not stats.adapter_evictions, "no adapter was evicted"),
        (not soak.kept, "no request was checked alone"),
    ):
        if bad:
            problems.append(problem)
    result = {
        "requests": count,
        "seconds": seconds,
        "completed": soak.ended - soak.cancellations - len(soak.errors),
        "cancelled": soak.cancellations,
        "generated_tokens": soak.generated,
        "preemptions": stats.preemptions,
        "adapter_loads": stats.adapter_loads,
        "adapter_evictions": stats.adapter_evictions,
        "compilations": compiled,
        "checked_alone": len(soak.kept),
        "sampled_checked_alone": sum(
            request.sampling_params.temperature > 0 for request, _ in soak.kept
        ),
        "near_ties": ties,
        "memory_bytes": memory,
        "memory_growth": growth,
        "problems": problems,
    }
    report.table(
        "soak", [result], [name for name in result if name not in ("memory_bytes", "problems")]
    )
    if output is not None:
        report.write_results(output, result)
    for problem in problems[:20]:
        say(f"soak: {problem}")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    run_function(main)
