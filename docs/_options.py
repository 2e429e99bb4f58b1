"""A hook of mkdocs: tables of options from the options themselves, and links that leave the site.

A line ``<!-- options: generate -->`` in a page becomes the table of that command's arguments and
options. A link to a file of the repository outside ``docs/`` becomes its text and path: the site does
not have the file.
"""

from __future__ import annotations

import re
from typing import Any

_MARK = re.compile(r"^<!-- options: ([a-z0-9 -]+) -->$", re.MULTILINE)
_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+((?:experiments|flora_jax|examples|CHANGELOG|CONTRIBUTING)[^)]*)\)"
)


def command_of(words: str) -> Any:
    """The command that ``flora-jax WORDS`` runs.

    Raises:
        KeyError: there is none of that name.
    """
    import typer.main

    from flora_jax.cli import app

    command: Any = typer.main.get_command(app)
    for word in words.split():
        command = command.commands[word]
    return command


def table(words: str) -> str:
    """A Markdown table: how an option is written, what it does, and its default."""
    lines = ["| option | meaning | default |", "|---|---|---|"]
    for parameter in command_of(words).params:
        names = [*parameter.opts, *parameter.secondary_opts]
        written = parameter.metavar or parameter.name.upper()
        if parameter.param_type_name == "argument":
            names = [written]
        elif not getattr(parameter, "is_flag", False):
            names[-1] += f" {written}"
        default = parameter.default
        shown = "" if default is None or callable(default) or default is False else f"`{default}`"
        help_text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
        spelled = ", ".join(names).replace("|", "\\|")
        lines.append(f"| `{spelled}` | {help_text} | {shown} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    markdown = _OUTSIDE.sub(r"\1 (`\2`)", markdown)
    return _MARK.sub(lambda found: table(found[1]), markdown)
