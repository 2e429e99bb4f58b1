"""The paper's table from the results of several methods: Markdown, CSV, JSON, and a bar chart."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_jax.errors import InputError
from flora_jax.evaluate.languages import LANGUAGES
from flora_jax.evaluate.pass_at_k import Comparison
from flora_jax.files import whole_directory, whole_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summaries = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By method and language, as in ``summary.json``."""


@dataclass(frozen=True)
class Cell:
    """One method in one language: pass@k and its error over problems as shares of 1.

    ``relative`` is the improvement to the base as a share of it, ``None`` without a base or where
    the base passes nothing.
    """

    language: str
    method: str
    k: int
    value: float
    stderr: float | None
    relative: float | None
    problems: int
    samples: int
    statuses: Mapping[str, int]


def table(summaries: Summaries, k: int = 1, base: str | None = None) -> list[Cell]:
    """Every language of every method, by language in the order of the table of languages.

    Raises:
        InputError: ``base`` is no method, or some language has too few samples for ``k``.
    """
    if base is not None and base not in summaries:
        raise InputError(f"--base is {base!r}, expected one of {', '.join(summaries)}")
    order = list(LANGUAGES)
    named = {language for found in summaries.values() for language in found}
    languages = sorted(named, key=lambda name: order.index(name) if name in order else len(order))
    cells = []
    for language in languages:
        for method, found in summaries.items():
            if language not in found:
                continue
            summary = found[language]
            if f"pass@{k}" not in summary:
                raise InputError(
                    f"{method}, {language}: no pass@{k}, the fewest samples of a problem are "
                    f"{summary['samples_per_problem'][0]}"
                )
            of_base = summaries[base].get(language, {}).get(f"pass@{k}") if base else None
            value = summary[f"pass@{k}"]
            cells.append(
                Cell(
                    language, method, k, value, summary["stderr" if k == 1 else f"stderr@{k}"],
                    (value - of_base) / of_base if of_base and method != base else None,
                    summary["problems"], summary["samples"], summary["statuses"],
                )
            )  # fmt: skip
    return cells


def markdown_text(text: str) -> str:
    """``text`` as Markdown shows it unchanged, also in a cell of a table."""
    # Underscores within words are not markup.
    return re.sub(r"([\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def to_markdown(cells: Sequence[Cell]) -> str:
    """Percent, the error over problems, and in brackets the improvement relative to the base."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    by_place = {(cell.language, cell.method): cell for cell in cells}
    shown = [markdown_text(method) for method in methods]
    lines = ["| language | " + " | ".join(shown) + " |", "|---" * (len(methods) + 1) + "|"]
    for language in dict.fromkeys(cell.language for cell in cells):
        row = [_shown(by_place.get((language, method))) for method in methods]
        lines.append(f"| {markdown_text(_name(language))} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    error = "" if cell.stderr is None else f" ± {100 * cell.stderr:.2f}"
    relative = "" if cell.relative is None else f" ({100 * cell.relative:+.2f} %)"
    return f"{100 * cell.value:.2f}{error}{relative}"


def failures_markdown(cells: Sequence[Cell]) -> str:
    """The share of samples by class, in percent."""
    classes = sorted({status for cell in cells for status in cell.statuses})
    lines = [
        "| language | method | " + " | ".join(classes) + " |",
        "|---" * (len(classes) + 2) + "|",
    ]
    for cell in cells:
        shares = [f"{100 * cell.statuses.get(status, 0) / cell.samples:.1f}" for status in classes]
        head = f"| {markdown_text(cell.language)} | {markdown_text(cell.method)} | "
        lines.append(head + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def comparison_markdown(compared: Mapping[str, Comparison]) -> str:
    """In percent: the difference with its 95 % interval, and problems better and worse."""
    lines = ["| language | problems | first | second | difference | 95 % interval | better | worse |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for language, one in compared.items():
        lines.append(
            f"| {markdown_text(language)} | {one.problems} "
            f"| {100 * one.first:.2f} | {100 * one.second:.2f} "
            f"| {100 * one.difference:+.2f} | {100 * one.low:+.2f} to {100 * one.high:+.2f} "
            f"| {one.better} | {one.worse} |"
        )
    return "\n".join(lines) + "\n"


def to_csv(cells: Sequence[Cell]) -> str:
    file = io.StringIO()
    fields = "language method k value stderr relative problems samples".split()
    writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(cell) for cell in cells)
    return file.getvalue()


FILES = ("table.md", "table.csv", "table.json", "table.png")


def write_report(cells: Sequence[Cell], directory: Path, overwrite: bool = False) -> list[Path]:
    """Writes a directory with the :data:`FILES`.

    Raises:
        InputError: it is there already; with ``overwrite``, only if it holds anything else.
    """
    texts = {
        "table.md": to_markdown(cells) + "\n" + failures_markdown(cells),
        "table.csv": to_csv(cells),
        "table.json": json.dumps([asdict(cell) for cell in cells], indent=1) + "\n",
    }
    with whole_directory(directory, FILES if overwrite else ()) as part:
        for name, content in texts.items():
            (part / name).write_text(content, encoding="utf-8")
        draw(cells, part / "table.png")
    return [directory / name for name in FILES]


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Writes :func:`figure` as a PNG."""
    drawn = figure(cells)
    with whole_path(path) as part:
        drawn.savefig(part, format="png", dpi=150)


def figure(cells: Sequence[Cell]) -> Figure:
    """A group of bars for each language, a bar for each method, with the error over problems."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(cell.method for cell in cells))
    languages = list(dict.fromkeys(cell.language for cell in cells))
    drawn = Figure(figsize=(max(6.0, 1.3 * len(languages)), 4), layout="constrained")
    axes = drawn.add_subplot()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        own = [cell for cell in cells if cell.method == method]
        axes.bar(
            [languages.index(cell.language) + (number + 0.5) * width - 0.4 for cell in own],
            [100 * cell.value for cell in own],
            width,
            yerr=[100 * (cell.stderr or 0.0) for cell in own],
            label=method,
            capsize=2,
        )
    axes.set_xticks(range(len(languages)), [_name(language) for language in languages])
    axes.set_ylabel(f"pass@{cells[0].k}, %")
    axes.set_ylim(bottom=0)
    # By name: a legend of its own accord leaves out what begins with an underscore. Names are the
    # user's, never formulas.
    for text in axes.legend(axes.containers[1::2], methods).get_texts():
        text.set_parse_math(False)
    return drawn


def _name(language: str) -> str:
    return LANGUAGES[language].name if language in LANGUAGES else language
