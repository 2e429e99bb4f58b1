"""What a batch costs by how many different adapters it has, and by how many there are in one example.

    python experiments/adapters_per_example.py

Three sweeps over 1, 2, 4, 8 and 16 adapters, for FLoRA and LoRA of one rank, against the base alone:

- projection: 16 rows of one token through c_attn of the 164M shape, 1 to 16 adapters among them;
- pass: the same rows through the whole model with random weights, adapters on every c_attn, the head
  included and nothing cached: one step of decoding without its attention to the past;
- example: rows of 64 tokens whose adapter changes 1 to 16 times on the way (the paper's section 3.2).

The forms are the pair lists that serving uses (ragged; per token in the third sweep) and, for
comparison, explicit weights: one product for each adapter over its own rows or tokens, the weights built
before. Results go to experiments/results/adapters_per_example.json and .png.

Receipt: 24 seconds on 2 cores of an AMD EPYC (Zen 4): experiments/results/adapters_per_example.json. The
whole pass costs the same under 1 and 16 adapters (FLoRA of rank 4 1.20 to 1.24 of the base, LoRA 1.02 to
1.06), as does an example whose adapter changes up to 16 times; explicit weights cost more with every
adapter. The projection alone, 16 rows: FLoRA 2.4 to 2.7 times the base's, LoRA 1.0 to 1.5.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flora_jax.bench.layer.options import parse_ranks
from flora_jax.bench.receipts import report
from flora_jax.cli.program import run_function
from flora_jax.errors import InputError
from flora_jax.files import require_file
from flora_jax.terminal import progress

RESULTS = Path(__file__).parent / "results" / "adapters_per_example.json"
KINDS = ("flora", "lora")
# Sweep, program's name, number of adapters.
Key = tuple[str, str, int]


def chunks(adapters: int, places: int) -> list[str]:
    """Which adapter each of the places has: runs of equal length, "0" first."""
    return [str(number * adapters // places) for number in range(places)]


def explicit(kind: str, rank: int, adapters: int, x_XI: Any, W_IO: Any, bias_O: Any) -> Any:
    """One product for each adapter over its own run of the rows of ``x``: a compiled program."""
    import jax
    import jax.numpy as jnp

    from flora_jax.adapters import stack
    from flora_jax.bench.layer.programs import TARGET, make_adapters, merge_rows
    from flora_jax.weights.product import finish, product

    inputs, outputs = W_IO.shape
    made = make_adapters(kind, rank, inputs, outputs, adapters).values()
    params = stack([adapter.layers[0][TARGET] for adapter in made])
    weights_AIO, bias_AO = merge_rows(params, W_IO, bias_O)
    # Each by itself: XLA copies a slice of a stack before it multiplies by it.
    own = jax.block_until_ready((tuple(weights_AIO), tuple(bias_AO)))

    def run(x_AXI: Any, weights: Any, biases: Any) -> Any:
        # An unrolled loop: a batched product is a slow one for few rows on a CPU.
        products = [
            finish(product(x, W), bias, x.dtype)
            for x, W, bias in zip(x_AXI, weights, biases, strict=True)
        ]
        return jnp.concatenate(products)

    x_AXI = x_XI.reshape(adapters, -1, x_XI.shape[-1])
    return functools.partial(jax.jit(run), x_AXI, *own)


def projection_programs(
    sweep: str, shape: tuple[int, int], size: tuple[int, int], rank: int, counts: list[int]
) -> dict[Key, Callable[[], Any]]:
    """Over the rows of ``[rows, 1]``, or over the tokens within each row of ``[rows, tokens]``."""
    import jax
    import jax.numpy as jnp

    from flora_jax.adapters import apply
    from flora_jax.bench.layer.options import LayerOptions
    from flora_jax.bench.layer.programs import TARGET, make_adapters, weights
    from flora_jax.mixing.bank import build_bank
    from flora_jax.mixing.pairs import list_pairs
    from flora_jax.mixing.ragged import Ragged

    rows, length = shape
    x_BTI, W_IO, bias_O = weights(LayerOptions(*size, batch=rows, length=length))
    flat_XI = x_BTI.reshape(rows * length, -1)
    base, mixed = jax.jit(functools.partial(apply, None)), jax.jit(apply)
    programs: dict[Key, Callable[[], Any]] = {}
    for kind in KINDS:
        bank = build_bank(make_adapters(kind, rank, *size, max(counts)), {TARGET: size}, 1)
        for count in counts:
            names = chunks(count, length) * rows if length > 1 else chunks(count, rows)
            pairs = jax.tree.map(jnp.asarray, list_pairs(bank, names)[TARGET])
            hook = Ragged(bank.layers[0][TARGET], pairs, per_token=length > 1)
            own = functools.partial(mixed, hook, x_BTI, W_IO, bias_O)
            programs[sweep, f"{kind} ragged", count] = own
            merged = explicit(kind, rank, count, flat_XI, W_IO, bias_O)
            programs[sweep, f"{kind} explicit", count] = merged
    programs[sweep, "base", 0] = functools.partial(base, x_BTI, W_IO, bias_O)
    return programs


def pass_programs(
    preset: str, rows: int, rank: int, counts: list[int]
) -> dict[Key, Callable[[], Any]]:
    """One token of every row through the whole model, its head included."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from flora_jax.adapters.model_adapter import init_adapter, randomise
    from flora_jax.mixing.bank import build_bank
    from flora_jax.mixing.pairs import list_pairs
    from flora_jax.mixing.ragged import ragged_hooks
    from flora_jax.models.model import init_model
    from flora_jax.models.starcoder.config import PRESETS

    config = PRESETS[preset]
    model = init_model(config)
    tokens_B1 = jnp.asarray(
        np.random.default_rng(0).integers(1, config.vocab_size, (rows, 1)), jnp.int32
    )

    @jax.jit
    def plain(params: Any, tokens_B1: Any) -> Any:
        return nnx.merge(model.graph, params)(tokens_B1)

    @jax.jit
    def mixed(params: Any, tokens_B1: Any, layers: Any, pairs: Any) -> Any:
        return nnx.merge(model.graph, params)(tokens_B1, adapters=ragged_hooks(layers, pairs))

    programs: dict[Key, Callable[[], Any]] = {}
    projections, layers = config.projections(), config.n_layer
    for kind in KINDS:
        fresh = init_adapter(jax.random.key(0), kind, projections, layers, rank=rank)
        made = {str(n): randomise(fresh, n) for n in range(max(counts))}
        bank = build_bank(made, projections, layers)
        for count in counts:
            pairs = jax.tree.map(jnp.asarray, list_pairs(bank, chunks(count, rows)))
            programs["pass", f"{kind} ragged", count] = functools.partial(
                mixed, model.params, tokens_B1, bank.layers, pairs
            )
    programs["pass", "base", 0] = functools.partial(plain, model.params, tokens_B1)
    return programs


