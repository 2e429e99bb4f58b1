"""One projection by kind, form and rank, and Eq. 7: the same program as ``flora-jax bench layer``.

LoRA's form "batched" is the paper's own, two batched products in half precision; "ragged" is what the
engine's decode steps run, "merged" what its prompts run from rank 2 on. Shapes are c_attn of 15B, 1B
and 3B for 32 rows of one token, c_fc of 15B, and a prompt's pass of 4 x 512 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.gpu.items import Stage, main


class Shape(NamedTuple):
    """A projection, the batch, and the ranks in the groups that are measured together."""

    preset: str
    target: str
    rows: int
    tokens: int
    ranks: tuple[tuple[int, ...], ...]
    forms: tuple[str, ...] = ("batched", "ragged")
    kinds: tuple[str, ...] = ("base", "flora", "lora")


SHAPES = (
    Shape("15b", "attn.c_attn", 32, 1, ((1, 8, 32), (2, 4, 16, 64))),
    Shape("1b", "attn.c_attn", 32, 1, ((1, 4, 8, 32),)),
    Shape("3b", "attn.c_attn", 32, 1, ((1, 4, 8, 32),)),
    Shape("15b", "attn.c_attn", 4, 512, ((1, 8),), ("batched", "merged")),
    Shape("15b", "mlp.c_fc", 32, 1, ((1, 8),)),
    Shape(
        "15b", "attn.c_attn", 32, 1, ((1, 8),), ("einsum", "vmap", "batched", "ragged", "merged"),
        ("base", "flora", "lora", "ia3", "hira"),
    ),
)  # fmt: skip
TINY = (
    Shape("mini", "attn.c_attn", 2, 1, ((1, 3),), ("batched", "ragged")),
    Shape("mini", "attn.c_attn", 2, 4, ((2,),), ("einsum", "merged")),
)


def stage(own: Stage, _: list[str]) -> None:
    import jax

    from flora_jax.bench.layer import measure as layer
    from flora_jax.bench.layer.options import LayerOptions, projection_of

    for shape in TINY if own.rehearse else SHAPES:
        for ranks in shape.ranks:
            about = {
                "preset": shape.preset, "target": shape.target, "rows": shape.rows,
                "tokens": shape.tokens,
            }  # fmt: skip
            options = LayerOptions(
                *projection_of(shape.preset, shape.target), batch=shape.rows, length=shape.tokens,
                ranks=ranks, kinds=shape.kinds, forms=shape.forms,
                dtype="float32" if own.rehearse else "float16",
                repeats=1 if own.rehearse else 5, measure_limits=False,
            )  # fmt: skip

            def measure(options: LayerOptions = options, about: Any = about) -> Mapping[str, Any]:
                measured = layer.measure(options)
                sizes = {"inputs": options.inputs, "outputs": options.outputs}
                for row in measured["results"]:
                    put_case(own, row, about | sizes | {"dtype": options.dtype})
                for row in measured["eq7"]:
                    own.put("eq7", **about, **sizes, **row)
                overhead, cached = measured["overhead_seconds"], measured["from_cache"]
                return {"overhead_us": 1e6 * overhead, "from_cache": cached, **_words(options)}

            own.attempt("shape", measure, need_s=0 if own.rehearse else 20, **about)
            jax.clear_caches()


def put_case(own: Stage, row: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """The line of one case: its times in microseconds, or why it has none."""
    names = {name: row[name] for name in ("kind", "form", "rank")}
    if row["seconds"] is None:
        own.put("case", **names, **about, skipped=row["skipped"])
        return
    times = {
        name.replace("seconds", "us"): 1e6 * row[name]
        for name in ("seconds", "seconds_q1", "seconds_q3", "build_seconds")
        if name in row
    }
    rest = {name: row[name] for name in ("relative", "calls") if name in row}
    own.put("case", **names, **about, **times, **rest)


def _words(options: Any) -> dict[str, Any]:
    chosen = dataclasses.asdict(options)
    return {name: list(chosen[name]) for name in ("ranks", "kinds", "forms")}


if __name__ == "__main__":
    main(stage)
