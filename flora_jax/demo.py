"""The first thing a newcomer runs: a model and its adapters, another one in every row."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.checkpoints import Opened, open_checkpoint
from flora_jax.errors import RunError
from flora_jax.peft.read import read_adapter
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import generate
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.request import Limits, Request, SamplingParams
from flora_jax.shipped import ASSETS, shipped_adapters

# The same function's head in each language, by the name of its adapter. None ends with a line's end: that
# is one token with the indentation behind it.
PROMPTS = {
    "d": "int sum(int[] numbers)\n{",
    "perl": "sub sum {\n    my @numbers = @_;",
    "ruby": "def sum(numbers)",
    "rust": "fn sum(numbers: &[i32]) -> i32 {",
    "racket": "(define (sum numbers)",
    "swift": "func sum(_ numbers: [Int]) -> Int {",
    "lua": "local function sum(numbers)",
}
# A beginning that says nothing of a language.
NEUTRAL = "read_file("
# What a model of one's own is asked: with a chat template, and without.
QUESTIONS = (
    "What is a rainbow? Answer in one sentence.",
    "Name three large rivers.",
    "Write a Python function that reverses a list.",
)
HEADS = ("def reverse(items):", "The three largest rivers are", "# Reads a file line by line.")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the batch: a prompt, its text as people read it, and how it is completed."""

    shown: str
    token_ids: tuple[int, ...]
    adapter: str | None
    temperature: float = 0.5


def run_embedded(*, language: str, max_tokens: int, seed: int) -> None:
    """Shows the embedded model: one prompt under every language's FLoRA, every language's own prompt
    under the base and its FLoRA, and that of ``language`` under all kinds that it has.

    Raises:
        RunError: see :func:`run_demo`.
    """
    opened = open_checkpoint(ASSETS / "mini")
    limits = _limits(opened)
    config = opened.config
    adapters = {
        name: read_adapter(ASSETS / "adapters" / name, config.projections(), config.n_layer)
        for name in shipped_adapters()
    }
    kinds = [name for name in adapters if name.endswith(f"/{language}")]
    asked = [(NEUTRAL, adapter) for adapter in (None, *(f"flora/{name}" for name in PROMPTS))]
    asked += [
        (PROMPTS[name], adapter)
        for name in PROMPTS
        for adapter in (None, *(kinds if name == language else [f"flora/{name}"]))
    ]
    rows = [
        # What a language's adapter makes likely shows without chance.
        Row(prompt, limits.encode(prompt), adapter, 0.0 if prompt == NEUTRAL else 0.5)
        for prompt, adapter in asked
    ]
    console = Console()
    with _batch(opened, adapters, rows, max_tokens, seed) as batch:
        texts = dict(zip(((r.shown, r.adapter) for r in rows), batch.texts(), strict=True))
        table = Table(f"{NEUTRAL} under", Column("completion", overflow="fold"), show_lines=True)
        for name in (None, *PROMPTS):
            adapter = None if name is None else f"flora/{name}"
            table.add_row(adapter or "no adapter", texts[NEUTRAL, adapter])
        console.print(table)
        wide = [Column(name, overflow="fold") for name in ("prompt", "base", "its FLoRA of rank 1")]
        table = Table("language", *wide, show_lines=True)
        for name, prompt in PROMPTS.items():
            own = (texts[prompt, adapter] for adapter in (None, f"flora/{name}"))
            table.add_row(name, Text(prompt.rstrip()), *own)
        console.print(table)
        table = Table(f"{language} under", Column("completion", overflow="fold"), show_lines=True)
        for adapter in (None, *kinds):
            table.add_row(adapter or "no adapter", texts[PROMPTS[language], adapter])
        console.print(table)
        console.print(
            "The embedded model has six million parameters: mind how the adapters change its text, not "
            "whether the text is right."
        )
        batch.report(console)


