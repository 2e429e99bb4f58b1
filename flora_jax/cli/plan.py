"""``flora-jax plan``: what a model needs on a GPU, by arithmetic or compiled for it; no GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flora_jax.adapters.registry import TRAITS
from flora_jax.errors import InputError


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PRESET",
            help="mini, 164m, 1b, 3b or 15b; a checkpoint's directory or hub id, of which only the "
            "configuration is read.",
        ),
    ],
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or l4.")],
    devices: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size", "--devices", help="So many of them share the model."
        ),
    ] = 1,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", "--batch-size", help="Sequences that run at once.")
    ] = 16,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and output together. Default all positions.")
    ] = None,
    kind: Annotated[str, typer.Option(help=f"{', '.join(TRAITS)}, or none.")] = "none",
    rank: Annotated[int | None, typer.Option(help="Of the adapters.")] = None,
    resident_adapters: Annotated[
        int | None, typer.Option(help="Adapters on the device. Default one a sequence.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Projections, comma-separated, by name. Default: PEFT's for LoRA."),
    ] = None,
    quantize: Annotated[
        str, typer.Option(help="int8, int4 or none: the base in 8 or 4 bits, the rest as it is.")
    ] = "none",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the real decode program too (extra 'plan')."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")
    ] = False,
) -> None:
    """Shows what fits on a GPU and how long a step takes there, modelled; with --compile the program."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Nothing runs, and no GPU is looked for.
    from flora_jax.adapters.projections import match_targets
    from flora_jax.checkpoints import open_checkpoint
    from flora_jax.models.family import presets
    from flora_jax.plan import summary
    from flora_jax.plan.cards import card
    from flora_jax.plan.setting import Setting

    wanted, known = card(gpu), presets()
    if rank is None:
        rank = 0 if kind == "none" else TRAITS[kind].fixed_rank if kind in TRAITS else None
        if rank is None:
            raise InputError(f"--kind is {kind} and --rank is missing, expected at least 1")
    if model in known:
        name, config = model, known[model]
    else:
        if "/" not in model and not Path(model).exists():
            raise InputError(
                f"MODEL|PRESET is {model!r}, expected one of {', '.join(known)}, a checkpoint's "
                "directory or a hub id (owner/name)"
            )
        opened = open_checkpoint(model)
        name, config = opened.directory.name, opened.config
    projections = config.projections()
    names = projections.names.default_targets("lora") if targets is None else targets.split(",")
    setting = Setting(
        name, config, wanted, devices=devices, dtype=dtype, quantize=quantize, kind=kind, rank=rank,
        targets=match_targets(names, projections), max_num_seqs=max_num_seqs,
        max_model_len=max_model_len, resident_adapters=resident_adapters,
    )  # fmt: skip
    if compile:
        summary.check_compiling()
    found = summary.summarise(setting)
    if compile:
        found["decode"] = summary.compile_decode(setting)
    if json:
        import json as writer

        print(writer.dumps(found))
    else:
        summary.print_tables(found)
