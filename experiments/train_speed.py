"""Training speed and memory beside PEFT: one process each, their steps interleaved in one run.

    python experiments/train_speed.py --rounds 5
    python experiments/train_speed.py --rounds 5 --group variants

The model has tiny_starcoder_py's shape (164M) with random weights; float32, 8 rows of 256 tokens, AdamW.
The group "peers": LoRA of rank 1 on c_attn by PEFT, with the model's own dropout as Trainer would
(--no-dropout without), by ours, and FLoRA of rank 1 and 8. "variants": that LoRA with attention's scores
for a whole row at once ("einsum"), as it is, and with memory in pages of 2 MiB that is never given back
("pages", glibc on Linux). The table has medians of the rounds; memory is each process's peak. Results go
to experiments/results/train_speed.json and train_speed_variants.json.

Receipt: see the file.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flora_jax.cli.program import run_function
from flora_jax.errors import InputError

ROWS, LENGTH = 8, 256
# The first is what the others are compared with.
GROUPS = {
    "peers": ("peft lora 1", "ours lora 1", "ours flora 1", "ours flora 8"),
    "variants": ("ours lora 1 einsum", "ours lora 1", "ours lora 1 pages"),
}
# What a process is started with, by the last word of its name.
ENVIRONMENTS = {
    "pages": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 29),
    },
}  # fmt: skip
RESULTS = Path(__file__).parent / "results"
FILES = {"peers": "train_speed.json", "variants": "train_speed_variants.json"}


def ours(model_directory: str, kind: str, rank: int, attention: str | None) -> Callable[[], float]:
    """A function that does one step and gives its loss; ``attention`` is by default the platform's."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from flora_jax.adapters.model_adapter import init_adapter
    from flora_jax.checkpoints.checkpoint import load_model
    from flora_jax.train.choice import choose
    from flora_jax.train.step import (
        GroupedBatch,
        StepOptions,
        init_adapter_state,
        make_adapter_step,
    )

    model = load_model(model_directory, "float32")
    config = model.config
    adapter = init_adapter(jax.random.key(0), kind, config.projections(), config.n_layer, rank=rank)
    optimizer = optax.adamw(1e-3, weight_decay=0.01)
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(jax.tree.map(lambda x: x[None], adapter.layers), optimizer)
    options = choose(StepOptions(), config, "float32", LENGTH, print)
    if attention is not None:
        options = dataclasses.replace(options, attention=attention)
    step = make_adapter_step(model.graph, optimizer, optax.constant_schedule(1e-3), options)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (ROWS, 1, LENGTH + 1))
    shape = (ROWS, 1, LENGTH)
    batch = GroupedBatch(
        jnp.asarray(tokens, jnp.int32),
        jnp.broadcast_to(jnp.arange(LENGTH), shape),
        jnp.ones(shape, jnp.int32),
        jnp.ones(shape, jnp.float32),
    )
    keys_N = jax.random.split(jax.random.key(0), 1)

    def run() -> float:
        nonlocal state
        state, measured = step(state, model.params, batch, keys_N)
        return float(measured["loss"][0])

    return run


def peft(model_directory: str, rank: int, dropout: bool) -> Callable[[], float]:
    """The same by torch's transformers and PEFT."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.train(dropout)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.randint(1, base.config.vocab_size, (ROWS, LENGTH))

    def run() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def worker(name: str, model_directory: str, dropout: bool) -> None:
    """Does a step for every line on standard input; says how long it took and the peak memory."""
    side, kind, rank, *variant = name.split()
    if side == "ours":
        attention = "einsum" if "einsum" in variant else None
        run = ours(model_directory, kind, int(rank), attention)
    else:
        run = peft(model_directory, int(rank), dropout)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = run()
        seconds = time.perf_counter() - started
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        print(json.dumps([seconds, peak / 1024, loss]), flush=True)


def make_model(directory: Path) -> None:
    """Random weights of the 164M shape, as Hugging Face stores them."""
    from flora_jax.checkpoints.checkpoint import save_hf
    from flora_jax.models.model import init_model
    from flora_jax.models.starcoder.config import PRESETS

    save_hf(init_model(PRESETS["164m"]), directory)


def main(
    rounds: int = 5,
    group: Annotated[str, typer.Option(help="peers or variants")] = "peers",
    dropout: Annotated[bool, typer.Option(help="PEFT with the model's dropout.")] = True,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    model: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Times every contender in every round and prints the table."""
    if one is not None:
        assert model is not None
        worker(one, model, dropout)
        return
    if group not in GROUPS:
        raise InputError(f"--group is {group!r}, expected one of {', '.join(GROUPS)}")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        maker = f"import train_speed; train_speed.make_model(train_speed.Path({str(directory)!r}))"
        subprocess.run([sys.executable, "-c", maker], cwd=Path(__file__).parent, check=True)
        flag = "--dropout" if dropout else "--no-dropout"
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--one", name, "--model", str(directory), flag],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | ENVIRONMENTS.get(name.split()[-1], {}),
            )
            for name in GROUPS[group]
        }  # fmt: skip
        measured: dict[str, list[Any]] = {name: [] for name in workers}
        for process in workers.values():
            assert process.stdout is not None
            while process.stdout.readline().strip() != "ready":
                assert process.poll() is None
        for _ in range(rounds):
            for name, process in workers.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                measured[name].append(json.loads(process.stdout.readline()))
        for process in workers.values():
            process.communicate()
    report(measured, rounds, group, dropout)


def report(measured: dict[str, list[Any]], rounds: int, group: str, dropout: bool) -> None:
    """Prints the table and saves it with the machine and the versions."""
    import importlib.metadata as metadata

    table = {}
    for name, rows in measured.items():
        seconds = statistics.median(row[0] for row in rows)
        table[name] = {
            "tokens_per_second": round(ROWS * LENGTH / seconds, 1),
            "seconds": [round(row[0], 3) for row in rows],
            "peak_mib": round(max(row[1] for row in rows)),
        }
    reference = table[GROUPS[group][0]]
    for name, row in table.items():
        row["speed_ratio"] = round(row["tokens_per_second"] / reference["tokens_per_second"], 3)
        row["memory_ratio"] = round(row["peak_mib"] / reference["peak_mib"], 3)
        print(
            f"{name:18} {row['tokens_per_second']:8.1f} tokens/s ({row['speed_ratio']:.2f}x)  "
            f"{row['peak_mib']:6} MiB ({row['memory_ratio']:.2f}x)"
        )
    versions = ("jax", "flax", "optax", "torch", "transformers", "peft")
    result = {
        "command": f"python experiments/train_speed.py --rounds {rounds} --group {group}"
        + ("" if dropout else " --no-dropout"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {name: metadata.version(name) for name in versions},
        "results": table,
    }
    (RESULTS / FILES[group]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_function(main)
