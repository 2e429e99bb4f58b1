"""Converts Hugging Face's files of a model into an orbax directory that loads straight into its place.

    python convert/hf_to_flax.py MODEL OUTPUT [--dtype bfloat16]

The same as ``flora-jax convert MODEL OUTPUT --to flax``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flora_jax.cli.convert import convert
from flora_jax.cli.program import run_function


def main(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A directory or a hub id.")],
    output: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; MODEL's own by default.")
    ] = None,
) -> None:
    """Converts Hugging Face's files into an orbax directory."""
    convert(source, output, "flax", dtype)


if __name__ == "__main__":
    run_function(main)
