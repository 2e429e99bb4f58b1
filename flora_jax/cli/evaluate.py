"""``flora-jax evaluate``: MultiPL-E, from generations to tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flora_jax.cli.common import Overwrite, named_paths
from flora_jax.cli.multipl_e import Root, Unsafe, multipl_e
from flora_jax.errors import InputError
from flora_jax.files import require_file, require_new, whole_file
from flora_jax.terminal import say

app = typer.Typer(
    name="evaluate",
    help="MultiPL-E in seven languages: generated programs are run in a sandbox.",
    no_args_is_help=True,
)

app.command("multipl-e")(multipl_e)


@app.command()
def doctor(unsafe: Unsafe = False, root: Root = Path("/")) -> None:
    """Says which toolchains are there, in which version, and how to install the others.

    Ends with 1 where no program can be run safely. The seconds are what a program may compute and sleep,
    step by step; time in which it waits for a core is not counted.
    """
    from flora_jax.evaluate.doctor import describe_user, examine
    from flora_jax.sandbox.sandbox import Sandbox

    report = examine(Sandbox(str(root), unsafe))
    if report.trouble:
        print(report.trouble)
    elif unsafe:
        print("no sandbox, as asked for: programs run with your own rights")
    else:
        print(f"sandbox: bubblewrap works ({describe_user()})")
    for one in report.findings:
        print(
            f"{one.name:<8}{one.state:<9}{one.seconds:<12}{one.version:<14}{one.path or one.advice}"
        )
        if one.path and one.advice:
            print(f"{'':<17}{one.advice}")
    if report.install:
        print(f"on Debian: {report.install}")
    if report.trouble:
        raise typer.Exit(1)


@app.command()
def export(
    generations: Annotated[Path, typer.Argument(help="A file of generations.")],
    output: Annotated[Path, typer.Option(help="New directory.")],
    overwrite: Overwrite = False,
) -> None:
    """Writes generations as bigcode-evaluation-harness loads them, a file a language."""
    from flora_jax.evaluate.completions import export_bigcode, read_generations

    require_new(output, ("generations_multiple-*.json",) if overwrite else ())
    for path in export_bigcode(read_generations(generations), output, overwrite):
        say(str(path))


@app.command()
def table(
    results: Annotated[
        list[str], typer.Argument(metavar="NAME=DIR…", help="A method and its evaluation.")
    ],
    output: Annotated[Path, typer.Option(help="New directory for table.md, .csv, .json and .png.")],
    base: Annotated[str | None, typer.Option(help="The NAME that others improve on.")] = None,
    k: Annotated[int, typer.Option("-k", help="Of pass@k: 1, 10 or 100.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Puts several evaluations into one table, with failures by class, and a bar chart."""
    from flora_jax.evaluate import tables
    from flora_jax.evaluate.results import (
        KS,
        check_same_problems,
        check_same_stops,
        read_results,
        summarise,
    )

    if k not in KS:
        raise InputError(f"-k is {k}, expected one of {', '.join(map(str, KS))}")
    require_new(output, tables.FILES if overwrite else ())
    named = named_paths(results, "NAME=DIR", "NAME=DIR")
    read = {name: read_results(path) for name, path in named.items()}
    check_same_stops(named.values())
    cells = tables.table({name: summarise(own) for name, own in read.items()}, k, base)
    if base is not None:
        check_same_problems(read, base)
    for path in tables.write_report(cells, output, overwrite):
        say(str(path))
    print(tables.to_markdown(cells), end="")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="An evaluation's directory.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same problems.")],
    k: Annotated[int, typer.Option("-k", help="Of pass@k.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    output: Annotated[Path | None, typer.Option(help="New JSON file for the figures.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compares two evaluations problem by problem, with a 95 % interval of the difference."""
    from dataclasses import asdict

    from flora_jax.evaluate.results import check_same_stops, compare_results, read_results
    from flora_jax.evaluate.tables import comparison_markdown

    if output is not None:
        require_file(output, overwrite)
    read = read_results(first), read_results(second)
    check_same_stops((first, second))
    compared = compare_results(*read, k, seed)
    if output is not None:
        with whole_file(output) as file:
            json.dump({name: asdict(one) for name, one in compared.items()}, file, indent=1)
    print(comparison_markdown(compared), end="")
