"""Many samples of a prompt, with and without shared prefixes: what MultiPL-E's evaluation gains.

    python experiments/prefix_sharing.py
    python experiments/prefix_sharing.py --problems DATA/humaneval-lua.jsonl --tokenizer tokenizer.json

The model has tiny_starcoder_py's shape (164M) with random weights, float32, under a FLoRA of rank 4: of
several components, so that a prompt costs more than under the base. ``--samples`` of each of
``--prompts`` prompts, all there at once, as ``flora-jax evaluate generate`` asks for them; a prompt has
``--prompt-len`` random tokens, or is one of ``--problems``. Engines with ``prefix_caching`` on and off
take turns in an order drawn anew each round; medians, and the least and the largest ratio. Prompts differ
from round to round, so nothing of a round helps the next.

Receipt: `--prompts 1 --problems DATA/humaneval-lua.jsonl --tokenizer tokenizer.json`, 12 minutes on 2
cores of an Intel Xeon at 2.5 GHz.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import typer

from flora_jax.adapters.model_adapter import init_adapter, randomise
from flora_jax.bench.receipts.machine import receipt
from flora_jax.cli.program import run_function
from flora_jax.models.family import presets
from flora_jax.models.model import init_model
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Request, SamplingParams

RESULTS = Path(__file__).parent / "results" / "prefix_sharing.json"
WAYS = {"shared": True, "each its own": False}


def main(
    preset_name: Annotated[str, typer.Option("--preset")] = "164m",
    prompts: Annotated[int, typer.Option(help="Prompts of a round.")] = 2,
    samples: int = 100,
    prompt_len: int = 200,
    max_tokens: int = 64,
    rows: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    rounds: int = 5,
    problems: Annotated[
        Path | None, typer.Option(help="MultiPL-E's, a JSON object a line.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of --problems.")] = None,
    results: Path = RESULTS,
) -> None:
    """Measures, prints, and writes the results."""
    config = presets()[preset_name]
    model = init_model(config, 0)
    start = init_adapter(jax.random.key(0), "flora", config.projections(), config.n_layer, rank=4)
    adapters = {"flora": randomise(start, 1)}
    texts = list(read_problems(problems, tokenizer))
    longest = max((*map(len, texts), prompt_len))
    engines = {}
    for name, caching in WAYS.items():
        options = EngineOptions(
            max_num_seqs=rows, max_model_len=longest + max_tokens, row_buckets=(rows,),
            prefix_caching=caching,
        )  # fmt: skip
        engines[name] = Engine(model, adapters, options=options)
        engines[name].warm_up()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    drawn = 0
    rng = random.Random(0)
    for number in range(rounds):
        asked = []
        for place in range(prompts):
            ids = [rng.randrange(config.vocab_size) for _ in range(prompt_len)]
            if texts:
                ids = texts[(number * prompts + place) % len(texts)]
            asked += [
                Request(ids, SamplingParams(max_tokens, 0.8, top_p=0.95, ignore_eos=True), "flora")
                for _ in range(samples)
            ]
        for name in rng.sample([*WAYS], len(WAYS)):
            started = time.perf_counter()
            found = list(generate(engines[name], asked))
            seconds[name].append(time.perf_counter() - started)
            drawn = sum(len(completion.token_ids) for completion in found)
            print(
                f"round {number + 1}, {name}: {drawn / seconds[name][-1]:.1f} tokens/s", flush=True
            )
    ratios = [alone / shared for shared, alone in zip(seconds["shared"], seconds["each its own"])]
    stats = engines["shared"].stats
    found_ = {
        **receipt(),
        "tokens_per_second": {n: drawn / statistics.median(s) for n, s in seconds.items()},
        "speed_up": statistics.median(ratios), "speed_up_range": [min(ratios), max(ratios)],
        "prompt_tokens_shared": stats.prefix_hits / stats.prefix_queries,
        "seconds": seconds,
    }  # fmt: skip
    results.write_text(json.dumps(found_, indent=1) + "\n")
    print(json.dumps(found_, indent=1))


def read_problems(problems: Path | None, tokenizer: Path | None) -> Iterator[list[int]]:
    """The prompts' tokens."""
    if problems is None:
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(tokenizer))
    for line in problems.read_text().splitlines():
        yield own.encode(json.loads(line)["prompt"]).ids


if __name__ == "__main__":
    run_function(main)
