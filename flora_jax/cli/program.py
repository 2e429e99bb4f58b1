"""How a program ends: bad input in one line on stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from flora_jax.errors import InputError, RunError


def new_app(**options: Any) -> typer.Typer:
    """An app for :func:`run`."""
    # Plain help: drawing it with rich would take longer than everything else about it.
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]}, **options,
    )  # fmt: skip


def run(app: typer.Typer, name: str) -> NoReturn:
    """Runs the command line: bad input ends in one line and exit code 2, a failed run in 1."""
    # As an exception, so that nothing half written is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = app(standalone_mode=False)
    except (InputError, OSError) as error:
        _fail(name, str(error), 2)
    except RunError as error:
        _fail(name, str(error), 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # Usage errors of the command line carry their message this way.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # No verb at all: its message is the help.
            print(message())
            sys.exit(2)
        _fail(name, message().removesuffix(".") + _given(error), 2)
    sys.exit(code or 0)


def _given(error: Exception) -> str:
    """What the command line has for the option that an error is about."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for place, word in enumerate(sys.argv):
        option, equals, value = word.partition("=")
        if option in names and (equals or place + 1 < len(sys.argv)):
            return f", found {value if equals else sys.argv[place + 1]!r}"
    return ""


def run_function(function: Callable[..., None]) -> NoReturn:
    """The same for a script whose arguments are the function's."""
    app = new_app()
    app.command()(function)
    run(app, Path(sys.argv[0]).stem)


def _fail(name: str, message: str, code: int) -> NoReturn:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
