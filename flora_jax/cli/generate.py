"""``flora-jax generate``: requests in, completions out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from flora_jax.cli.common import (
    MODEL_HELP,
    compiling,
    dtype_of,
    lines,
    named_paths,
    prepare_jax,
    progress,
    read_adapters,
    say,
    source,
)
from flora_jax.errors import InputError
from flora_jax.files import whole_file


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
        typer.Option(help="float32, bfloat16 or float16; default float32 on CPU, else its own."),
    ] = None,
    quantize: Annotated[
        str, typer.Option(help="int8, int4 or none: the base in 8 or 4 bits, the rest as it is.")
    ] = "none",
    batch_size: Annotated[int, typer.Option(help="Requests that run at once, 1 to 256.")] = 16,
    batch_invariant: Annotated[
        bool, typer.Option(help="A request has the same bits in any company; slower.")
    ] = False,
) -> None:
    """Completes every request of a file, each with its own adapter, settings and seed."""
    from flora_jax.checkpoints import open_checkpoint
    from flora_jax.serve.request import Defaults, parse_requests

    defaults = Defaults(max_tokens, temperature, top_k, top_p)
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}, expected 0 to 2^32 - 1")
    if not 1 <= batch_size <= 256:
        raise InputError(f"--batch-size is {batch_size}, expected 1 to 256")
    directories = named_paths(adapter or [], "adapter", "NAME=DIR")
    if not input.is_file():
        raise InputError(f"{input}: no such file")
    if not output.absolute().parent.is_dir() or (output.exists() and not output.is_file()):
        raise InputError(f"{output}: expected a file in an existing directory")
    if output.exists() and output.samefile(input):
        raise InputError(f"{output}: --output is the file of --input")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype!r}, expected float32, bfloat16 or float16")
    if quantize not in ("none", "int8", "int4"):
        raise InputError(f"--quantize is {quantize!r}, expected int8, int4 or none")
    opened = open_checkpoint(source(model))
    config, tokenizer = opened.config, opened.tokenizer
    adapters = read_adapters(directories, config)
    requests = parse_requests(
        lines(input),
        where=str(input),
        tokenizer=tokenizer,
        adapters=adapters,
        vocab_size=config.vocab_size,
        context=config.n_positions,
        defaults=defaults,
    )
    prepare_jax()
    from flora_jax.models.transpose import for_decoding
    from flora_jax.platforms import platform
    from flora_jax.serve.engine import Engine
    from flora_jax.serve.generate import generate as complete
    from flora_jax.serve.options import EngineOptions

    loaded = opened.load(
        dtype_of(dtype), quantize=None if quantize == "none" else cast(Any, quantize)
    )
    rows, longest = batch_size, config.n_positions
    if not batch_invariant:  # Else the shapes, and so the bits, would be those of this file.
        rows = min(rows, len(requests))
        longest = min(longest, max(len(r.token_ids) + r.max_tokens for r in requests))
    options = EngineOptions(
        max_num_seqs=rows,
        max_model_len=longest,
        batch_invariant=batch_invariant,
        seed=seed,
    )
    loaded = for_decoding(loaded, consume=True)
    choices = platform()
    if not batch_invariant and len(requests) <= batch_size:
        # One batch would wait for shapes longer than for tokens.
        choices = choices.for_one_batch(max(len(request.token_ids) for request in requests))
        options = dataclasses.replace(options, row_buckets=(rows,))
    engine = Engine(loaded, adapters, tokenizer=tokenizer, options=options, platform=choices)
    if (why := engine.device.attention_note) is not None:
        say(f"prompts: attention by {engine.device.prompt_attention} ({why})")
    started, tokens = time.perf_counter(), 0
    if choices.few_shapes:
        with compiling() as report:
            engine.warm_up(report)
    with whole_file(output) as file, progress(len(requests)) as advance:
        for completion in complete(engine, requests):
            file.write(completion.to_json() + "\n")
            tokens += len(completion.token_ids)
            advance()
    seconds = time.perf_counter() - started
    say(
        f"{len(requests)} completions, {tokens} tokens in {seconds:.1f} s "
        f"({tokens / seconds:.0f} tokens/s, compilation included) -> {output}"
    )
