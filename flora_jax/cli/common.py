"""What several verbs of the program share: named directories, progress, XLA's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora_jax.errors import InputError
from flora_jax.shipped import adapter_source
from flora_jax.terminal import say as say

if TYPE_CHECKING:
    from flora_jax.adapters.model_adapter import ModelAdapter

MODEL_HELP = "Hugging Face directory, converted directory, hub id, or 'mini' (embedded)."
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]


def named_values(values: list[str], option: str, form: str = "NAME=PATH") -> dict[str, str]:
    """The values of an option that is repeated as ``form``, as they were written."""
    named: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise InputError(f"--{option} is {value!r}, expected {form}")
        if name in named:
            raise InputError(f"--{option} {name}: the name is given twice")
        named[name] = path
    return named


def named_paths(values: list[str], option: str, form: str = "NAME=PATH") -> dict[str, Path]:
    """The same as paths."""
    return {name: Path(path) for name, path in named_values(values, option, form).items()}


def named_adapters(values: list[str], form: str = "NAME=DIR") -> dict[str, Path]:
    """The folders of ``--adapter NAME=DIR``, where DIR may be the name of a shipped adapter."""
    paths = named_paths(values, "adapter", form)
    return {name: adapter_source(path) for name, path in paths.items()}


def read_adapters(directories: Mapping[str, Path], config: Any) -> dict[str, ModelAdapter]:
    from flora_jax.peft.read import read_adapter

    return {
        name: read_adapter(directory, config.projections(), config.n_layer)
        for name, directory in directories.items()
    }


def dtype_of(name: str | None) -> str | None:
    """``None`` stands for the checkpoint's own; a CPU computes 16 bits slower than 32."""
    import jax

    if name is None and jax.default_backend() == "cpu":
        return "float32"
    return name


def prepare_jax() -> None:
    """Keeps compiled programs between runs, and what a GPU's autotuning found for them, unless the user
    has chosen a place.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))


def cache_directory() -> Path:
    """Where the program keeps what it can make again."""
    # An empty variable is none: https://specifications.freedesktop.org/basedir-spec/latest/
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flora_jax"


@contextmanager
def compiling() -> Iterator[Callable[[str, int, int], None]]:
    """Says on standard error how many programs are compiled, of how many, and which; gone at the end."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("compiling") as status:
        yield lambda name, done, total: status.update(
            f"compiling {min(done + 1, total)} of {total}: {name}"
        )
