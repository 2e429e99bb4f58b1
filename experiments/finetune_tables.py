"""The tables of experiments/finetune_mini.py's results, as Markdown.

    python experiments/finetune_tables.py

Reads experiments/results/finetune_mini.jsonl and writes finetune_mini.md beside it. A change is to the
base on the same held-out windows, with its 95 % interval; fewer bits per byte are better. Runs that
differ in their seed alone are one row: means, and the least and the largest change in place of intervals.
Every model that the package has had, and every length of windows, has tables of its own, newest first.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "finetune_mini.jsonl"
TITLES = {
    "sweep": "Learning rates, Perl, rank 1 on c_attn",
    "languages": "Seven languages, rank 1 on c_attn, one run a kind",
    "ranks": "Ranks, placements and seeds",
    "inits": "How FLoRA of rank 4 starts",
}
HEAD = (
    "run", "language", "rate", "parameters", "bits per byte", "change", "accuracy, %", "change, points",
)  # fmt: skip


def row(line: dict[str, Any]) -> list[str]:
    """A result's cells."""
    low, high = line["bits_per_byte_change_95"]
    least, most = line["accuracy_change_95"]
    return [
        line["run"],
        line["language"],
        f"{line['learning_rate']:g}",
        f"{line['parameters']:,}",
        f"{line['bits_per_byte']:.3f}",
        f"{line['bits_per_byte_change']:+.3f} [{low:+.3f}, {high:+.3f}]",
        f"{100 * line['accuracy']:.2f}",
        f"{100 * line['accuracy_change']:+.2f} [{100 * least:+.2f}, {100 * most:+.2f}]",
    ]


def seeds_row(lines: list[dict[str, Any]]) -> list[str]:
    """The cells of one run under several seeds."""
    bits = [line["bits_per_byte_change"] for line in lines]
    points = [100 * line["accuracy_change"] for line in lines]
    name, _, _ = lines[0]["run"].rpartition("-seed")
    return [
        name,
        lines[0]["language"],
        f"{lines[0]['learning_rate']:g}",
        f"{lines[0]['parameters']:,}",
        str(len(lines)),
        f"{statistics.mean(line['bits_per_byte'] for line in lines):.3f}",
        f"{statistics.mean(bits):+.3f} ({min(bits):+.3f} to {max(bits):+.3f})",
        f"{100 * statistics.mean(line['accuracy'] for line in lines):.2f}",
        f"{statistics.mean(points):+.2f} ({min(points):+.2f} to {max(points):+.2f})",
    ]


def seeds_table(lines: list[dict[str, Any]]) -> str:
    """A row for each run and language, in the order in which the first seed ran."""

    def key(line: dict[str, Any]) -> tuple[str, str]:
        return line["run"].rpartition("-seed")[0], line["language"]

    order = list(dict.fromkeys(map(key, lines)))
    grouped = itertools.groupby(sorted(lines, key=lambda line: order.index(key(line))), key)
    head = [*HEAD[:4], "seeds", *HEAD[4:]]
    return table(head, (seeds_row(list(own)) for _, own in grouped))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spectra(lines: list[dict[str, Any]]) -> str:
    """The singular values of what was learned, layer by layer."""
    rows = [
        [line["run"], line["language"], str(number), ", ".join(f"{v:.3f}" for v in values)]
        for line in lines
        for number, values in enumerate(line["spectrum"])
    ]
    text = "\nSingular values of `s·BᵀA - 1` (the largest six):\n\n"
    return text + table(("start", "language", "layer", "values"), rows)


def main() -> None:
    """Writes and prints the tables, the newest model's first."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    parts = ["# Fine-tuning the embedded model", "`experiments/finetune_mini.py` says how."]

    def made_of(line: dict[str, Any]) -> tuple[str, int]:
        return line["model"], line["length"]

    for model, length in reversed(dict.fromkeys(map(made_of, lines))):
        own = [line for line in lines if made_of(line) == (model, length)]
        parts += [f"## {model}, windows of {length} tokens", *sections(own)]
    text = "\n\n".join(parts) + "\n"
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


def sections(lines: list[dict[str, Any]]) -> Iterator[str]:
    """The tables of one model and length."""
    for stage, title in TITLES.items():
        for steps in sorted({line["steps"] for line in lines if line["stage"] == stage}):
            own = [line for line in lines if (line["stage"], line["steps"]) == (stage, steps)]
            yield f"### {title}: {steps} steps"
            yield seeds_table(own) if stage == "ranks" else table(HEAD, map(row, own))
            if stage == "inits":
                yield spectra(own)
            elsewhere = [line for line in own if "on_windows_of" in line]
            for length in dict.fromkeys(n for line in elsewhere for n in line["on_windows_of"]):
                yield f"### The same adapters on windows of {length} tokens"
                yield table(HEAD, (row(line | line["on_windows_of"][length]) for line in elsewhere))


if __name__ == "__main__":
    main()
