"""How results leave a benchmark: a JSON file that appears whole, a table, a picture.

Knows nothing of what was measured. Importing it brings in neither JAX nor matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flora_jax.bench.receipts import machine
from flora_jax.files import Target, whole_file, whole_path

Points = Sequence[tuple[float, float | None]]


def write_results(path: Target, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``payload`` as JSON with ``command``, ``date``, ``machine`` and ``versions`` in front.

    Entries of the payload under these names win. Numbers of NumPy become plain ones, and a number
    that is not finite becomes ``null``. Returns what was written.
    """
    whole = _plain(machine.receipt() | dict(payload))
    with whole_file(path) as file:
        json.dump(whole, file, indent=1, allow_nan=False)
        file.write("\n")
    return whole


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]
) -> None:
    """Prints a table: ``columns`` are the keys shown, or a mapping from key to heading.

    Numbers stand at the right with four digits; ``None`` and what a row lacks is a dash.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    shown = Table(title=title, title_justify="left")
    for key, heading in headings.items():
        numeric = all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
        shown.add_column(heading, justify="right" if numeric else "left")
    for row in rows:
        shown.add_row(*(Text(_cell(row.get(key))) for key in headings))
    console = Console()
    if not console.is_terminal:  # A file or a pipe has no width to fit into.
        console = Console(width=200)
    console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def plot_lines(
    path: Target,
    series: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    title: str,
    logx: bool = False,
    logy: bool = False,
) -> None:
    """Writes a PNG with a line for every series of ``(x, y)``; ``y`` of ``None`` is a gap."""
    plot_panels(path, {title: series}, xlabel, ylabel, logx=logx, logy=logy)


def plot_panels(
    path: Target,
    panels: Mapping[str, Mapping[str, Points]],
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    logy: bool = False,
) -> None:
    """The same with a panel for every title, side by side; a name has one colour in all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    beside = len(names) > 6
    figure = Figure(figsize=(1 + 6 * len(panels) + 2 * beside, 4.5), layout="constrained")
    axes_of = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, series) in zip(axes_of, panels.items(), strict=True):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, parse_math=False)
        for name, points in series.items():
            number = names.index(name)
            xs = [x for x, _ in points]
            ys = [math.nan if y is None else y for _, y in points]
            # Colours repeat after ten; the dashes tell the next ten apart.
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(xs, ys, "o", linestyle=style, color=f"C{number % 10}", label=name)
        known = [(x, y) for points in series.values() for x, y in points if y is not None]
        if logx and known:
            ticks = sorted({x for x, _ in known})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        if logy and known:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            ys = [y for _, y in known]
            axes.yaxis.set_minor_formatter("{x:.2g}" if max(ys) < 10 * min(ys) else "")
        axes.grid(alpha=0.3)
        if series and not beside:
            _as_they_are(axes.legend(fontsize="small"))
    if beside:
        shown: dict[Any, Any] = {}
        for axes in axes_of:
            handles, labels = axes.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
        _as_they_are(
            figure.legend(
                list(shown.values()), list(shown), fontsize="small", loc="outside right center"
            )
        )
    with whole_path(path) as part:
        FigureCanvasAgg(figure).print_png(part)


def _as_they_are(legend: Any) -> None:
    """Names are the user's text, never formulas."""
    for text in legend.get_texts():
        text.set_parse_math(False)
