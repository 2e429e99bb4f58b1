"""``flora-jax info`` and ``flora-jax demo``: what a thing is, and what the program does."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_jax.cli.common import MODEL_HELP, prepare_jax
from flora_jax.errors import InputError
from flora_jax.shipped import ASSETS


def info(
    path: Annotated[str, typer.Argument(metavar="MODEL|ADAPTER_DIR", help=MODEL_HELP)],
) -> None:
    """Shows what a model or an adapter is: kind, parameters, bytes, targets, ranks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flora_jax.cli.info_rows import describe_rows

    table = Table(show_header=False, box=None)
    for name, value in describe_rows(path):
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 40,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every row.")] = 0,
    language: Annotated[
        str, typer.Option(help="Shown under every kind: d, perl, ruby, rust, racket, swift, lua.")
    ] = "lua",
) -> None:
    """Completes a prompt for each of seven languages in one batch, every row with its own adapter."""
    prepare_jax()
    from flora_jax.demo import PROMPTS, run_demo

    if language not in PROMPTS:
        raise InputError(f"--language is {language!r}, expected one of {', '.join(PROMPTS)}")
    run_demo(ASSETS, language=language, max_tokens=max_tokens, seed=seed)
