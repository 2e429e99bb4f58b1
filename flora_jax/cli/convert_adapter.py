"""``flora-jax convert-adapter``: an adapter of one kind as one of another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flora_jax.cli.common import MODEL_HELP
from flora_jax.files import require_new

if TYPE_CHECKING:
    from flora_jax.adapters.model_adapter import ModelAdapter
    from flora_jax.peft.convert import Converted

Kind = Literal["flora", "lora", "hira", "dora"]


def convert_adapter(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A folder, or a shipped adapter.")
    ],
    base: Annotated[str, typer.Option(metavar="MODEL", help=f"Of the adapter. {MODEL_HELP}")],
    to: Annotated[Kind, typer.Option(help="The kind to make.")],
    output: Annotated[Path, typer.Option(help="A directory that is new or empty.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="At most. Default: the exact one, else ADAPTER's.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option(help="The nearest where none is the same; its error is in the card.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the fit's starts.")] = 0,
) -> None:
    """Writes an adapter as another kind: the same weights where it can be, else the nearest.

    Without data: errors are those of the adapted weights, relative to how far the adapter moves them.
    """
    from flora_jax.checkpoints import open_checkpoint
    from flora_jax.peft.convert import Base, convert
    from flora_jax.peft.read import read_adapter
    from flora_jax.peft.write import write_adapter
    from flora_jax.shipped import adapter_source
    from flora_jax.terminal import say

    require_new(output)
    opened = open_checkpoint(base)
    folder = adapter_source(source)
    adapter = read_adapter(folder, opened.config.projections(), opened.config.n_layer)
    model = opened.load("float32")
    made = convert(
        adapter, to, Base(model.weight, model.bias), rank=rank, approximate=approximate, seed=seed
    )
    write_adapter(made.adapter, output, base, card=_card(adapter, made, base))
    say(f"{output}: {_how_well(made)}")


def _how_well(made: Converted) -> str:
    whole = len(made.differences)
    if len(made.exact) == whole:
        return f"the same weights in all {whole} projections, to rounding"
    bias = max(found.bias for found in made.differences.values())
    lost = f"; of biases up to {bias:.2%} is lost" if bias else ""
    return (
        f"{made.total:.1%} of the adapter's change of the weights is left as error; "
        f"{len(made.exact)} of {whole} projections are the same{lost}"
    )


def _card(source: ModelAdapter, made: Converted, base: str) -> str:
    adapter, targets = made.adapter, made.adapter.targets()
    rows = []
    for target in targets:
        own = [found for (_, name), found in made.differences.items() if name == target]
        same = sum((layer, target) in made.exact for layer in range(len(adapter.layers)))
        rows.append(
            f"| {target} | {source.rank(target)} | {adapter.rank(target)} | {same} of {len(own)} | "
            f"{max(found.weight for found in own):.4f} | {max(found.bias for found in own):.4f} |"
        )
    return _CARD.format(
        source=source.kind, kind=adapter.kind, base=base, parameters=adapter.parameters(),
        how=_how_well(made), rows="\n".join(rows),
    )  # fmt: skip


_CARD = """# {kind}, made of {source}

An adapter of kind {kind} for {base}, converted from one of kind {source} by `flora-jax convert-adapter`
without data: {how}. It has {parameters} parameters.

Errors are the largest of the target's layers: of weights ‖to - from‖ / ‖from - base‖ (0 is the same, 1 no
better than no adapter), of biases ‖to - from‖ / ‖base‖.

| target | rank before | rank | the same | weights' error | biases' error |
|---|---|---|---|---|---|
{rows}
"""
