"""``flora-jax evaluate multipl-e``: problems to generations to results."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora_jax.cli.common import (
    MODEL_HELP,
    dtype_of,
    named_adapters,
    named_values,
    prepare_jax,
)
from flora_jax.errors import InputError
from flora_jax.terminal import progress, say

if TYPE_CHECKING:
    from flora_jax.evaluate.completions import Complete, Generation, Sampling
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
            help="A language's adapter, or a shipped one; with --server its name there; may be repeated.",
        ),
    ] = None,
    problems: Annotated[
        str | None, typer.Option(help="Directory with humaneval-LANGUAGE.jsonl, or hub.")
    ] = None,
    stop_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="given|current",
            help="As the problems have them, or as MultiPL-E's current release has: there a blank line "
            "does not end Lua's bodies. Default given.",
        ),
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
    """Completes problems, runs the programs against their tests and computes pass@k.

    A program has MultiPL-E's time for its language, 5 to 45 s (evaluate doctor lists them), counted while
    it computes or sleeps and not while it waits for a core; one that needs more beside others runs again
    by itself before that counts. Completions are kept only for the same weights, tokenizer and settings:
    the model's files are hashed at every start, 1 to 2 GB/s on each core.
    """
    from flora_jax.evaluate.languages import LANGUAGES, select
    from flora_jax.evaluate.problems import STOP_TOKENS
    from flora_jax.sandbox.sandbox import Sandbox

    if stop_tokens is not None and stop_tokens not in STOP_TOKENS:
        raise InputError(
            f"--stop-tokens is {stop_tokens!r}, expected one of {', '.join(STOP_TOKENS)}"
        )
    for name, number in (("workers", workers), ("limit", limit)):
        if number is not None and number < 1:
            raise InputError(f"--{name} is {number}, expected 1 or more")
    chosen = select(name for value in language or [] for name in value.split(","))
    sampling = {
        "n_samples": n_samples, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens
    }  # fmt: skip
    engine = {
        "batch_size": batch_size,
        "dtype": dtype,
        "quantize": None if quantize == "none" else quantize,
    }
    execution = Execution(Sandbox(str(root), unsafe), workers, seed)
    if load_generations is not None:
        others: dict[str, Any] = {
            "MODEL": model, "--server": server, "--adapter": adapter, "--problems": problems,
            "--stop-tokens": stop_tokens, "--limit": limit, "--generation-only": generation_only or None,
            **_as_options(sampling), **_as_options(engine),
        }  # fmt: skip
        _exclude(others, "--load-generations")
        from flora_jax.evaluate.completions import read_generations

        generations = read_generations(load_generations, chosen or None)
        with _claimed(output):
            execution.run(generations, output, str(load_generations))
        return
    if model is None:
        raise InputError("found neither MODEL nor --load-generations FILE, expected one")
    if problems is None:
        raise InputError("--problems is missing, expected --problems DIR or hub")
    if server is not None:
        _exclude(_as_options(engine), "--server")
    generating = Generating(
        model, server, engine, tuple(adapter or ()), problems, chosen or tuple(LANGUAGES), limit,
        "given" if stop_tokens is None else stop_tokens,
        {name: value for name, value in sampling.items() if value is not None} | {"seed": seed},
    )  # fmt: skip
    with _claimed(output):
        generations = generating.run(output, None if generation_only else execution)
        if generation_only:
            say(f"{len(generations)} problems -> {output / 'generations.jsonl'}")
        else:
            execution.run(generations, output, f"{model} at {server}" if server else model)


def _as_options(values: dict[str, Any]) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def _exclude(given: dict[str, Any], other: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} {value} and {other} exclude each other")


def _claimed(output: Path) -> AbstractContextManager[Path]:
    from flora_jax.evaluate.multipl_e import claim

    return claim(output)


@dataclass(frozen=True)
class Execution:
    """How programs are run and their results summed up."""

    sandbox: Sandbox
    workers: int | None
    seed: int

    def run(self, generations: list[Generation], output: Path, source: str) -> None:
        """Runs the programs and prints the summary; ``output`` is claimed."""
        from flora_jax.evaluate.execution import Runner
        from flora_jax.evaluate.multipl_e import evaluate

        with progress("run") as bar:
            summary = evaluate(
                generations, output, Runner(self.sandbox, self.workers), seed=self.seed,
                progress=bar.show, source=source,
            )  # fmt: skip
        _show(summary)


@dataclass(frozen=True)
class Generating:
    """What completes which problems. ``engine`` and ``sampling`` are the options by name."""

    model: str
    server: str | None
    engine: dict[str, Any]
    adapters: tuple[str, ...]
    problems: str
    languages: tuple[str, ...]
    limit: int | None
    stop_tokens: str
    sampling: dict[str, Any]

    def run(self, output: Path, execution: Execution | None) -> list[Generation]:
        """Completes what ``output`` lacks, which is claimed; with ``execution`` its toolchains are
        tried before.
        """
        from flora_jax.evaluate.completions import Sampling, complete_all
        from flora_jax.evaluate.problems import first, read_problems, with_stop_tokens
        from flora_jax.evaluate.toolchains import require

        sampling = Sampling(**self.sampling)
        for name in named_values([*self.adapters], "adapter", "LANGUAGE=DIR").keys() - set(
            self.languages
        ):
            raise InputError(
                f"--adapter {name}: not among the languages, which are {', '.join(self.languages)}"
            )
        problems = first(
            with_stop_tokens(read_problems(self.problems, self.languages), self.stop_tokens),
            self.limit,
        )
        complete, made_by = (
            self._local(problems, sampling) if self.server is None else self._remote(self.server)
        )
        if execution is not None:  # Hours of generating are not to end in a missing toolchain.
            execution.sandbox.check()
            require(self.languages, execution.sandbox)
        with progress("generate") as bar:
            return complete_all(
                problems, complete, sampling, output, source=made_by, progress=bar.show
            )

    def _remote(self, server: str) -> tuple[Complete, dict[str, Any]]:
        from flora_jax.evaluate.client import Client

        if not server.startswith(("http://", "https://")):
            raise InputError(f"--server is {server!r}, expected http://… or https://…")
        adapters = named_values([*self.adapters], "adapter")
        client = Client(server, self.model, adapters, os.environ.get("OPENAI_API_KEY"))
        return client, {"model": self.model, "adapters": adapters, "server": server}

    def _local(
        self, problems: list[Problem], sampling: Sampling
    ) -> tuple[Complete, dict[str, Any]]:
        """The engine, and what decides its completions; a model is loaded when it has to complete."""
        from flora_jax.checkpoints.sources import resolve

        engine = self.engine
        rows = 16 if engine["batch_size"] is None else engine["batch_size"]
        if not 1 <= rows <= 256:
            raise InputError(f"--batch-size is {rows}, expected 1 to 256")
        if engine["dtype"] not in (None, "float32", "bfloat16", "float16"):
            raise InputError(
                f"--dtype is {engine['dtype']!r}, expected float32, bfloat16 or float16"
            )
        if engine["quantize"] not in (None, "int8", "int4"):
            raise InputError(f"--quantize is {engine['quantize']!r}, expected int8, int4 or none")
        folders = named_adapters([*self.adapters], "LANGUAGE=DIR")
        directory = resolve(self.model)

        prepare_jax()
        from flora_jax.checkpoints.digest import model_digest
        from flora_jax.evaluate.local import Local
        from flora_jax.serve.registry import digest

        local = Local(
            directory, problems, folders, rows, dtype_of(engine["dtype"]), engine["quantize"]
        )
        beyond = local.beyond()
        if beyond:
            say(
                f"{len(beyond)} of {len(problems)} prompts do not fit the model's context, their "
                f"completions are empty: {', '.join(f'{p.language}/{p.name}' for p in beyond[:20])}"
            )
        return local, {
            "model": self.model, "model_sha256": model_digest(directory),
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
