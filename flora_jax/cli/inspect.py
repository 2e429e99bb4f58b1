"""``flora-jax info`` and ``flora-jax demo``: what a thing is, and what the program does."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_jax.cli.common import MODEL_HELP, prepare_jax, source


def info(
    path: Annotated[str, typer.Argument(metavar="MODEL|ADAPTER_DIR", help=MODEL_HELP)],
) -> None:
    """Shows what a model or an adapter is: kind, parameters, bytes, targets, ranks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flora_jax.report import describe_rows

    table = Table(show_header=False, box=None)
    for name, value in describe_rows(source(path)):
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


def demo(
    max_tokens: Annotated[int, typer.Option(help="Tokens a row.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the sampled rows and the random adapters.")] = 0,
) -> None:
    """Runs the embedded model: one batch, another adapter in every row, each checked alone."""
    prepare_jax()
    from flora_jax.demo import run_demo

    run_demo(source("mini"), max_tokens=max_tokens, seed=seed)