def run_demo(
    opened: Opened,
    adapters: Mapping[str, ModelAdapter],
    prompts: Sequence[str],
    *,
    max_tokens: int,
    seed: int,
    dtype: str | None,
) -> None:
    """Shows any model: every prompt under the base and under every adapter, all in one batch.

    Args:
        opened: the model; where it has a chat template a prompt is what a user says.
        adapters: by name.
        prompts: texts; without any, some of :data:`QUESTIONS` or :data:`HEADS`.
        max_tokens: of a row.
        seed: of every row.
        dtype: of the weights; ``None`` is the checkpoint's own.

    Raises:
        InputError: the model has no tokenizer, or a prompt does not fit its context.
        RunError: a row's tokens differ from those it has without company.
    """
    chats = opened.chat.template is not None
    limits = _limits(opened)

    def encode(prompt: str) -> tuple[int, ...]:
        if chats:
            return limits.encode_messages([{"role": "user", "content": prompt}])
        return limits.encode(prompt)

    rows = [
        Row(prompt, encode(prompt), adapter)
        for prompt in prompts or (QUESTIONS if chats else HEADS)
        for adapter in (None, *adapters)
    ]
    for row in rows:
        limits.check(Request(row.token_ids))
    console = Console()
    with _batch(opened, adapters, rows, max_tokens, seed, dtype) as batch:
        wide = [Column(name, overflow="fold") for name in ("prompt", "completion")]
        table = Table(wide[0], "adapter", wide[1], show_lines=True)
        for row, text in zip(rows, batch.texts(), strict=True):
            table.add_row(Text(row.shown.rstrip()), row.adapter or "none", text)
        console.print(table)
        batch.report(console)


def _limits(opened: Opened) -> Limits:
    config = opened.config
    return Limits(config.n_positions, config.vocab_size, opened.tokenizer, opened.chat)


def _batch(
    opened: Opened,
    adapters: Mapping[str, ModelAdapter],
    rows: Sequence[Row],
    max_tokens: int,
    seed: int,
    dtype: str | None = "float32",
) -> Batch:
    requests = [
        Request(
            row.token_ids,
            SamplingParams(max_tokens=max_tokens, temperature=row.temperature, seed=seed),
            row.adapter,
        )
        for row in rows
    ]
    longest = max(request.reach for request in requests)
    # A row alone has the bits it has among others only in one shape of its batch.
    options = EngineOptions(
        max_model_len=min(longest, opened.config.n_positions), batch_invariant=True, seed=seed
    )
    model = opened.load(dtype)
    return Batch(Engine(model, adapters, tokenizer=opened.tokenizer, options=options), requests)


class Batch:
    """The requests, completed together twice: the second time without compilation."""

    def __init__(self, engine: Engine, requests: list[Request]):
        self._engine, self._requests = engine, requests
        started = time.perf_counter()
        self._completions = list(generate(engine, requests))
        self._first_s = time.perf_counter() - started
        started = time.perf_counter()
        again = list(generate(engine, requests))
        self._seconds = time.perf_counter() - started
        if [c.token_ids for c in again] != [c.token_ids for c in self._completions]:
            raise RunError("the same batch gave other tokens the second time")

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def texts(self) -> list[Text]:
        """The completions, for a table."""
        return [Text((one.text or "").rstrip()) for one in self._completions]

    def report(self, console: Console) -> None:
        """Prints the speed, and each row against itself alone.

        Raises:
            RunError: a row's tokens differ from those it has without company.
        """
        tokens = sum(len(one.token_ids) for one in self._completions)
        count = len(self._requests)
        console.print(
            f"{count} rows of one batch, {len({one.adapter for one in self._requests})} adapters (the "
            f"base among them), {tokens} tokens: {tokens / self._seconds:.0f} tokens/s; "
            f"{self._first_s:.1f} s the first time, with compilation"
        )
        same = sum(
            next(generate(self._engine, [request])).token_ids == completion.token_ids
            for request, completion in zip(self._requests, self._completions, strict=True)
        )
        console.print(f"{same} of {count} rows have the same tokens as when they run alone")
        if same < count:
            raise RunError("a row's tokens depend on its neighbours")
