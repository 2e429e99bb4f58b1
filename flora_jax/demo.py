"""The first thing a newcomer runs: the embedded model, one batch, another adapter in every row."""

from __future__ import annotations

import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flora_jax.adapters.model_adapter import ModelAdapter, init_adapter, randomise
from flora_jax.serve.generate import Generator
from flora_jax.serve.request import Defaults, parse_request
from flora_jax.serve.tokenizer import load_tokenizer
from flora_jax.starcoder.checkpoint import load_model
from flora_jax.starcoder.config import StarCoderConfig

PROMPTS = (
    "def read_lines(path):\n",
    'class Stack:\n    """A last-in, first-out list."""\n\n    def push(self, item):\n',
)
_SHAPES = (
    ("lora", 8, ("attn.c_attn",)),
    ("flora", 1, ("attn.c_attn",)),
    ("flora", 8, ("attn.c_attn", "mlp.c_fc")),
    ("ia3", 1, ("attn.c_attn", "mlp.c_proj")),
    ("hira", 4, ("attn.c_attn", "attn.c_proj")),
)


def random_adapters(config: StarCoderConfig, seed: int) -> dict[str, ModelAdapter]:
    """Untrained adapters of every kind, named as what they are."""
    adapters = {}
    for number, (kind, rank, targets) in enumerate(_SHAPES):
        fresh = init_adapter(
            jax.random.key(seed),
            kind,
            config.projections(),
            config.n_layer,
            rank=rank,
            targets=targets,
        )
        name = f"random-{kind}" + ("" if kind == "ia3" else f"-r{rank}")
        adapters[name] = randomise(fresh, seed + number, spread=0.2)
    return adapters


def run_demo(source: str, *, max_tokens: int, seed: int) -> None:
    """Prints the completions side by side, the speed, and each row against itself alone.

    Raises:
        RuntimeError: a row's tokens differ from those it has without company.
    """
    console = Console()
    model = load_model(source, "float32")
    config = model.config
    tokenizer = load_tokenizer(Path(source), config.vocab_size)
    adapters = random_adapters(config, seed)
    generator = Generator(model, adapters, tokenizer=tokenizer, seed=seed)
    names: list[str | None] = [None, *adapters]
    wanted = [(prompt, name) for prompt in PROMPTS for name in names]
    requests = [
        parse_request(
            {"prompt": prompt, "seed": seed} | ({"adapter": name} if name else {}),
            index,
            tokenizer,
            frozenset(adapters),
            config.vocab_size,
            config.n_positions,
            Defaults(max_tokens=max_tokens, temperature=0.7),
        )
        for index, (prompt, name) in enumerate(wanted)
    ]
    started = time.perf_counter()
    completions = list(generator.generate(requests))
    first = time.perf_counter() - started
    started = time.perf_counter()
    again = list(generator.generate(requests))
    seconds = time.perf_counter() - started
    if [c.token_ids for c in again] != [c.token_ids for c in completions]:
        raise RuntimeError("the same batch gave other tokens the second time")

    table = Table(
        "adapter", *(prompt.splitlines()[0] + " ..." for prompt in PROMPTS), show_lines=True
    )
    for number, name in enumerate(names):
        cells = [completions[number + p * len(names)].text or "" for p in range(len(PROMPTS))]
        table.add_row(name or "none (base)", *(Text(cell.rstrip()) for cell in cells))
    console.print(table)
    console.print(
        "One seed for all rows; the embedded model is tiny and the adapters are random, so the text "
        "shows the machinery only."
    )
    tokens = sum(len(c.token_ids) for c in completions)
    console.print(
        f"{len(requests)} rows, {len(names)} adapters (the base among them), {tokens} tokens: "
        f"{tokens / seconds:.0f} tokens/s; {first:.1f} s the first time, with compilation"
    )
    shape = generator.shape(requests)
    same = sum(
        next(generator.generate([request], shape=shape)).token_ids == completion.token_ids
        for request, completion in zip(requests, completions, strict=True)
    )
    console.print(f"{same} of {len(requests)} rows have the same tokens as when they run alone")
    if same < len(requests):
        raise RuntimeError("a row's tokens depend on its company")
