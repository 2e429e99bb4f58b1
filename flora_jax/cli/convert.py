"""``flora-jax convert``: a model between Hugging Face's files, our orbax directories and GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flora_jax.cli.common import MODEL_HELP
from flora_jax.errors import InputError
from flora_jax.files import require_new

Layout = Literal["hf", "flax"]
# As a checkpoint's description has them.
_FORMATS: dict[Layout, str] = {"hf": "safetensors", "flax": "orbax"}
_TITLES: dict[Layout, str] = {"hf": "Hugging Face files", "flax": "a converted directory (orbax)"}


def convert(
    source: Annotated[
        str, typer.Argument(metavar="MODEL|FILE.gguf", help=f"{MODEL_HELP[:-1]}; or a GGUF file.")
    ],
    output: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
    to: Annotated[
        Layout,
        typer.Option(help="hf: config.json with safetensors; flax: an orbax directory."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; MODEL's own by default.")
    ] = None,
) -> None:
    """Writes a model in another layout, bit for bit, or in another dtype; its tokenizer goes along.

    A GGUF file (extra 'gguf') becomes Hugging Face files, by default in float32 where it is quantised.
    """
    from flora_jax.checkpoints.checkpoint import open_checkpoint, save_hf, save_orbax
    from flora_jax.checkpoints.describe import parameter_dtype
    from flora_jax.checkpoints.gguf import convert_gguf, is_gguf

    require_new(output)
    if is_gguf(source):
        if to != "hf":
            raise InputError(f"{source}: a GGUF file becomes {_TITLES['hf']} first: --to hf")
        convert_gguf(source, output, dtype)
        return
    opened = open_checkpoint(source)
    changes = parameter_dtype(dtype, opened.config).name != opened.config.dtype
    # A shipped model's directory is nothing that a user knows.
    if Path(source).exists() and opened.format == _FORMATS[to] and not changes:
        other: Layout = "flax" if to == "hf" else "hf"
        raise InputError(
            f"{source}: is {_TITLES[to]} in {opened.config.dtype} already; for {_TITLES[other]}: "
            f"flora-jax convert {source} {output} --to {other}"
        )
    model = opened.load(dtype)
    save = save_hf if to == "hf" else save_orbax
    save(model, output, companions=opened.directory)
