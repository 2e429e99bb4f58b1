"""The first thing a newcomer runs: the embedded model and its adapters, another one in every row."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.checkpoints import open_checkpoint
from flora_jax.errors import RunError
from flora_jax.models.family import ModelConfig
from flora_jax.peft.read import read_adapter
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Completion, Request, SamplingParams

# The same function's head in each language, by the name of its adapter.
PROMPTS = {
    "d": "int sum(int[] numbers)\n{\n",
    "perl": "sub sum {\n    my @numbers = @_;\n",
    "ruby": "def sum(numbers)\n",
    "rust": "fn sum(numbers: &[i32]) -> i32 {\n",
    "racket": "(define (sum numbers)\n",
    "swift": "func sum(_ numbers: [Int]) -> Int {\n",
    "lua": "local function sum(numbers)\n",
}
KINDS = ("flora", "lora", "ia3")


def shipped_adapters(assets: Path, config: ModelConfig) -> dict[str, ModelAdapter]:
    """The embedded adapters by ``kind/language``."""
    return {
        f"{kind}/{language}": read_adapter(
            assets / "adapters" / kind / language, config.projections(), config.n_layer
        )
        for kind in KINDS
        for language in PROMPTS
    }


def run_demo(assets: Path, *, language: str, max_tokens: int, seed: int) -> None:
    """Prints the completions side by side, the speed, and each row against itself alone.

    One batch: every language under the base and under its own FLoRA, and the prompt of ``language``
    under the other kinds as well.

    Raises:
        RunError: a row's tokens differ from those it has without company.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=0.7, seed=seed)
    console = Console()
    source = assets / "mini"
    opened = open_checkpoint(source)
    config, tokenizer = opened.config, opened.tokenizer
    model = opened.load("float32")
    assert tokenizer is not None
    adapters = shipped_adapters(assets, config)
    wanted = [
        (name, adapter)
        for name in PROMPTS
        for adapter in (None, *(f"{kind}/{name}" for kind in KINDS[: 3 if name == language else 1]))
    ]
    requests = [
        Request(tokenizer.encode(PROMPTS[name]).ids, params, adapter) for name, adapter in wanted
    ]
    longest = max(len(request.prompt_token_ids) for request in requests) + max_tokens
    engine = Engine(
        model,
        adapters,
        tokenizer=tokenizer,
        # A row alone has the bits it has among others only in one shape of its batch.
        options=EngineOptions(
            max_model_len=min(longest, config.n_positions), batch_invariant=True, seed=seed
        ),
    )
    started = time.perf_counter()
    completions = list(generate(engine, requests))
    first = time.perf_counter() - started
    started = time.perf_counter()
    again = list(generate(engine, requests))
    seconds = time.perf_counter() - started
    if [c.token_ids for c in again] != [c.token_ids for c in completions]:
        raise RunError("the same batch gave other tokens the second time")

    _show(console, dict(zip(wanted, completions, strict=True)), language)
    tokens = sum(len(c.token_ids) for c in completions)
    console.print(
        f"{len(requests)} rows of one batch, {len({name for _, name in wanted})} adapters (the base "
        f"among them), {tokens} tokens: {tokens / seconds:.0f} tokens/s; {first:.1f} s the first "
        "time, with compilation"
    )
    _check_alone(console, engine, requests, completions)


def _show(
    console: Console, found: Mapping[tuple[str, str | None], Completion], language: str
) -> None:
    def cell(name: str, adapter: str | None) -> Text:
        return Text((found[name, adapter].text or "").rstrip())

    wide = [Column(name, overflow="fold") for name in ("prompt", "base", "its FLoRA of rank 1")]
    table = Table("language", *wide, show_lines=True)
    for name, prompt in PROMPTS.items():
        table.add_row(name, Text(prompt.rstrip()), cell(name, None), cell(name, f"flora/{name}"))
    console.print(table)
    table = Table(f"{language} under", Column("completion", overflow="fold"), show_lines=True)
    for adapter in (None, *(f"{kind}/{language}" for kind in KINDS)):
        table.add_row(adapter or "no adapter", cell(language, adapter))
    console.print(table)
    console.print(
        "The embedded model has seen a few million tokens only: mind how the adapters change its text, "
        "not whether the text is right."
    )


def _check_alone(
    console: Console, engine: Engine, requests: list[Request], completions: list[Completion]
) -> None:
    same = sum(
        next(generate(engine, [request])).token_ids == completion.token_ids
        for request, completion in zip(requests, completions, strict=True)
    )
    console.print(f"{same} of {len(requests)} rows have the same tokens as when they run alone")
    if same < len(requests):
        raise RunError("a row's tokens depend on its neighbours")
