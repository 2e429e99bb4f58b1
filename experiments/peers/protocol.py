"""What a contender's program and the runner say to each other: one JSON object a line.

A program answers "ready" with its versions and its checks, then one round for every line such as
``{"round": 2, "batch": 16}`` on standard input, until that ends. With ``--rounds N`` it does N rounds
for each batch by itself. Only the standard library is used: a contender may have a Python of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Names = Sequence[str | None]
# Prompts, the name of an adapter (or none) for each, and how many tokens to draw greedily for each.
Generate = Callable[[list[list[int]], Names, int], list[list[int]]]
CHECKED_TOKENS, CHECKED_ROWS = 8, 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What every program is started with; ``adapters`` by name, one for each row: folders, until a
    program puts what it made of them.
    """

    model: Path
    adapters: dict[str, Any]
    batches: tuple[int, ...]
    prompt_len: int
    new_tokens: int
    rounds: int
    max_model_len: int
    max_batched_tokens: int
    rest: argparse.Namespace

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.model / "config.json").read_text())

    def prompts(self, number: int, rows: int) -> list[list[int]]:
        """The prompts of a round: random tokens, the same for all, others in every round. A round reads
        them twice, so that contenders have to switch off their caches of prefixes.
        """
        draw = random.Random(number)
        last = self.config["vocab_size"] - 1
        return [[draw.randint(1, last) for _ in range(self.prompt_len)] for _ in range(rows)]

    def names(self, rows: int) -> Names:
        """A different adapter for every row, or none for all."""
        if not self.adapters:
            return [None] * rows
        if len(self.adapters) < rows:
            raise ValueError(f"{len(self.adapters)} adapters, {rows} rows each need their own")
        return list(self.adapters)[:rows]


def read_options(argv: Sequence[str] | None = None, **extra: dict[str, Any]) -> Options:
    """The command line; ``extra`` are arguments of one program, given to argparse."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, help="folder of adapter folders; none: the base")
    parser.add_argument("--batch", default="16", help="rows, or several as 1,16,32")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=0, help="0: one for every line on stdin")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    for name, settings in extra.items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args(argv)
    batches = tuple(int(rows) for rows in args.batch.split(","))
    folders = sorted(args.adapters.iterdir()) if args.adapters else []
    return Options(
        model=args.model,
        adapters={path.name: path for path in folders[: max(batches)]},
        batches=batches,
        prompt_len=args.prompt_len,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        max_model_len=max(args.max_model_len, args.prompt_len + args.new_tokens),
        max_batched_tokens=max(args.max_batched_tokens, args.max_model_len),
        rest=args,
    )


def claim_stdout() -> Callable[[dict[str, Any]], None]:
    """A function that writes a JSON line to standard output, which libraries lose: theirs goes to
    standard error. To be called before they are imported.
    """
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=own, flush=True)

    return say


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def serve_rounds(
    say: Callable[[dict[str, Any]], None],
    options: Options,
    about: dict[str, Any],
    measure: Callable[[int, int], dict[str, Any]],
) -> None:
    """Says that it is ready, then answers each line with ``measure(round, batch)``."""
    say({"ready": True, **about})
    for number, rows in _asked(options):
        say({"round": number, "batch": rows, **measure(number, rows)})


def _asked(options: Options) -> Iterator[tuple[int, int]]:
    if options.rounds:
        yield from ((n, rows) for n in range(options.rounds) for rows in options.batches)
        return
    for line in sys.stdin:
        asked = json.loads(line)
        yield asked["round"], asked["batch"]


def serve_generation(
    say: Callable[[dict[str, Any]], None],
    options: Options,
    packages: dict[str, str],
    generate: Generate,
    alone: Generate | None = None,
    weights: str = "float32",
) -> None:
    """Serves rounds of a generator, after its checks and a first, unmeasured round of each batch;
    ``weights`` says how it holds the model's.

    A round draws one token for every row, which is the prefill, and then ``new_tokens`` from the same
    prompts: what the second takes longer is the decoding of all tokens but the first. One method for
    all, since not all tell when the first token was there.
    """
    about: dict[str, Any] = {"versions": packages, "weights": weights}
    about["checks"] = check(options, generate, alone)
    for rows in options.batches:
        for length in (1, options.new_tokens):
            generate(options.prompts(-1, rows), options.names(rows), length)

    def measure(number: int, rows: int) -> dict[str, Any]:
        prompts, names = options.prompts(number, rows), options.names(rows)
        seconds = []
        # A process that had to wait for a minute finds its memory cold, which no server in use does.
        generate(options.prompts(-1, rows), names, 1)
        for length in (1, options.new_tokens):
            started = time.perf_counter()
            tokens = generate(prompts, names, length)
            seconds.append(time.perf_counter() - started)
            found = {len(row) for row in tokens}
            assert found == {length}, f"{found} tokens a row, expected {length}"
        return {"prefill_seconds": seconds[0], "total_seconds": seconds[1], "tokens": tokens}

    serve_rounds(say, options, about, measure)


def check(options: Options, generate: Generate, alone: Generate | None) -> dict[str, Any]:
    """Whether adapters act, and a row's tokens are those it gets by itself (``alone``, which may be
    another way than ``generate`` to the same).

    Raises:
        RuntimeError: an adapter answers as the base model or as another adapter.
    """
    found: dict[str, Any] = {}
    prompts = options.prompts(-2, max(options.batches))
    if options.adapters:
        names: Names = [None, *options.adapters]
        base, *adapted = generate([prompts[0]] * len(names), names, CHECKED_TOKENS)
        as_base = sum(tokens == base for tokens in adapted)
        distinct = len({tuple(tokens) for tokens in adapted})
        found = {"adapters": len(adapted), "distinct": distinct, "as_base": as_base}
        if as_base or distinct < len(adapted):
            raise RuntimeError(
                f"of {len(adapted)} adapters {as_base} answer as the base model, "
                f"{distinct} are distinct"
            )
    names = options.names(len(prompts))
    mixed = generate(prompts, names, CHECKED_TOKENS)[:CHECKED_ROWS]
    single = [
        (alone or generate)([prompt], [name], CHECKED_TOKENS)[0]
        for prompt, name in zip(prompts[:CHECKED_ROWS], names)
    ]
    found["rows_alone"] = len(mixed)
    found["rows_alone_equal"] = sum(a == b for a, b in zip(mixed, single))
    return found


def run(program: Callable[[Callable[[dict[str, Any]], None]], None]) -> None:
    """Runs a program; says what ended it before it was ready or in a round."""
    say = claim_stdout()
    try:
        program(say)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
