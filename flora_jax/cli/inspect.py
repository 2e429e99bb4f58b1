"""``flora-jax info`` and ``flora-jax demo``: what a thing is, and what the program does."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_jax.cli.common import (
    MODEL_HELP,
    dtype_of,
    named_adapters,
    prepare_jax,
    read_adapters,
)
from flora_jax.errors import InputError
from flora_jax.shipped import ASSETS, model_source


def info(
    path: Annotated[str, typer.Argument(metavar="MODEL|ADAPTER_DIR", help=MODEL_HELP)],
) -> None:
    """Shows what a model, an adapter or a training run is: kind, parameters, bytes, targets, ranks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flora_jax.cli.info_rows import describe_rows

    table = Table(show_header=False, box=None)
    for name, value in describe_rows(path):
        # A long path is folded: its end is what tells it from others.
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    Console().print(table)


def demo(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "mini",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter, or a shipped one; may be repeated."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What a user says, or a text to go on with; may be repeated."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 40,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every row.")] = 0,
    language: Annotated[
        str | None,
        typer.Option(
            help="Of 'mini' alone: shown under every kind: d, perl, ruby, rust, racket, swift, lua. "
            "Default lua."
        ),
    ] = None,
) -> None:
    """Completes every prompt under the base and under each adapter, all in one batch.

    Without adapters and prompts 'mini' shows seven languages, every row with its own shipped adapter.
    """
    prepare_jax()
    from flora_jax import demo

    if language is not None and language not in demo.PROMPTS:
        raise InputError(f"--language is {language!r}, expected one of {', '.join(demo.PROMPTS)}")
    if model_source(model) == str(ASSETS / "mini") and not (adapter or prompt):
        demo.run_embedded(language=language or "lua", max_tokens=max_tokens, seed=seed)
        return
    if language is not None:
        raise InputError(
            f"--language is {language!r}, which is of 'mini' without --adapter or --prompt"
        )
    from flora_jax.checkpoints import open_checkpoint

    opened = open_checkpoint(model)
    adapters = read_adapters(named_adapters(adapter or []), opened.config)
    demo.run_demo(
        opened, adapters, prompt or (), max_tokens=max_tokens, seed=seed, dtype=dtype_of(None)
    )
