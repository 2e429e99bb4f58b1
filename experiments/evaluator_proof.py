"""Proves the evaluator on programs whose outcome is known, through the command that users have.

    python experiments/evaluator_proof.py DATA --output runs/proof

DATA holds ``multipl-e/humaneval-LANGUAGE.jsonl`` (problems) and ``solutions/humaneval-LANGUAGE.jsonl``
(programs known to pass). Every known-good program must pass. Every wrong one must fail: each good
problem with the body of another one, and each problem with a body that answers the same whatever it
is asked. Languages without a toolchain are left out and named. ``results/evaluator_proof.json`` has
the counts, the machine and every program that did not do what it should.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "evaluator_proof.json"
_CONSTANTS = {
    "d": "{\n    return typeof(return).init;\n}\n",
    "lua": "    return 'no answer'\nend\n",
    "pl": "    return 'no answer';\n}\n",
    "rb": "  'no answer'\nend\n",
    "rkt": '  "no answer")\n',
    "rs": "    return Default::default();\n",
    "swift": '    fatalError("no answer")\n',
}
"""A body for each language that is whole, and right for no problem."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def good_generations(data: Path, language: str) -> list[dict[str, Any]]:
    """A generation for each known-good program, continuing its problem's prompt where it does."""
    problems = {p["name"]: p for p in lines(data / f"multipl-e/humaneval-{language}.jsonl")}
    found = []
    for known in lines(data / f"solutions/humaneval-{language}.jsonl"):
        problem = problems[known["name"]]
        prompt, tests, completion = problem["prompt"], problem["tests"], known["solution"]
        if f"{prompt}{completion}\n{tests}" != known["program"]:
            prompt, completion = "", known["program"].removesuffix("\n" + tests)
            tests = tests if completion != known["program"] else ""
        found.append({
            "name": known["name"], "language": language, "prompt": prompt, "tests": tests,
            "stop_tokens": problem["stop_tokens"], "completions": [completion],
        })  # fmt: skip
    return found


def swapped_generations(good: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every good problem that has tests of its own with the body of another one.

    A whole program fits nowhere in another prompt, so that bodies move among their like.
    """
    found = []
    for like in (True, False):
        own = [one for one in good if one["tests"] and bool(one["prompt"]) == like]
        for one, other in zip(own, [*own[1:], *own[:1]]):
            if other is not one:
                found.append(one | {"completions": other["completions"]})
    return found


def constant_generations(data: Path, language: str) -> list[dict[str, Any]]:
    """Every problem with a body that gives one answer to everything."""
    return [
        {key: problem[key] for key in ("name", "language", "prompt", "tests", "stop_tokens")}
        | {"completions": [_CONSTANTS[language]]}
        for problem in lines(data / f"multipl-e/humaneval-{language}.jsonl")
    ]


def write_lines(path: Path, objects: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
    return path


def _evaluated(kind: str, generations: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Runs the command; statuses by language, and those that passed and did not by name."""
    output.mkdir(parents=True, exist_ok=True)
    file = write_lines(output / f"{kind}.jsonl", generations)
    command = [sys.executable, "-m", "flora_jax.cli", "evaluate", "multipl-e"]
    command += ["--load-generations", str(file), "--output", str(output / kind)]
    subprocess.run(command, check=True)
    results = lines(output / kind / "results.jsonl")
    run = json.loads((output / kind / "run.json").read_text(encoding="utf-8"))
    statuses: dict[str, Counter[str]] = {}
    for one in results:
        statuses.setdefault(one["language"], Counter()).update(one["statuses"])
    expected = {"OK"} if kind == "good" else {"SyntaxError", "Exception", "Timeout"}
    return {
        "programs": len(results),
        "statuses": {language: dict(sorted(found.items())) for language, found in statuses.items()},
        "unexpected": [one for one in results if not {*one["statuses"]} <= expected],
        "toolchains": run["toolchains"],
        "seconds": run["seconds"],
        "workers": run["workers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs programs whose outcome is known.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/proof"))
    arguments = parser.parse_args()
    from flora_jax.evaluate.doctor import examine
    from flora_jax.sandbox.sandbox import Sandbox

    findings = examine(Sandbox()).findings
    languages = [one.language for one in findings if one.state == "ready"]
    good = {language: good_generations(arguments.data, language) for language in languages}
    kinds = {
        "good": [one for found in good.values() for one in found],
        "swapped": [one for found in good.values() for one in swapped_generations(found)],
        "constant": [
            one for language in languages for one in constant_generations(arguments.data, language)
        ],
    }
    receipt: dict[str, Any] = {
        "command": f"python experiments/evaluator_proof.py DATA --output {arguments.output}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "left_out": [one.language for one in findings if one.state != "ready"],
    }
    for kind, generations in kinds.items():
        receipt[kind] = _evaluated(kind, generations, arguments.output)
    RESULTS.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    unexpected = {kind: len(receipt[kind]["unexpected"]) for kind in kinds}
    print({kind: receipt[kind]["programs"] for kind in kinds}, "unexpected:", unexpected)
    sys.exit(any(unexpected.values()))


if __name__ == "__main__":
    main()
