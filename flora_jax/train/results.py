"""What a finished run leaves: adapter folders with their cards, and the curve as a picture."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.files import whole_path
from flora_jax.peft.write import write_adapter
from flora_jax.train.options import CURVE, METRICS, TrainOptions

_CARD = """# {name}: {kind} of rank {rank} for {model}

{parameters:,} parameters on {targets}, trained by `flora-jax train` with these options (its
`config.json`):

```json
{options}
```

{training}
{validation}
Written by flora_jax with jax {jax} on {device}.
"""
# Of a run that was resumed at its last step, without the file of its losses.
_NO_LOSSES = f"The training losses are not known: {METRICS} was lost."


def write_results(
    options: TrainOptions,
    output: Path,
    adapters: Mapping[str, ModelAdapter],
    say: Callable[[str], None],
) -> None:
    """Writes every adapter folder that is not there yet, and then ``curve.png``."""
    lines = _lines_of(output)
    for name, adapter in adapters.items():
        if not (output / name).exists():
            card = _card(options, name, adapter, lines)
            write_adapter(adapter, output / name, options.model, card=card)
    write_curve(output, list(adapters), say)


def write_curve(output: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Writes ``curve.png`` unless it is there; one that cannot be drawn is a line for the user, as is one
    of a run whose losses are lost.

    The picture repeats what ``metrics.jsonl`` holds: it is never worth a finished run.
    """
    path = output / CURVE
    if path.exists():
        return
    try:
        lines = _lines_of(output)
        if not any("loss" in line for line in lines):
            say(f"warning: {path} is not drawn: {output / METRICS} has no training losses")
            return
        draw_curve(lines, names, path)
    except Exception as error:  # Fonts, caches and configuration files, all of the user's.
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"warning: {path} is not drawn ({cause}); metrics.jsonl has its numbers")


def _lines_of(output: Path) -> list[dict[str, Any]]:
    path = output / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plain(text: str) -> str:
    """User text as Markdown that reads as the text itself, also in a table."""
    return re.sub(r"([\\`*_\[\]<>|$~&#])", r"\\\1", text)


def _loss_of(line: Mapping[str, Any], name: str) -> float | None:
    losses = line.get("losses")
    return line.get("loss") if losses is None else losses[name]


def _training(first: Mapping[str, Any], last: Mapping[str, Any], name: str) -> str:
    return (
        f"Training loss {_loss_of(first, name):.4f} at step {first['step']}, "
        f"{_loss_of(last, name):.4f} at step {last['step']} (nats a token)."
    )


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
        name=plain(name),
        kind=options.kind,
        rank=options.rank,
        model=plain(options.model),
        parameters=adapter.parameters(),
        targets=", ".join(adapter.targets()),
        options=options.model_dump_json(indent=1),
        training=_training(trained[0], trained[-1], name) if trained else _NO_LOSSES,
        validation="\n".join(["Validation:", *head, *rows, ""]) if rows else "",
        jax=jax.__version__,
        device=jax.devices()[0].device_kind,
    )


def draw_curve(lines: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    """The losses in nats over the steps: training thin, validation thick with dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    curves = []
    for number, name in enumerate(names):
        colour = f"C{number % 10}"
        trained = [(line["step"], _loss_of(line, name)) for line in lines if "loss" in line]
        (curve,) = axes.plot(*zip(*trained), color=colour, alpha=0.5, linewidth=1)
        curves.append((curve, f"{name}, training"))
        measured = [
            (line["step"], line["validation"][name]["loss"])
            for line in lines
            if name in line.get("validation", {})
        ]
        if measured:
            (curve,) = axes.plot(*zip(*measured), "o-", color=colour)
            curves.append((curve, f"{name}, validation"))
    axes.grid(alpha=0.3)
    legend = axes.legend(
        [curve for curve, _ in curves], ["curve"] * len(curves),
        fontsize="small", ncols=1 + len(names) // 8,
    )  # fmt: skip
    # Set here and not as labels: names are not mathematics, and one may start with an underscore.
    for entry, (_, label) in zip(legend.get_texts(), curves, strict=True):
        entry.set_parse_math(False)
        entry.set_text(label)
    with whole_path(path) as part, warnings.catch_warnings():
        # The font may lack characters of a name; the picture has boxes there.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        FigureCanvasAgg(figure).print_png(part)
