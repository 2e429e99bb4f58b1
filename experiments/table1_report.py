"""Tables, comparisons and charts of Table 1 from the results of its methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_jax.evaluate import tables
from flora_jax.evaluate.languages import OK, SYNTAX_ERROR
from flora_jax.evaluate.results import Result, compare_results, read_results, summarise
from flora_jax.files import whole_file

LOSSES = Path(__file__).parent / "results" / "finetune_mini.jsonl"


def write(
    preset: str, runs: Path, methods: Sequence[str], receipt: Mapping[str, Any], results: Path
) -> None:
    """Writes ``table1_PRESET.md`` and, for pass@1 and pass@10, CSV, JSON and PNG."""
    found = {method: read_results(runs / method) for method in methods}
    summaries = {method: summarise(own) for method, own in found.items()}
    samples = min(len(one.statuses) for own in found.values() for one in own)
    lines = [f"# Table 1, {preset}", ""]
    lines += [f"- {name}: {_shown(value)}" for name, value in receipt.items()]
    some = next(iter(summaries["base"].values()))
    lines += [f"- samples of a problem: {some['samples_per_problem'][0]}", "", outcomes(found), ""]
    for k in (1, 10):
        if k > samples:
            continue
        cells = tables.table(summaries, k, "base")
        lines += [
            f"## pass@{k}, %: ± standard error over problems (improvement relative to the base)",
            "", tables.to_markdown(cells),
        ]  # fmt: skip
        name = f"table1_{preset}_pass{k}"
        for ending, text in (
            ("csv", tables.to_csv(cells)),
            ("json", json.dumps([cell.__dict__ for cell in cells], indent=1) + "\n"),
        ):
            with whole_file(results / f"{name}.{ending}") as file:
                file.write(text)
        tables.draw(cells, results / f"{name}.png")
    lines += ["## Samples by outcome, %", "", tables.failures_markdown(tables.table(summaries))]
    for method in methods[1:]:
        compared = compare_results(found["base"], found[method], min(10, samples))
        lines += [
            f"## pass@{min(10, samples)} of {method} (second) against the base (first), paired", "",
            tables.comparison_markdown(compared),
        ]  # fmt: skip
    if preset == "mini":
        lines += _losses()
    with whole_file(results / f"table1_{preset}.md") as file:
        file.write("\n".join(lines))


def outcomes(found: Mapping[str, Sequence[Result]]) -> str:
    """How many samples of all methods pass, and how many more at least start."""
    statuses = [status for own in found.values() for one in own for status in one.statuses]
    passed, ran = statuses.count(OK), sum(status not in (OK, SYNTAX_ERROR) for status in statuses)
    return (
        f"Of {len(statuses):,} samples under all methods {passed:,} pass, {ran:,} more get past the "
        "compiler or parser."
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.0f}" for name, number in value.items())
    return f"`{value}`" if isinstance(value, str) and value.startswith("python ") else str(value)


def _losses() -> list[str]:
    """What the adapters do to held-out files, where programs that pass are too few to tell."""
    rows = [json.loads(line) for line in LOSSES.read_text(encoding="utf-8").splitlines()]
    # What ships was trained on these windows.
    rows = [row for row in rows if (row["stage"], row["length"]) == ("languages", 256)]
    lines = [
        "## Held-out files: change by the adapter, with 95 % intervals", "",
        "From `experiments/finetune_mini.py languages`.", "",
        "| language | method | bits per byte | next-token accuracy, points |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        # The file also has the models that the package had before.
        if row["model"] == rows[-1]["model"]:
            low, high = row["bits_per_byte_change_95"]
            least, most = (100 * share for share in row["accuracy_change_95"])
            lines.append(
                f"| {row['language']} | {row['kind']} | {row['bits_per_byte_change']:+.3f} "
                f"[{low:+.3f}, {high:+.3f}] | {100 * row['accuracy_change']:+.2f} "
                f"[{least:+.2f}, {most:+.2f}] |"
            )
    return [*lines, ""]
