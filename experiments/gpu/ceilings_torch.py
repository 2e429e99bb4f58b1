"""What the card can do at best, by torch: a copy and a large product of random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.gpu.items import Stage, main, require


def stage(own: Stage, _: list[str]) -> None:
    def copy() -> Mapping[str, Any]:
        require("torch")
        import torch

        from experiments.gpu import on_torch

        count = 1 << (20 if own.rehearse else 30)
        source = torch.randn(count, device=on_torch.DEVICE)
        target = torch.empty_like(source)
        taken = on_torch.seconds(lambda: target.copy_(source), 10)
        return {"TB_s": 2 * 4 * count / taken / 1e12, "torch": torch.__version__}

    def product(size: int) -> Mapping[str, Any]:
        require("torch")
        import torch

        from experiments.gpu import on_torch

        x, W = (
            torch.randn(size, size, device=on_torch.DEVICE, dtype=torch.bfloat16) for _ in range(2)
        )
        taken = on_torch.seconds(lambda: x @ W, 10)
        return {"TFLOP_s": 2 * size**3 / taken / 1e12, "dtype": "bfloat16"}

    size = 64 if own.rehearse else 8192
    own.attempt("copy", copy)
    own.attempt("square product", lambda: product(size), size=size)


if __name__ == "__main__":
    main(stage)
