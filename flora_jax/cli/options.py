"""A command whose parameters are the fields of a dataclass, so that one object holds what was given."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

Options = TypeVar("Options")


def takes(
    options: Callable[..., Options],
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Makes a command for typer of a function of one instance of the dataclass ``options``.

    A field is annotated as a parameter would be: ``Annotated[int | None, typer.Option(help=...)]``.
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
    ]

    def made(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(options(**values))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return made


def spelt_out(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line in which ``--option a b c``, as argparse takes it, has the option for each value."""
    found: list[str] = []
    last: str | None = None
    for word in words:
        if word.startswith("-"):
            last = word if word in options else None
        elif last is not None and found[-1] != last:
            found.append(last)
        found.append(word)
    return found
