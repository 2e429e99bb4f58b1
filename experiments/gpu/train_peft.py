"""Training steps by torch's transformers and PEFT, for the same tokens as ``train``: eager and compiled.

train_peft PRESET LAYERS RANK
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.gpu.items import Stage, main, require


def stage(own: Stage, words: list[str]) -> None:
    preset, *numbers = words
    layers, rank = map(int, numbers)
    rows, length = (2, 16) if own.rehearse else (8, 512)
    about: dict[str, Any] = {
        "preset": preset, "rows": rows, "tokens": length, "kind": "lora", "rank": rank,
    }  # fmt: skip
    try:
        require("torch", "transformers", "peft")
        net = load(preset, layers, rank, length)
    except Exception as reason:
        name = "skipped" if type(reason).__name__ == "Skip" else "failed"
        own.put("train", **about, **{name: f"{reason}"})
        return
    from experiments.gpu import on_torch

    repeats = 1 if own.rehearse else 6
    about["layers"] = net.config.n_layer
    own.attempt("train", lambda: measure(net, net, rows, length, repeats), how="eager", **about)
    own.attempt(
        "train", lambda: measure(net, on_torch.compiled(net), rows, length, repeats), how="compiled",
        need_s=0 if own.rehearse else 20, **about,
    )  # fmt: skip


def load(preset: str, layers: int, rank: int, length: int) -> Any:
    """A model under one adapter, ready to train."""
    import torch
    from peft import LoraConfig, get_peft_model

    from experiments.gpu import on_torch
    from experiments.gpu.torch_models import gpt_big_code

    half = torch.bfloat16 if on_torch.CUDA else torch.float32
    base = gpt_big_code(preset, layers, length, half, on_torch.DEVICE)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["c_attn"], task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def measure(
    net: Any, forward: Callable[..., Any], rows: int, length: int, repeats: int
) -> Mapping[str, Any]:
    """Steps of AdamW, each loss read."""
    import torch

    from experiments.gpu import on_torch

    own = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3)
    ids = torch.randint(1, net.config.vocab_size, (rows, length), device=on_torch.DEVICE)
    found = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        found.append(time.perf_counter() - began)
    seconds = statistics.median(found[2:])
    return {
        "ms": 1e3 * seconds, "tok_s": rows * length / seconds, "loss": value,
        "peak_GB": on_torch.gigabytes(),
    }  # fmt: skip


if __name__ == "__main__":
    main(stage)
