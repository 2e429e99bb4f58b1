"""The paper's own comparison, in torch: FLoRA by Eq. 6 and LoRA as two ``torch.bmm``, an adapter a row.

Each eager, as a CUDA graph, and compiled inside a CUDA graph. As in ``flora_jax.bench`` several calls in
turn have weights and factors that exceed the card's cache together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from experiments.gpu.items import Stage, main, require

SHAPES = (
    ("15b", (6144, 6400), (1, 2, 4, 8, 16, 32, 64)),
    ("1b", (2048, 2304), (1, 4, 8, 32)),
    ("3b", (2816, 3072), (1, 4, 8, 32)),
)
HOW = ("graph", "eager", "compiled graph")


def stage(own: Stage, _: list[str]) -> None:
    shapes = (("mini", (64, 96), (1, 2)),) if own.rehearse else SHAPES
    rows = 2 if own.rehearse else 32
    try:
        require("torch")
        from experiments.gpu import on_torch
    except Exception as reason:
        own.put("case", skipped=str(reason))
        return
    for preset, (inputs, outputs), ranks in shapes:
        about = {"preset": preset, "target": "attn.c_attn", "rows": rows, "tokens": 1}
        about |= {"inputs": inputs, "outputs": outputs, "dtype": str(on_torch.HALF)}
        sets = max(2, int(on_torch.CACHE_BYTES / (2 * inputs * outputs)) + 1)
        measure(own, rows, (inputs, outputs), ranks, 2 if own.rehearse else sets, about)


def measure(
    own: Stage,
    rows: int,
    size: tuple[int, int],
    ranks: tuple[int, ...],
    sets: int,
    about: Mapping[str, Any],
) -> None:
    """Writes the lines of one shape: the base, then both kinds at every rank."""
    import torch

    from experiments.gpu import on_torch

    inputs, outputs = size

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        made = torch.randn(*shape, device=on_torch.DEVICE, dtype=on_torch.HALF)
        return mean + scale * made

    W_N = [normal(inputs, outputs, scale=inputs**-0.5) for _ in range(sets)]
    x_BTI = normal(rows, 1, inputs)

    def timed(one: Callable[[int], Any], how: str) -> Mapping[str, Any]:
        if how == "compiled graph":
            one = on_torch.compiled(one)

        def run() -> None:
            for number in range(sets):
                one(number)

        taken = on_torch.seconds(run if how == "eager" else on_torch.graphed(run), 10)
        return {"us": 1e6 * taken / sets}

    def base(number: int) -> torch.Tensor:
        return x_BTI @ W_N[number]

    for how in HOW[:2]:
        own.attempt("case", partial(timed, base, how), kind="base", rank=None, how=how, **about)
    for rank in ranks:
        down = [normal(rows, inputs, rank, scale=inputs**-0.5) for _ in range(sets)]
        up = [normal(rows, rank, outputs, scale=0.1) for _ in range(sets)]
        pre = [normal(rows, rank, 1, inputs, scale=0.1, mean=1.0) for _ in range(sets)]
        post = [normal(rows, rank, 1, outputs, scale=0.1, mean=1.0) for _ in range(sets)]

        def lora(number: int, down: Any = down, up: Any = up) -> torch.Tensor:
            return x_BTI @ W_N[number] + torch.bmm(torch.bmm(x_BTI, down[number]), up[number])

        def flora(number: int, pre: Any = pre, post: Any = post, rank: int = rank) -> torch.Tensor:
            x = (x_BTI[:, None] * pre[number]).reshape(rows * rank, 1, inputs)
            y = (x @ W_N[number]).reshape(rows, rank, 1, outputs)
            return (y * post[number]).sum(1) / rank

        for kind, one in (("lora", lora), ("flora", flora)):
            for how in HOW:
                if how == "compiled graph" and (rank not in (1, 8) or own.left < 15):
                    continue
                own.attempt(
                    "case", partial(timed, one, how), kind=kind, rank=rank, how=how,
                    **about,
                )  # fmt: skip


if __name__ == "__main__":
    main(stage)
