"""Makes the files that all contenders read: a random checkpoint, and LoRA folders as PEFT has them.

    python experiments/peers/make.py DIRECTORY [--adapters 32] [--rank 8] [--preset 164m]

Writes DIRECTORY/model and DIRECTORY/TARGET/NN for c_fc and c_attn. What is there already is kept.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from flora_jax.adapters.model_adapter import init_adapter, randomise
from flora_jax.adapters.projections import match_targets
from flora_jax.checkpoints.checkpoint import save_hf
from flora_jax.cli.program import run_function
from flora_jax.files import whole_directory
from flora_jax.models.model import Model, init_model
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.peft.read import write_adapter

TARGETS = ("c_fc", "c_attn")


def lively(model: Model, seed: int = 0) -> Model:
    """The model with larger projections, and biases that are not zero.

    As initialised, a block adds so little to the tied embedding that greedy decoding repeats the
    prompt's last token under any adapter: nothing to compare by. So the projections that read the
    residual stream are drawn three times as large as what keeps a vector's length, and those that write
    to it are scaled by depth as GPT-2's are.
    """
    rng = np.random.default_rng(seed)
    deep = (2 * model.config.n_layer) ** -0.5

    def redraw(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            spread = (deep if "c_proj" in name else 3.0) * leaf.shape[-1] ** -0.5
        elif "bias" in name:
            spread = 0.02
        else:
            return leaf
        return jax.numpy.asarray(rng.normal(0.0, spread, leaf.shape), leaf.dtype)

    return model._replace(params=jax.tree_util.tree_map_with_path(redraw, model.params))


def make(directory: Path, preset: str, adapters: int, rank: int) -> None:
    """Every random number is seeded: the same files each time."""
    config = PRESETS[preset]
    if not (directory / "model").exists():
        save_hf(lively(init_model(config)), directory / "model")
    for target in TARGETS:
        if (directory / target).exists():
            continue
        start = init_adapter(
            jax.random.key(0), "lora", config.projections(), config.n_layer,
            rank=rank, targets=match_targets([target], config.projections()),
        )  # fmt: skip
        start = dataclasses.replace(start, settings={"task_type": "CAUSAL_LM"})
        with whole_directory(directory / target) as part:
            for number in range(adapters):
                # Changes of about a tenth of a weight's size, enough to change every answer.
                adapter = randomise(start, number, spread=1.0)
                write_adapter(adapter, part / f"{number:02}", "model")


def main(
    directory: Path,
    preset: Annotated[str, typer.Option(help="The model's shape.")] = "164m",
    adapters: Annotated[int, typer.Option(help="As many as the largest batch has rows.")] = 32,
    rank: int = 8,
) -> None:
    """Writes a random checkpoint and LoRA adapters for it."""
    make(directory, preset, adapters, rank)


if __name__ == "__main__":
    run_function(main)
