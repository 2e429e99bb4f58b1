"""``flora-jax generate``: requests in, completions out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flora_jax.cli.common import (
    MODEL_HELP,
    Overwrite,
    compiling,
    dtype_of,
    named_adapters,
    prepare_jax,
    read_adapters,
)
from flora_jax.cli.completions import Output, open_output
from flora_jax.errors import InputError
from flora_jax.jsonl import read_lines
from flora_jax.terminal import progress, say

if TYPE_CHECKING:
    from flora_jax.checkpoints import Opened
    from flora_jax.serve.engine import Engine
    from flora_jax.serve.request import Request


def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    input: Annotated[Path, typer.Option(help="Requests, a JSON object a line.")],
    output: Annotated[Path, typer.Option(help="Completions, a JSON object a line; - is stdout.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter, or a shipped one; may be repeated."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Where a request has none.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, help="Of requests without one, folded with their line."),
    ] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Default: float32 on a CPU, else the checkpoint's own."),
    ] = None,
    quantize: Annotated[
        Literal["none", "int8", "int4"],
        typer.Option(help="The base in 8 or 4 bits, the rest as it is."),
    ] = "none",
    batch_size: Annotated[
        int, typer.Option(min=1, max=256, help="Requests that run at once.")
    ] = 16,
    batch_invariant: Annotated[
        bool, typer.Option(help="A request's bits do not depend on its neighbours; slower.")
    ] = False,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="So many devices hold and compute the model together.")
    ] = 1,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="At a bad request: end, or write its error as its line and go on."),
    ] = "stop",
    truncate_prompt: Annotated[
        Literal["none", "left"],
        typer.Option(help="left: keep the last tokens, so that max_tokens fit the context."),
    ] = "none",
    overwrite: Overwrite = False,
) -> None:
    """Completes every request of a file, each with its own adapter, settings and seed.

    Completions are kept in OUTPUT.part as they come. Where a job was stopped, the same command goes on.
    """
    from flora_jax.serve.request import SamplingParams

    defaults = SamplingParams(max_tokens, temperature, top_k, top_p)
    adapters = named_adapters(adapter or [])
    if not input.is_file():
        found = "is a directory" if input.is_dir() else "no such file"
        raise InputError(f"{input}: {found}")
    if output.exists() and output.samefile(input):
        raise InputError(f"{output}: --output is the file of --input")
    job = Job(
        model, input, adapters, defaults, seed, dtype, quantize, batch_size, batch_invariant,
        tensor_parallel_size, on_error == "skip", truncate_prompt == "left",
    )  # fmt: skip
    sink = open_output(output, overwrite)
    try:
        _run(job, sink, "stdout" if str(output) == "-" else str(output))
    finally:
        sink.close()


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for; the fields are the command's options."""

    model: str
    input: Path
    adapters: Mapping[str, Path]
    defaults: Any
    seed: int
    dtype: str | None
    quantize: Literal["none", "int8", "int4"]
    batch_size: int
    batch_invariant: bool
    devices: int
    skip: bool
    keep_last: bool

    def facts(self, directory: Path) -> dict[str, Any]:
        """What decides the completions: a job with the same may go on with them."""
        from flora_jax.checkpoints.digest import model_digest
        from flora_jax.serve.registry import digest

        return {
            "model": model_digest(directory),
            "input": hashlib.sha256(self.input.read_bytes()).hexdigest(),
            "adapters": {name: digest(folder) for name, folder in self.adapters.items()},
            "default": dataclasses.asdict(self.defaults),
            "seed": self.seed,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "batch": [self.batch_size, self.batch_invariant],
            "devices": self.devices,
            "truncation": self.keep_last,
        }


