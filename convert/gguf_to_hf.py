"""Converts a GGUF file, llama.cpp's format, into Hugging Face's files, which this package loads.

    python convert/gguf_to_hf.py FILE.gguf OUTPUT [--dtype bfloat16]

The same as ``flora-jax convert FILE.gguf OUTPUT --to hf``; needs the extra ``gguf``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flora_jax.checkpoints.gguf import convert_gguf
from flora_jax.cli.program import run_function


def main(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    output: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; float32 by default where it is quantised."
        ),
    ] = None,
) -> None:
    """Converts a GGUF file into Hugging Face's files."""
    convert_gguf(file, output, dtype)


if __name__ == "__main__":
    run_function(main)
