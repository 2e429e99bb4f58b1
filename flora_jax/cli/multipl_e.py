"""``flora-jax evaluate multipl-e``: problems to generations to results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flora_jax.cli.common import (
    MODEL_HELP,
    dtype_of,
    named_paths,
    named_values,
    prepare_jax,
    say,
    source,
)
from flora_jax.errors import InputError

if TYPE_CHECKING:
    from flora_jax.evaluate.generate import Complete, Sampling
    from flora_jax.evaluate.generations import Generation
    from flora_jax.evaluate.problems import Problem
    from flora_jax.sandbox.sandbox import Sandbox

Unsafe = Annotated[
    bool, typer.Option("--unsafe", help="Run programs without a sandbox, with your own rights.")
]
Root = Annotated[
    Path,
    typer.Option(help="Where usr/ with the toolchains is; say, a newer Debian by debootstrap."),
]


def multipl_e(
    output: Annotated[
        Path, typer.Option(help="Directory for results.jsonl and summary.json; resumes a run.")
    ],
    model: Annotated[
        str | None, typer.Argument(help=f"{MODEL_HELP} With --server its name there.")
    ] = None,
    load_generations: Annotated[
        Path | None,
        typer.Option(help="Generations to execute, a JSON object a line; no MODEL then."),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            help="all, d, lua, pl, rb, rkt, rs or swift, comma-separated; may be repeated.",
            metavar="LANGUAGE",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LANGUAGE=DIR",
            help="An adapter for a language, with --server its name there; may be repeated.",
        ),
    ] = None,
    problems: Annotated[
        str | None, typer.Option(help="Directory with humaneval-LANGUAGE.jsonl, or hub.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many problems of each language.")
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
    batch_size: Annotated[
        int | None, typer.Option(help="Samples generated at once, 1 to 256. Default 16.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default float32 on CPU, else its own."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: the base in 8 or 4 bits, the rest as it is.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, as http://localhost:8000/v1.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Programs that run at once. Default one a core.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, and of the bootstrap.")] = 0,
    unsafe: Unsafe = False,
    root: Root = Path("/"),
) -> None:
    """Completes problems, runs the programs against their tests and computes pass@k."""
    from flora_jax.evaluate.languages import LANGUAGES, select
    from flora_jax.sandbox.sandbox import Sandbox

    for name, number in (("workers", workers), ("limit", limit)):
        if number is not None and number < 1:
            raise InputError(f"--{name} is {number}, expected 1 or more")
    chosen = select(name for value in language or [] for name in value.split(","))
    given: dict[str, Any] = {
        "n_samples": n_samples, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens
    }  # fmt: skip
    sampling = {name: value for name, value in given.items() if value is not None}
    quantize = None if quantize == "none" else quantize
    engine: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "quantize": quantize}
    sandbox = Sandbox(str(root), unsafe)
    if load_generations is not None:
        others: dict[str, Any] = {
            "MODEL": model, "--server": server, "--adapter": adapter, "--problems": problems,
            "--limit": limit, "--generation-only": generation_only or None,
        }  # fmt: skip
        others |= {f"--{name.replace('_', '-')}": value for name, value in (given | engine).items()}
        for name, value in others.items():
            if value is not None:
                raise InputError(f"{name} {value} and --load-generations exclude each other")
        generations = _loaded(load_generations, chosen)
        where = str(load_generations)
    else:
        if model is None:
            raise InputError("found neither MODEL nor --load-generations FILE, expected one")
        if problems is None:
            raise InputError("--problems is missing, expected --problems DIR or hub")
        if server is not None:
            for name, value in engine.items():
                if value is not None:
                    option = name.replace("_", "-")
                    raise InputError(f"--{option} {value} and --server exclude each other")
        generations = _generated(
            model, server, engine, adapter or [], problems, chosen or tuple(LANGUAGES), limit,
            sampling | {"seed": seed}, output, None if generation_only else sandbox,
        )  # fmt: skip
        where = f"{model} at {server}" if server else model
    if generation_only:
        say(f"{len(generations)} problems -> {output / 'generations.jsonl'}")
        return

    from flora_jax.evaluate.multipl_e import evaluate

    with _progress("run") as progress:
        summary = evaluate(
            generations, output, sandbox=sandbox, workers=workers, seed=seed, progress=progress,
            source=where,
        )  # fmt: skip
    _show(summary)


def _loaded(path: Path, languages: tuple[str, ...]) -> list[Generation]:
    from flora_jax.evaluate.generations import read_generations

    return read_generations(path, languages or None)


def _generated(
    model: str,
    server: str | None,
    engine: dict[str, Any],
    adapter: list[str],
    problems: str,
    languages: tuple[str, ...],
    limit: int | None,
    sampling: dict[str, Any],
    output: Path,
    sandbox: Sandbox | None,
) -> list[Generation]:
    """Completes what ``output`` lacks; with ``sandbox`` its toolchains are tried before."""
    from flora_jax.evaluate.generate import Sampling, complete_all
    from flora_jax.evaluate.multipl_e import claim
    from flora_jax.evaluate.problems import first, read_problems
    from flora_jax.evaluate.toolchains import require

    settings = Sampling(**sampling)
    for name in named_values(adapter, "adapter", "LANGUAGE=DIR").keys() - set(languages):
        raise InputError(
            f"--adapter {name}: not among the languages, which are {', '.join(languages)}"
        )
    given = first(read_problems(problems, languages), limit)
    complete, made_by = (
        _local(model, engine, adapter, given, settings)
        if server is None
        else _remote(model, server, named_values(adapter, "adapter"))
    )
    if sandbox is not None:  # Hours of generating are not to end in a toolchain that is missing.
        sandbox.check()
        require(languages, sandbox)
    claim(output)
    with _progress("generate") as progress:
        return complete_all(given, complete, settings, output, source=made_by, progress=progress)


def _remote(model: str, server: str, adapters: dict[str, str]) -> tuple[Complete, dict[str, Any]]:
    from flora_jax.evaluate.client import Client

    if not server.startswith(("http://", "https://")):
        raise InputError(f"--server is {server!r}, expected http://… or https://…")
    client = Client(server, model, adapters, os.environ.get("OPENAI_API_KEY"))
    return client, {"model": model, "adapters": adapters, "server": server}


def _local(
    model: str,
    engine: dict[str, Any],
    adapter: list[str],
    problems: list[Problem],
    sampling: Sampling,
) -> tuple[Complete, dict[str, Any]]:
    """The engine, and what it is for the record; a model is loaded when it has to complete."""
    from flora_jax.checkpoints.sources import resolve

    rows = 16 if engine["batch_size"] is None else engine["batch_size"]
    if not 1 <= rows <= 256:
        raise InputError(f"--batch-size is {rows}, expected 1 to 256")
    if engine["dtype"] not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {engine['dtype']!r}, expected float32, bfloat16 or float16")
    if engine["quantize"] not in (None, "int8", "int4"):
        raise InputError(f"--quantize is {engine['quantize']!r}, expected int8, int4 or none")
    folders = named_paths(adapter, "adapter", "LANGUAGE=DIR")
    directory = resolve(source(model))

    prepare_jax()
    from flora_jax.evaluate.local import Local
    from flora_jax.serve.registry import digest

    local = Local(
        directory, problems, folders, rows, dtype_of(engine["dtype"]),
        cast(Any, engine["quantize"]),
    )  # fmt: skip
    beyond = local.beyond()
    if beyond:
        say(
            f"{len(beyond)} of {len(problems)} prompts do not fit the model's context, their "
            f"completions are empty: {', '.join(f'{p.language}/{p.name}' for p in beyond[:20])}"
        )
    return local, {
        "model": model,
        "adapters": {name: digest(path) for name, path in folders.items()},
        **engine, "batch_size": rows, "dtype": local.dtype, "context": local.context(sampling),
    }  # fmt: skip


def _show(summary: dict[str, dict[str, Any]]) -> None:
    for language, found in summary.items():
        error = "" if found["stderr"] is None else f" ± {100 * found['stderr']:.2f}"
        classes = ", ".join(f"{status} {count}" for status, count in found["statuses"].items())
        print(
            f"{language:<6} pass@1 {100 * found['pass@1']:.2f} %{error}, {found['problems']} problems, "
            f"{found['samples']} samples: {classes}"
        )


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
