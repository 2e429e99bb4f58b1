"""The ``flora-jax`` program: a verb per job. Heavy imports happen inside the verbs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flora_jax import __version__
from flora_jax.cli import bench, bench_http, bench_serving, evaluate, program
from flora_jax.cli.common import cache_directory
from flora_jax.cli.convert import convert
from flora_jax.cli.convert_adapter import convert_adapter
from flora_jax.cli.generate import generate
from flora_jax.cli.inspect import demo, info
from flora_jax.cli.options import spelt_out
from flora_jax.cli.plan import plan
from flora_jax.cli.serve import serve
from flora_jax.cli.train import train
from flora_jax.xla_flags import keep_from_missing_gpu, set_flags

NAME = "flora-jax"
# Options that take several values, as in vLLM.
_SEVERAL = ("--lora-modules", "--goodput")
app = program.new_app(
    name=NAME,
    no_args_is_help=True,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """One base model, a different low-rank adapter for every request of a batch."""


for _verb in (generate, serve, train, convert, convert_adapter, info, demo, plan):
    app.command()(_verb)
bench.app.command()(bench_serving.throughput)
bench.app.command()(bench_serving.latency)
bench.app.command()(bench_http.serve)
app.add_typer(bench.app)
app.add_typer(evaluate.app)


def main() -> None:
    """The entry point."""
    sys.argv[1:] = spelt_out(sys.argv[1:], _SEVERAL)
    keep_from_missing_gpu()
    set_flags(cache_directory())
    program.run(app, NAME)
