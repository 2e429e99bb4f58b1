"""``flora-jax bench``: measurements, each with its machine and its command in the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flora_jax.adapters.registry import TRAITS
from flora_jax.cli.common import Overwrite
from flora_jax.errors import InputError
from flora_jax.files import require_file

app = typer.Typer(
    name="bench",
    help="Measures a layer and the engine; results as JSON, a table and a picture.",
    no_args_is_help=True,
)


@app.command()
def layer(
    preset: Annotated[
        str | None, typer.Option(help="Shape of a model: mini, 164m (default), 1b, 3b, 15b.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Its projection, by name. Default: the first of a block.")
    ] = None,
    inputs: Annotated[int | None, typer.Option(help="Features in place of a preset's.")] = None,
    outputs: Annotated[int | None, typer.Option(help="Features in place of a preset's.")] = None,
    kinds: Annotated[
        str, typer.Option(help="Comma-separated; Eq. 7 needs flora and lora.")
    ] = ",".join(("base", *TRAITS)),
    forms: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "einsum,vmap,batched,ragged,merged",
    ranks: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,4,8,16,32,64",
    batch: Annotated[int, typer.Option(help="Rows, each with an adapter of its own.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a row; 1 as in decoding.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default float32 on a CPU, else float16."),
    ] = None,
    quantize: Annotated[str, typer.Option(help="The base weight: none, int8 or int4.")] = "none",
    layout: Annotated[
        str,
        typer.Option(help="How it is held: inputs or outputs first; auto: as the engine has it."),
    ] = "auto",
    repeats: Annotated[int, typer.Option(help="Rounds over all cases; medians are shown.")] = 7,
    memory_limit: Annotated[
        float | None, typer.Option(help="GiB; what needs more is left out. Default half the free.")
    ] = None,
    limits: Annotated[
        bool, typer.Option(help="Measure memory bandwidth and best product rate as well.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of weights, inputs and adapters.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the picture.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Times one projection under every kind of adapter, form and rank, and checks the paper's Eq. 7."""
    from flora_jax.bench.layer.options import LayerOptions, parse_ranks, projection_of
    from flora_jax.bench.receipts import report
    from flora_jax.platforms import platform

    if inputs is not None and outputs is not None and preset is None and target is None:
        size = inputs, outputs
    elif inputs is None and outputs is None:
        size = projection_of(preset or "164m", target)
    else:
        given = {"inputs": inputs, "outputs": outputs, "preset": preset, "target": target}
        found = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
        raise InputError(f"found {found}, expected --inputs with --outputs, or --preset --target")
    options = LayerOptions(
        *size,
        batch=batch,
        length=length,
        ranks=parse_ranks(ranks),
        kinds=tuple(kinds.split(",")),
        forms=tuple(forms.split(",")),
        dtype=dtype or platform().timed_dtype,
        quantize=quantize,
        layout=layout,
        repeats=repeats,
        memory_gib=memory_limit,
        measure_limits=limits,
        seed=seed,
    )
    for path, option in ((output, "output"), (plot, "plot")):
        if path is not None:
            require_file(path, overwrite, option)

    from flora_jax.bench.layer import measure as bench_layer

    measured = bench_layer.measure(options)
    if output is not None:
        report.write_results(output, measured)
    if plot is not None:
        bench_layer.plot(plot, measured)
    bench_layer.print_tables(measured)
