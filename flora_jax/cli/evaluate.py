"""``flora-jax evaluate``: MultiPL-E, from generations to tables."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora_jax.cli.common import named_paths, named_values, say
from flora_jax.errors import InputError

if TYPE_CHECKING:
    from flora_jax.evaluate.generations import Generation
    from flora_jax.evaluate.sandbox import Sandbox

app = typer.Typer(
    name="evaluate",
    help="MultiPL-E in seven languages: generated programs are run in a sandbox.",
    no_args_is_help=True,
)

Unsafe = Annotated[
    bool, typer.Option("--unsafe", help="Run programs without a sandbox, with your own rights.")
]
Root = Annotated[
    Path,
    typer.Option(help="Where usr/ with the toolchains is; say, a newer Debian by debootstrap."),
]
Languages = Annotated[
    list[str] | None,
    typer.Option(
        help="all, d, lua, pl, rb, rkt, rs or swift, comma-separated; may be repeated.",
        metavar="LANGUAGE",
    ),
]


@app.command()
def doctor(unsafe: Unsafe = False, root: Root = Path("/")) -> None:
    """Says which toolchains are there, in which version, and how to install the others."""
    from flora_jax.evaluate.doctor import describe_user, examine
    from flora_jax.evaluate.sandbox import Sandbox

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


@app.command("multipl-e")
def multipl_e(
    output: Annotated[
        Path, typer.Option(help="Directory for results.jsonl and summary.json; resumes a run.")
    ],
    model: Annotated[
        str | None, typer.Argument(help="The model's name on --server; none for a file.")
    ] = None,
    load_generations: Annotated[
        Path | None,
        typer.Option(help="Generations to execute, a JSON object a line; no MODEL then."),
    ] = None,
    language: Languages = None,
    server: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, as http://localhost:8000/v1.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=NAME", help="The server's model for a language; repeated."),
    ] = None,
    problems: Annotated[
        str | None, typer.Option(help="Directory with humaneval-LANGUAGE.jsonl, or hub.")
    ] = None,
    n_samples: Annotated[
        int | None, typer.Option(help="Completions of a problem. Default 100.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default 0.1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off. Default 0.95.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New ones. Default 512.")] = None,
    generation_only: Annotated[
        bool, typer.Option("--generation-only", help="Write generations.jsonl, run nothing.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Programs that run at once. Default one a core.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, and of the bootstrap.")] = 0,
    unsafe: Unsafe = False,
    root: Root = Path("/"),
) -> None:
    """Runs generated programs against their tests and computes pass@k."""
    from flora_jax.evaluate.languages import LANGUAGES, select
    from flora_jax.evaluate.sandbox import Sandbox

    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}, expected 1 or more")
    chosen = select(name for value in language or [] for name in value.split(","))
    given: dict[str, Any] = {
        "n_samples": n_samples, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens
    }  # fmt: skip
    sampling = {name: value for name, value in given.items() if value is not None}
    sandbox = Sandbox(str(root), unsafe)
    if load_generations is not None:
        others = {"MODEL": model, "--server": server, "--adapter": adapter, "--problems": problems,
                  "--generation-only": generation_only or None}  # fmt: skip
        others |= {f"--{name.replace('_', '-')}": value for name, value in sampling.items()}
        for name, value in others.items():
            if value is not None:
                raise InputError(f"{name} {value} and --load-generations exclude each other")
        generations = _loaded(load_generations, chosen)
        source = str(load_generations)
    else:
        if model is None:
            raise InputError("found neither MODEL nor --load-generations FILE, expected one")
        if server is None:
            raise InputError(
                f"MODEL {model}: a model is completed through --server URL; completions that are "
                "there already are run by --load-generations FILE"
            )
        if problems is None:
            raise InputError("--problems is missing, expected --problems DIR or hub")
        languages = chosen or tuple(LANGUAGES)
        adapters = named_values(adapter or [], "adapter", "LANGUAGE=NAME")
        for name in adapters.keys() - set(languages):
            raise InputError(
                f"--adapter {name}: not among the languages, which are {', '.join(languages)}"
            )
        generations = _generated(
            (server, model, adapters), problems, languages, sampling | {"seed": seed}, output,
            None if generation_only else sandbox,
        )  # fmt: skip
        source = f"{model} at {server}"
    if generation_only:
        say(f"{len(generations)} problems -> {output / 'generations.jsonl'}")
        return

    from flora_jax.evaluate.multipl_e import evaluate

    with _progress("run") as progress:
        summary = evaluate(
            generations, output, sandbox=sandbox, workers=workers, seed=seed, progress=progress,
            source=source,
        )  # fmt: skip
    _show(summary)


def _loaded(path: Path, languages: tuple[str, ...]) -> list[Generation]:
    from flora_jax.evaluate.generations import read_generations

    return read_generations(path, languages or None)


def _generated(
    at: tuple[str, str, dict[str, str]],
    problems: str,
    languages: tuple[str, ...],
    sampling: dict[str, Any],
    output: Path,
    sandbox: Sandbox | None,
) -> list[Generation]:
    """Completes problems by a server; with ``sandbox`` its toolchains are tried before."""
    from flora_jax.evaluate.client import Client
    from flora_jax.evaluate.generate import Sampling, complete_all
    from flora_jax.evaluate.multipl_e import claim
    from flora_jax.evaluate.problems import read_problems
    from flora_jax.evaluate.toolchains import require

    server, model, adapters = at
    if not server.startswith(("http://", "https://")):
        raise InputError(f"--server is {server!r}, expected http://… or https://…")
    settings = Sampling(**sampling)
    given = read_problems(problems, languages)
    if sandbox is not None:  # Hours of generating are not to end in a toolchain that is missing.
        sandbox.check()
        require(languages, sandbox)
    claim(output)
    client = Client(server, model, adapters, os.environ.get("OPENAI_API_KEY"))
    source = {"model": model, "adapters": adapters, "server": server}
    with _progress("generate") as progress:
        return complete_all(given, client, settings, output, source=source, progress=progress)


def _show(summary: dict[str, dict[str, Any]]) -> None:
    for language, found in summary.items():
        error = "" if found["stderr"] is None else f" ± {100 * found['stderr']:.2f}"
        classes = ", ".join(f"{status} {count}" for status, count in found["statuses"].items())
        print(
            f"{language:<6} pass@1 {100 * found['pass@1']:.2f} %{error}, {found['problems']} problems, "
            f"{found['samples']} samples: {classes}"
        )


@app.command()
def export(
    generations: Annotated[Path, typer.Argument(help="A file of generations.")],
    output: Annotated[Path, typer.Option(help="New directory.")],
) -> None:
    """Writes generations as bigcode-evaluation-harness loads them, a file a language."""
    from flora_jax.evaluate.generations import export_bigcode, read_generations

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
    from flora_jax.evaluate import report
    from flora_jax.evaluate.results import KS, read_results, summarise

    if k not in KS:
        raise InputError(f"-k is {k}, expected one of {', '.join(map(str, KS))}")
    named = named_paths(results, "NAME=DIR", "NAME=DIR")
    cells = report.table(
        {name: summarise(read_results(path)) for name, path in named.items()}, k, base
    )
    for path in report.write_report(cells, output):
        say(str(path))
    print(report.to_markdown(cells), end="")


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

    from flora_jax.evaluate.report import comparison_markdown
    from flora_jax.evaluate.results import compare_results, read_results
    from flora_jax.files import whole_file

    compared = compare_results(read_results(first), read_results(second), k, seed)
    if output is not None:
        with whole_file(output) as file:
            json.dump({name: asdict(one) for name, one in compared.items()}, file, indent=1)
    print(comparison_markdown(compared), end="")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