def main(
    preset: str = "164m",
    rank: int = 4,
    counts: Annotated[
        str, typer.Option(help="Numbers of adapters, comma-separated.")
    ] = "1,2,4,8,16",
    rows: Annotated[int, typer.Option(help="Of the first two sweeps.")] = 16,
    example_rows: Annotated[int, typer.Option(help="Of the third.")] = 1,
    example_tokens: int = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    output: Path = RESULTS,
) -> None:
    """Runs the three sweeps, prints the table and draws the picture."""
    from flora_jax.bench.layer.options import projection_of
    from flora_jax.bench.receipts.timing import interleaved

    started = time.perf_counter()
    require_file(output, overwrite=True)
    size = projection_of(preset, "attn.c_attn")
    numbers = list(parse_ranks(counts))
    for number in numbers:
        if number < 1 or rows % number or example_tokens % number:
            raise InputError(
                f"--counts has {number}, expected divisors of {rows} rows and {example_tokens} tokens"
            )
    sweeps = {
        "projection": projection_programs("projection", (rows, 1), size, rank, numbers),
        "pass": pass_programs(preset, rows, rank, numbers),
        "example": projection_programs(
            "example", (example_rows, example_tokens), size, rank, numbers
        ),
    }
    found: list[dict[str, Any]] = []
    for sweep, programs in sweeps.items():
        with progress(sweep, (repeats + 1) * len(programs)) as bar:
            times = interleaved(programs, repeats, bar.advance)
        base = statistics.median(times[sweep, "base", 0])
        for (_, name, count), own in times.items():
            seconds = statistics.median(own)
            row: dict[str, Any] = {
                "sweep": sweep,
                "program": name,
                "adapters": count,
                "seconds": seconds,
            }
            found.append(row | {"milliseconds": 1e3 * seconds, "relative": seconds / base})
    seconds = time.perf_counter() - started
    options = {
        "preset": preset, "rank": rank, "rows": rows, "example_rows": example_rows,
        "example_tokens": example_tokens, "repeats": repeats,
    }  # fmt: skip
    report.write_results(output, {"seconds": seconds, "options": options, "results": found})
    panels: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for row in found:
        if row["program"] == "base":
            continue
        line = panels.setdefault(row["sweep"], {}).setdefault(row["program"], [])
        line.append((row["adapters"], row["relative"]))
    report.plot_panels(
        output.with_suffix(".png"),
        panels,
        "different adapters",
        "times the base",
        logx=True,
        logy=True,
    )
    columns = {
        "sweep": "sweep", "program": "program", "adapters": "adapters", "milliseconds": "ms",
        "relative": "x base",
    }  # fmt: skip
    report.table(f"{preset}, rank {rank}", found, columns)
    print(f"{seconds:.0f} s -> {output}")


if __name__ == "__main__":
    run_function(main)
