"""The commands of the guide to evaluation are run as written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import toolchains
from tests.test_readme import blocks


def run(command, directory, codes=(0,), **environment):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # The programs compile longer than they run.
    env = {**os.environ, "PATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in codes, done.stderr
    return done.stdout


def found(word):
    (command,) = [block for block in blocks("sh", "docs/guides/evaluate.md") if word in block]
    return command


def test_the_doctor_names_every_language_and_how_to_install_it(tmp_path):
    # It ends with 1 where there is no sandbox.
    lines = run(found("evaluate doctor"), tmp_path, codes=(0, 1)).splitlines()
    # What is broken, not missing, has the reason on a line of its own.
    reasons = [line for line in lines[1:] if line.startswith(" ")]
    lines = [line for line in lines[1:] if not line.startswith(" ")][:7]
    broken = [line for line in lines if line.split()[1] == "broken"]
    assert len(reasons) == len(broken)
    names = [line.split()[0] for line in lines]
    assert names == ["D", "Lua", "Perl", "Ruby", "Racket", "Rust", "Swift"]
    assert all("ready" in line or "apt-get install" in line for line in lines if line not in broken)


@pytest.mark.toolchains
def test_the_file_s_example_passes_by_half(tmp_path):
    toolchains.need("rb")
    assert run(found("generations.jsonl --output runs/one"), tmp_path).startswith(
        "rb     pass@1 50.00 %"
    )
    summary = json.loads((tmp_path / "runs/one/summary.json").read_text())
    assert summary["rb"]["pass@1"] == 0.5


@pytest.mark.toolchains
def test_the_model_s_example_ends_in_a_table(tmp_path, shared_data):
    toolchains.need("pl", "rb")
    problems = shared_data / "multipl-e"
    printed = run(found("evaluate compare"), tmp_path, PROBLEMS=str(problems))
    assert "| Perl | 0.00 ± 0.00 | 0.00 ± 0.00 |" in printed
    assert {path.name for path in (tmp_path / "runs/table").iterdir()} == {
        f"table.{ending}" for ending in ("md", "csv", "json", "png")
    }
    exported = json.loads((tmp_path / "runs/bigcode/generations_multiple-pl.json").read_text())
    assert [len(one) for one in exported] == [2, 2]
