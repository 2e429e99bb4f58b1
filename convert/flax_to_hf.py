"""Converts an orbax directory of a StarCoder into Hugging Face files that transformers loads.

    python convert/flax_to_hf.py SOURCE OUTPUT [--dtype bfloat16]

SOURCE is a directory of convert/hf_to_flax.py (or anything else that load_model takes). OUTPUT must be
new or empty; it appears only when it is whole. Tokenizer files are copied along. A bad input ends with
one line on stderr and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flora_jax.checkpoints.checkpoint import load_model, save_hf
from flora_jax.checkpoints.sources import resolve
from flora_jax.cli.program import run_function
from flora_jax.files import require_new


def main(
    source: Annotated[str, typer.Argument(help="A directory or a hub id.")],
    output: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; SOURCE's own by default.")
    ] = None,
) -> None:
    """Convert a StarCoder into Hugging Face files (config.json and safetensors)."""
    require_new(output)
    directory = resolve(source)
    save_hf(load_model(directory, dtype), output, companions=directory)


if __name__ == "__main__":
    run_function(main)