def _run(job: Job, sink: Output, name: str) -> None:
    from flora_jax.checkpoints import open_checkpoint
    from flora_jax.serve.options import MOST_LOGPROBS
    from flora_jax.serve.request import Limits, Reader, Request

    opened = open_checkpoint(job.model)
    config, tokenizer = opened.config, opened.tokenizer
    adapters = read_adapters(job.adapters, config)
    limits = Limits(
        config.n_positions, config.vocab_size, tokenizer, opened.chat,
        max_logprobs=min(MOST_LOGPROBS, config.vocab_size),
    )  # fmt: skip
    reader = Reader(limits, adapters, job.defaults, job.keep_last)
    requests: list[Request] = []
    errors: dict[int, str] = {}
    for index, found in enumerate(reader.lines(read_lines(job.input))):
        if isinstance(found, Request):
            requests.append(found)
        elif job.skip:
            errors[index] = str(found)
        else:
            raise found
    total = len(requests) + len(errors)
    if not total:
        raise InputError(f"{job.input}: no requests")
    done = sink.begin(job.facts(opened.directory))
    for index, error in errors.items():
        if index not in done:
            sink.add(_error_line(index, None, error))
    left = [request for request in requests if request.request_id not in done]
    started, tokens = time.perf_counter(), 0
    if left:
        engine = _open(job, opened, adapters, requests)
        with contextlib.closing(engine):
            tokens = _complete(engine, left, sink, job.skip, total)
    sink.finish()
    seconds = time.perf_counter() - started
    failed = f", {len(errors)} requests refused" if errors else ""
    before = f", {len(done)} of them from before" if done else ""
    say(
        f"{total - len(errors)} completions{before}, {tokens} tokens in {seconds:.1f} s "
        f"({tokens / seconds:.0f} tokens/s, compilation included){failed} -> {name}"
    )


def _open(job: Job, opened: Opened, adapters: Mapping[str, Any], requests: list[Request]) -> Engine:
    """The engine for all requests of the job, whichever of them are left."""
    prepare_jax()
    from flora_jax.models.splits import tensor_mesh
    from flora_jax.platforms import platform
    from flora_jax.serve.engine import Engine
    from flora_jax.serve.options import EngineOptions

    quantize = None if job.quantize == "none" else job.quantize
    mesh = tensor_mesh(opened.config, job.devices, quantize)
    model = opened.load(dtype_of(job.dtype), quantize=quantize, mesh=mesh)
    rows, longest = job.batch_size, model.config.n_positions
    if not job.batch_invariant:  # Else the shapes, and so the bits, would be those of this file.
        rows = min(rows, len(requests))
        longest = min(longest, max(request.reach for request in requests))
    options = EngineOptions(
        max_num_seqs=rows, max_model_len=longest, batch_invariant=job.batch_invariant,
        max_logprobs=_most_logprobs(requests), seed=job.seed,
    )  # fmt: skip
    choices = platform()
    if not job.batch_invariant and len(requests) <= job.batch_size:
        # One batch would wait for shapes longer than for tokens.
        choices = choices.for_one_batch(max(len(r.prompt_token_ids) for r in requests))
        options = dataclasses.replace(options, row_buckets=(rows,))
    engine = Engine(model, adapters, tokenizer=opened.tokenizer, options=options, platform=choices)
    if engine.attention_note is not None:
        say(f"prompts: attention by {engine.attention_note}")
    if choices.few_shapes:
        with compiling() as report:
            engine.warm_up(report)
    return engine


def _most_logprobs(requests: list[Request]) -> int:
    """What the engine needs programs for; 0 where no request asks for log probabilities."""
    asked = [
        wanted
        for params in (request.sampling_params for request in requests)
        for wanted in (params.logprobs, params.prompt_logprobs)
        if wanted is not None
    ]
    return max(1, *asked) if asked else 0


def _complete(engine: Engine, requests: list[Request], sink: Output, skip: bool, total: int) -> int:
    """Completes the requests into ``sink``; returns how many tokens came."""
    from flora_jax.serve.generate import run

    tokens = 0
    began = engine.compilations.count
    with progress("generate", total) as bar:
        bar.show(done := total - len(requests), note="compiling the first programs")
        for update in run(engine, requests, 2 * engine.options.max_num_seqs):
            tokens += len(update.token_ids)
            compiled = engine.compilations.count - began
            ended = update.finish_reason is not None
            done += ended
            bar.show(done, note=f"{compiled} programs compiled" if compiled else "")
            if not ended:
                continue
            assert update.index is not None
            request = requests[update.index]
            index = request.request_id
            assert isinstance(index, int)
            if update.completion is not None:
                sink.add({"index": index} | update.completion.to_json())
            elif skip:
                sink.add(_error_line(index, request.adapter, str(update.error)))
            else:
                raise InputError(f"request {index}: {update.error}")
    return tokens


def _error_line(index: int, adapter: str | None, error: str) -> dict[str, Any]:
    return {"index": index, "adapter": adapter, "finish_reason": "error", "error": error}
