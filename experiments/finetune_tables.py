"""The tables of experiments/finetune_mini.py's results, as Markdown.

    python experiments/finetune_tables.py

Reads experiments/results/finetune_mini.jsonl and writes finetune_mini.md beside it. A change is to the
base on the same held-out windows, with its 95 % interval; fewer bits per byte are better.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    """Writes and prints the tables."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    parts = ["# Fine-tuning the embedded model", "`experiments/finetune_mini.py` says how."]
    for stage, title in TITLES.items():
        for steps in sorted({line["steps"] for line in lines if line["stage"] == stage}):
            own = [line for line in lines if (line["stage"], line["steps"]) == (stage, steps)]
            parts += [f"## {title}: {steps} steps", table(HEAD, map(row, own))]
            if stage == "inits":
                parts.append(spectra(own))
    text = "\n\n".join(parts) + "\n"
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
