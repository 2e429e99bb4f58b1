"""Where FLoRA begins to cost more than bmm-LoRA: measured, and by the paper's Eq. 7, over the width.

    python experiments/eq7_crossover.py

One projection, c_attn of each preset (widths 256, 768, 2048, 2816 and 6144), with a different adapter
in every row; FLoRA and LoRA in the paper's form (two batched products), the base weight in float32, on
a GPU in float16 with factors of that dtype, and in int8, since the paper says that quantisation moves
the crossover up. Two shapes: 16 rows of one token (decoding), and one row of 128 tokens (a prompt).
Each curve's c1 and c2 are fitted to the same times (flora_jax/bench/layer/eq7.py has the derivation). A
point is missing where there is no crossing within the ranks measured; the table then says which of the
two is cheaper. Every measurement is a line of experiments/results/eq7_crossover.jsonl at once, and is not
made again on the same machine by the same commit;
the picture, over those of this command, is beside it (.png).

Receipt: 3 minutes on 2 cores of an AMD EPYC (Zen 4); experiments/figure2.md has the table.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from flora_jax.bench.layer.options import LayerOptions, parse_ranks, projection_of
from flora_jax.bench.receipts import collected, report
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.files import directory_lock, require_file
from flora_jax.platforms import platform

RESULTS = Path(__file__).parent / "results" / "eq7_crossover.jsonl"
COLUMNS = {
    "shape": "shape", "preset": "preset", "width": "width", "quantize": "weight",
    "c1_over_c2": "c1/c2", "fit_error": "error of the fit", "predicted_rank": "Eq. 7",
    "measured_rank": "measured", "verdict": "in words",
}  # fmt: skip


def shapes_of(decode: str, prefill: str) -> dict[str, tuple[int, int]]:
    """Rows and tokens of the two shapes, each written as in 16x1."""
    found = {}
    for name, text in (("decode", decode), ("prefill", prefill)):
        rows, _, tokens = text.partition("x")
        if not (rows.isdigit() and tokens.isdigit()):
            raise InputError(f"--{name} is {text!r}, expected ROWSxTOKENS as in 16x1")
        found[name] = int(rows), int(tokens)
    return found


def curves(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[float, float | None]]]]:
    """Panel by shape, line by weight and source: the crossover rank over the width."""
    panels: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for row in rows:
        for source in ("measured", "predicted"):
            weight = row["dtype"] if row["quantize"] == "none" else row["quantize"]
            name = f"{weight}, {'measured' if source == 'measured' else 'Eq. 7'}"
            line = panels.setdefault(row["shape"], {}).setdefault(name, [])
            line.append((row["width"], row[f"{source}_rank"]))
    return panels


def main(
    presets: Annotated[str, typer.Option(help="Comma-separated.")] = "mini,164m,1b,3b,15b",
    quantize: Annotated[str, typer.Option(help="Comma-separated.")] = "none,int8",
    decode: Annotated[str, typer.Option(help="ROWSxTOKENS.")] = "16x1",
    prefill: Annotated[str, typer.Option(help="ROWSxTOKENS.")] = "1x128",
    decode_ranks: str = "1,2,4,8,16,32",
    prefill_ranks: str = "1,2,4,8",
    dtype: Annotated[
        str | None, typer.Option(help="Default float32 on a CPU, else float16.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    output: Path = RESULTS,
) -> None:
    """Measures every curve, prints the table and draws the picture."""
    from flora_jax.bench.layer import measure as layer

    started = time.perf_counter()
    require_file(output, overwrite=True)
    dtype = dtype or platform().timed_dtype
    # In float32 both forms are the same products.
    form = "einsum" if dtype == "float32" else "batched"
    ranks = {"decode": parse_ranks(decode_ranks), "prefill": parse_ranks(prefill_ranks)}
    planned = []
    for shape, (batch, length) in shapes_of(decode, prefill).items():
        for method in quantize.split(","):
            for preset in presets.split(","):
                options = LayerOptions(
                    *projection_of(preset, "attn.c_attn"), batch=batch, length=length,
                    ranks=ranks[shape], kinds=("base", "lora", "flora"), forms=(form,),
                    dtype=dtype, quantize=method, repeats=repeats, measure_limits=False,
                )  # fmt: skip
                planned.append((shape, preset, options))
    lines = []
    with directory_lock(output.parent):
        for shape, preset, options in planned:
            key = {"shape": shape, "preset": preset, "options": dataclasses.asdict(options)}
            found = collected.find(output, key)
            if found is None:
                found = collected.append_line(output, key, layer.measure(options))
                jax.clear_caches()
            lines.append(found)
    rows = []
    for (shape, preset, options), found in zip(planned, lines, strict=True):
        head = {
            "shape": shape, "preset": preset, "width": options.inputs, "dtype": options.dtype,
        }  # fmt: skip
        # Without a time of both, too little memory for one, there is no row of Eq. 7.
        rows += [head | {"quantize": options.quantize} | row for row in found["eq7"]]
    seconds = time.perf_counter() - started
    report.plot_panels(
        output.with_suffix(".png"), curves(rows), "width d", "crossover rank", logx=True
    )
    report.table("Rank from which FLoRA costs more than bmm-LoRA", rows, COLUMNS)
    print(f"{seconds:.0f} s -> {output}")


if __name__ == "__main__":
    run_function(main)
