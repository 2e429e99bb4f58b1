"""The ``flora-jax`` program: a verb per job. Heavy imports happen inside the verbs."""

from __future__ import annotations

import signal
import sys

import typer

from flora_jax.cli import bench, bench_serving, evaluate
from flora_jax.cli.generate import generate
from flora_jax.cli.inspect import demo, info
from flora_jax.cli.train import train
from flora_jax.errors import InputError, RunError

app = typer.Typer(
    name="flora-jax",
    help="One base model, a different low-rank adapter for every request of a batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _verb in (generate, train, info, demo):
    app.command()(_verb)
bench.app.command()(bench_serving.throughput)
bench.app.command()(bench_serving.latency)
app.add_typer(bench.app)
app.add_typer(evaluate.app)


def main() -> None:
    """The entry point: bad input ends in one line on stderr and exit code 2, a failed run in 1."""
    # As an exception, so that nothing half written is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = app(standalone_mode=False)
    except (InputError, OSError) as error:
        _fail(str(error))
    except RunError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # Usage errors of the command line carry their message this way.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if not message():  # No verb at all: the help is on the screen.
            sys.exit(2)
        _fail(message())
    sys.exit(code or 0)


def _fail(message: str, code: int = 2) -> None:
    print(f"flora-jax: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
