"""Makes the files that all contenders read: a random checkpoint, and LoRA folders as PEFT has them.

    python experiments/peers/make.py DIRECTORY [--target c_fc] [--adapters 32] [--rank 8]
        [--preset 164m, or --model CHECKPOINT]

Writes DIRECTORY/model, unless a model is given, and DIRECTORY/TARGETS/NN for each --target, which may be
several modules as q_proj,v_proj. What is there already is kept.
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
from flora_jax.checkpoints.checkpoint import open_checkpoint, save_hf
from flora_jax.cli.program import run_function
from flora_jax.files import whole_directory
from flora_jax.models.family import ModelConfig, presets
from flora_jax.models.model import Model, init_model
from flora_jax.peft.read import write_adapter


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


def make_model(directory: Path, config: ModelConfig) -> None:
    """A random one; every random number is seeded: the same file each time."""
    if not directory.exists():
        save_hf(lively(init_model(config)), directory)


def make_adapters(directory: Path, config: ModelConfig, adapters: int, rank: int) -> None:
    """Random ones, seeded as well, of the modules that the folder is named by."""
    projections = config.projections()
    targets = match_targets(directory.name.split(","), projections)
    if directory.exists():
        return
    start = init_adapter(
        jax.random.key(0), "lora", projections, config.n_layer, rank=rank, targets=targets
    )
    start = dataclasses.replace(start, settings={"task_type": "CAUSAL_LM"})
    with whole_directory(directory) as part:
        for number in range(adapters):
            # Changes of about a tenth of a weight's size, enough to change every answer.
            adapter = randomise(start, number, spread=1.0)
            write_adapter(adapter, part / f"{number:02}", "model")


def main(
    directory: Path,
    target: Annotated[
        list[str] | None, typer.Option(help="A module, or several as q_proj,v_proj.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A checkpoint; none: a random one.")] = None,
    preset: Annotated[str, typer.Option(help="The model's shape.")] = "164m",
    adapters: Annotated[int, typer.Option(help="As many as the largest batch has rows.")] = 32,
    rank: int = 8,
) -> None:
    """Writes a random checkpoint and LoRA adapters for it, or for a model that is there."""
    if model is None:
        make_model(directory / "model", presets()[preset])
    config = open_checkpoint(model or directory / "model").config
    for targets in target or ():
        make_adapters(directory / targets, config, adapters, rank)


if __name__ == "__main__":
    run_function(main)
