"""What serving StarCoder 15B makes an H100 do, counted on the programs compiled for it; nothing runs.

``python -m experiments.gpu_counts --output experiments/results/gpu_counts.json`` compiles the engine's
own programs at 2 and at 4 layers, 32 rows, 2,048 positions, float16, 32 adapters on ``c_attn``; half of
the difference is a layer's, and 40 layers are what is told: launches, bytes beside the weights and
temporaries of a decode step by kind and span, of 2,048 tokens of prompts, and of the sampler's
programs. Needs the extra ``plan``.

Receipt: some minutes on 2 cores of an AMD EPYC, jax 0.10.2; experiments/results/gpu_counts.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

from flora_jax.bench.receipts import report
from flora_jax.files import require_file
from flora_jax.models.starcoder.config import PRESETS
from flora_jax.plan import programs
from flora_jax.plan.ahead import check_compiler, compile_lowered, find_toolkit, one_device
from flora_jax.plan.cards import CARDS
from flora_jax.plan.setting import Setting
from flora_jax.serve import ahead

try:
    from experiments.gpu_counts_train import CUDNN_VERSION, Counts, count
except ModuleNotFoundError:  # Started as a script, whose directory is on the path.
    from gpu_counts_train import CUDNN_VERSION, Counts, count  # type: ignore[no-redef]

FEW, MORE, WHOLE = 2, 4, PRESETS["15b"].n_layer
KINDS = {"none": 0, "flora 8": 8, "lora 8": 8}


def setting(layers: int, kind: str, rank: int) -> Setting:
    """The 15B shape with so many layers."""
    config = dataclasses.replace(PRESETS["15b"], n_layer=layers)
    return Setting(
        "15b", config, CARDS["h100"], kind=kind, rank=rank, max_num_seqs=32, max_model_len=2048
    )


def counted(kind: str, rank: int) -> dict[str, Any]:
    """By program's name what 40 layers make of it."""
    lowered = {
        layers: ahead.lower_for(
            programs.device_of(setting(layers, kind, rank)), one_device(CARDS["h100"])
        )
        for layers in (FEW, MORE)
    }
    weights = 2 * sum(a * b for a, b in PRESETS["15b"].projections().values()) * WHOLE
    found: dict[str, Any] = {}
    for name in lowered[FEW]:
        if rank and name.startswith(("draw", "begin")):
            continue  # As without adapters.
        # There is no cuDNN here to say its version; the card's description says this one.
        with mock.patch(CUDNN_VERSION, return_value=91200):
            few, more = (count(compile_lowered(lowered[n][name])) for n in (FEW, MORE))
        layer: Counts = (more - few).share(MORE - FEW)
        whole = WHOLE - FEW
        layered = name.startswith(("forward", "prefill"))
        moved = few.bytes + whole * layer.bytes
        found[name] = {
            "launches": few.launches + whole * layer.launches,
            "launches_per_layer": layer.launches,
            "bytes_beside_weights": moved - weights if layered else moved,
            "temporaries": few.temporaries + whole * layer.temporaries,
        }
    return found


def main() -> None:
    """Counts, writes, and prints a line for each program."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--output", type=Path, required=True, help="JSON file.")
    output = options.parse_args().output
    check_compiler()
    find_toolkit()
    require_file(output, overwrite=True, option="results")
    results = {}
    for title, rank in KINDS.items():
        own = results[title] = counted(title.partition(" ")[0], rank)
        for name, line in own.items():
            print(f"{title}: {name}: {json.dumps(line)}", flush=True)
    report.write_results(output, {"preset": "15b", "layers": WHOLE, "programs": results})


if __name__ == "__main__":
    main()
