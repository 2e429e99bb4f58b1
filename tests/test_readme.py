"""What the README shows is run as written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command, directory, **environment):
    """Runs with this environment's programs first on the path; fails with the output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = dict(os.environ, PATH=path) | environment
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_library_examples_and_the_command_work_together(tmp_path):
    # The examples' programs compile longer than they run.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for source in blocks("python"):
        run([sys.executable, "-c", source], tmp_path, **quick)
    (command,) = [block for block in blocks("sh") if "flora-jax generate" in block]
    run(["bash", "-euc", command], tmp_path, **quick)
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    completions = [json.loads(line) for line in lines]
    assert [c["adapter"] for c in completions] == [None, "mine", "mine", None]
    # A fresh adapter is the identity: the greedy rows agree.
    assert completions[0]["token_ids"] == completions[1]["token_ids"]


def test_the_demo_checks_every_row_against_itself_alone(tmp_path):
    done = run(["flora-jax", "demo", "--max-tokens", "4"], tmp_path)
    assert "12 of 12 rows have the same tokens as when they run alone" in " ".join(
        done.stdout.split()
    )


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"\.venv/bin/(pytest[^\n]*)", "\n".join(blocks("sh")))
    assert ci.rstrip().endswith(command)


@pytest.mark.parametrize("name", ["mini"])
def test_the_embedded_model_is_small_and_has_its_card(name):
    folder = ROOT / "flora_jax" / "assets" / name
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sizes.keys()
    assert sizes["model.safetensors"] <= 12_000_000
    assert re.search(r"\| python \| \d\.\d{3} \| [\d,]+ \|", (folder / "README.md").read_text())
