"""What a finished run leaves: adapter folders with their cards, and the curve as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.files import whole_path
from flora_jax.peft.write import write_adapter
from flora_jax.train.options import TrainOptions

_CARD = """# {name}: {kind} of rank {rank} for {model}

{parameters:,} parameters on {targets}, trained by `flora-jax train` with these options (its
`config.json`):

```json
{options}
```

Training loss {first:.4f} at step {first_step}, {last:.4f} at step {last_step} (nats a token).
{validation}
Written by flora_jax with jax {jax} on {device}.
"""


def write_results(
    options: TrainOptions,
    output: Path,
    adapters: Mapping[str, ModelAdapter],
    folders: Mapping[str, Path],
) -> None:
    """Writes ``curve.png`` and then every adapter folder that is not there yet."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    draw_curve(lines, list(adapters), output / "curve.png")
    for name, adapter in adapters.items():
        if not folders[name].exists():
            card = _card(options, name, adapter, lines)
            write_adapter(adapter, folders[name], options.model, card=card)


def _loss_of(line: Mapping[str, Any], name: str) -> float | None:
    losses = line.get("losses")
    return line.get("loss") if losses is None else losses[name]


def _card(
    options: TrainOptions, name: str, adapter: ModelAdapter, lines: list[dict[str, Any]]
) -> str:
    trained = [line for line in lines if "loss" in line]
    measured = [
        (line["step"], line["validation"][name])
        for line in lines
        if name in line.get("validation", {})
    ]
    rows = [
        f"| {step} | {found['loss']:.4f} | {found['bits_per_byte']:.4f} | {found['accuracy']:.4f} |"
        for step, found in measured
    ]
    head = ["", "| step | loss | bits per byte | accuracy |", "|---|---|---|---|"]
    return _CARD.format(
        name=name,
        kind=options.kind,
        rank=options.rank,
        model=options.model,
        parameters=adapter.parameters(),
        targets=", ".join(adapter.targets()),
        options=options.model_dump_json(indent=1),
        first=_loss_of(trained[0], name),
        first_step=trained[0]["step"],
        last=_loss_of(trained[-1], name),
        last_step=trained[-1]["step"],
        validation="\n".join(["Validation:", *head, *rows, ""]) if rows else "",
        jax=jax.__version__,
        device=jax.devices()[0].device_kind,
    )


def draw_curve(lines: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """The losses in nats over the steps: training thin, validation thick with dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    for number, name in enumerate(names):
        colour = f"C{number % 10}"
        trained = [(line["step"], _loss_of(line, name)) for line in lines if "loss" in line]
        axes.plot(*zip(*trained), color=colour, alpha=0.5, linewidth=1, label=f"{name}, training")
        measured = [
            (line["step"], line["validation"][name]["loss"])
            for line in lines
            if name in line.get("validation", {})
        ]
        if measured:
            axes.plot(*zip(*measured), "o-", color=colour, label=f"{name}, validation")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=1 + len(names) // 8)
    with whole_path(path) as part:
        FigureCanvasAgg(figure).print_png(part)
