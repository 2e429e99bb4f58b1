"""The ``flora-jax`` program: a verb per job. Heavy imports happen inside the verbs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora_jax.errors import InputError
from flora_jax.files import whole_file

if TYPE_CHECKING:
    from flora_jax.adapters.model_adapter import ModelAdapter

app = typer.Typer(
    name="flora-jax",
    help="One base model, a different low-rank adapter for every request of a batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "Hugging Face directory, converted directory, hub id, or 'mini' (embedded)."


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    input: Annotated[Path, typer.Option(help="Requests, a JSON object a line.")],
    output: Annotated[Path, typer.Option(help="Completions, a JSON object a line.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="An adapter; may be repeated.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Where a request has none.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of requests without one, folded with their line.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16 [default: float32 on CPU, else its own]."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch, 1 to 64.")] = 16,
) -> None:
    """Completes every request of a file, each with its own adapter, settings and seed."""
    from flora_jax.serve.request import Defaults, parse_requests
    from flora_jax.serve.tokenizer import load_tokenizer
    from flora_jax.starcoder.checkpoint import describe, load_model
    from flora_jax.starcoder.sources import resolve

    defaults = Defaults(max_tokens, temperature, top_k, top_p)
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}, expected 0 to 2^32 - 1")
    if not 1 <= batch_size <= 64:
        raise InputError(f"--batch-size is {batch_size}, expected 1 to 64")
    directories = _named_directories(adapter or [])
    if not input.is_file():
        raise InputError(f"{input}: no such file")
    if not output.absolute().parent.is_dir() or (output.exists() and not output.is_file()):
        raise InputError(f"{output}: expected a file in an existing directory")
    if output.exists() and output.samefile(input):
        raise InputError(f"{output}: --output is the file of --input")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype!r}, expected float32, bfloat16 or float16")
    directory = resolve(_source(model))
    config = describe(directory).config
    tokenizer = load_tokenizer(directory, config.vocab_size)
    adapters = _read_adapters(directories, config)
    requests = parse_requests(
        _lines(input),
        where=str(input),
        tokenizer=tokenizer,
        adapters=adapters,
        vocab_size=config.vocab_size,
        context=config.n_positions,
        defaults=defaults,
    )
    _prepare_jax()
    from flora_jax.serve.generate import Generator

    loaded = load_model(directory, _dtype(dtype))
    generator = Generator(loaded, adapters, tokenizer=tokenizer, rows=batch_size, seed=seed)
    started, tokens = time.perf_counter(), 0
    with whole_file(output) as file, _progress(len(requests)) as advance:
        for completion in generator.generate(requests):
            file.write(completion.to_json() + "\n")
            tokens += len(completion.token_ids)
            advance()
    seconds = time.perf_counter() - started
    _say(
        f"{len(requests)} completions, {tokens} tokens in {seconds:.1f} s "
        f"({tokens / seconds:.0f} tokens/s, compilation included) -> {output}"
    )


@app.command()
def info(
    path: Annotated[str, typer.Argument(metavar="MODEL|ADAPTER_DIR", help=MODEL_HELP)],
) -> None:
    """Shows what a model or an adapter is: kind, parameters, bytes, targets, ranks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flora_jax.report import describe_rows

    table = Table(show_header=False, box=None)
    for name, value in describe_rows(_source(path)):
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


@app.command()
def demo(
    max_tokens: Annotated[int, typer.Option(help="Tokens a row.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the sampled rows and the random adapters.")] = 0,
) -> None:
    """Runs the embedded model: one batch, another adapter in every row, each checked alone."""
    _prepare_jax()
    from flora_jax.demo import run_demo

    run_demo(_source("mini"), max_tokens=max_tokens, seed=seed)


def main() -> None:
    """The entry point: any bad input ends in one line on stderr and exit code 2."""
    # As an exception, so that nothing half written is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = app(standalone_mode=False)
    except (InputError, OSError) as error:
        _fail(str(error))
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


def _fail(message: str) -> None:
    print(f"flora-jax: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}: not UTF-8: {error}") from None


def _source(model: str) -> str:
    """The path of the embedded model where it is asked for by name."""
    return str(Path(__file__).parent / "assets" / "mini") if model == "mini" else model


def _named_directories(values: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not (name and equals and directory):
            raise InputError(f"--adapter is {value!r}, expected NAME=DIR")
        if name in named:
            raise InputError(f"--adapter {name}: the name is given twice")
        named[name] = Path(directory)
    return named


def _read_adapters(directories: dict[str, Path], config: Any) -> dict[str, ModelAdapter]:
    from flora_jax.adapters.peft_io import read_adapter

    return {
        name: read_adapter(directory, config.projections(), config.n_layer)
        for name, directory in directories.items()
    }


def _dtype(name: str | None) -> str | None:
    """``None`` stands for the checkpoint's own; a CPU computes 16 bits slower than 32."""
    import jax

    if name is None and jax.default_backend() == "cpu":
        return "float32"
    return name


def _prepare_jax() -> None:
    """Keeps compiled programs between runs, unless the user has chosen a place."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "flora_jax" / "xla"))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generate", total=total)
        yield lambda: progress.advance(task)


if __name__ == "__main__":
    main()
