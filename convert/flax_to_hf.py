"""Converts a model into Hugging Face's files, which transformers loads.

    python convert/flax_to_hf.py MODEL OUTPUT [--dtype bfloat16]

The same as ``flora-jax convert MODEL OUTPUT --to hf``.
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
    """Converts a model into Hugging Face's files."""
    convert(source, output, "hf", dtype)


if __name__ == "__main__":
    run_function(main)
