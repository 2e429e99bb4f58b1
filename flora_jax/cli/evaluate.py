"""``flora-jax evaluate``: MultiPL-E, from generations to tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flora_jax.cli.common import named_paths, say
from flora_jax.cli.multipl_e import Root, Unsafe, multipl_e
from flora_jax.errors import InputError

app = typer.Typer(
    name="evaluate",
    help="MultiPL-E in seven languages: generated programs are run in a sandbox.",
    no_args_is_help=True,
)

app.command("multipl-e")(multipl_e)


@app.command()
def doctor(unsafe: Unsafe = False, root: Root = Path("/")) -> None:
    """Says which toolchains are there, in which version, and how to install the others."""
    from flora_jax.evaluate.doctor import describe_user, examine
    from flora_jax.sandbox.sandbox import Sandbox

    report = examine(Sandbox(str(root), unsafe))
    if report.sandbox:
        print(report.sandbox)
    elif unsafe:
        print("no sandbox, as asked for: programs run with your own rights")
    else:
        print(f"sandbox: bubblewrap works ({describe_user()})")
    for one in report.findings:
        print(f"{one.name:<8}{one.state:<9}{one.version:<14}{one.path or one.advice}")
        if one.path and one.advice:
            print(f"{'':<17}{one.advice}")
    if report.install:
        print(f"on Debian: {report.install}")


@app.command()
def export(
    generations: Annotated[Path, typer.Argument(help="A file of generations.")],
    output: Annotated[Path, typer.Option(help="New directory.")],
) -> None:
    """Writes generations as bigcode-evaluation-harness loads them, a file a language."""
    from flora_jax.evaluate.completions import export_bigcode, read_generations

    for path in export_bigcode(read_generations(generations), output):
        say(str(path))


@app.command()
def table(
    results: Annotated[
        list[str], typer.Argument(metavar="NAME=DIR…", help="A method and its evaluation.")
    ],
    output: Annotated[Path, typer.Option(help="Directory for table.md, .csv, .json and .png.")],
    base: Annotated[str | None, typer.Option(help="The NAME that others improve on.")] = None,
    k: Annotated[int, typer.Option("-k", help="Of pass@k: 1, 10 or 100.")] = 1,
) -> None:
    """Puts several evaluations into one table, with failures by class, and a bar chart."""
    from flora_jax.evaluate import tables
    from flora_jax.evaluate.results import KS, check_same_problems, read_results, summarise

    if k not in KS:
        raise InputError(f"-k is {k}, expected one of {', '.join(map(str, KS))}")
    named = named_paths(results, "NAME=DIR", "NAME=DIR")
    read = {name: read_results(path) for name, path in named.items()}
    cells = tables.table({name: summarise(own) for name, own in read.items()}, k, base)
    if base is not None:
        check_same_problems(read, base)
    for path in tables.write_report(cells, output):
        say(str(path))
    print(tables.to_markdown(cells), end="")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="An evaluation's directory.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same problems.")],
    k: Annotated[int, typer.Option("-k", help="Of pass@k.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Compares two evaluations problem by problem, with a 95 % interval of the difference."""
    from dataclasses import asdict

    from flora_jax.evaluate.results import compare_results, read_results
    from flora_jax.evaluate.tables import comparison_markdown
    from flora_jax.files import whole_file

    compared = compare_results(read_results(first), read_results(second), k, seed)
    if output is not None:
        with whole_file(output) as file:
            json.dump({name: asdict(one) for name, one in compared.items()}, file, indent=1)
    print(comparison_markdown(compared), end="")
