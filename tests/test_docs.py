"""What the guides and the examples show is run, and the tables of options are those of the commands."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# The programs compile longer than they run.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def options_hook():
    spec = importlib.util.spec_from_file_location("_options", ROOT / "docs" / "_options.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


def run(code, directory):
    """Runs Python code in a process of its own and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env=os.environ | QUICK,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_python_block_of_the_guides_runs_as_written(tmp_path):
    (tmp_path / "some.py").write_text("x = 1\n" * 2000)
    blocks = [
        (str(page.relative_to(ROOT)), block)
        for page in PAGES
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(blocks) >= 5
    # One process: each block has a namespace of its own.
    run(f"for page, block in {blocks!r}: exec(compile(block, page, 'exec'), {{}})", tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(example, tmp_path):
    assert run(example.read_text(), tmp_path).strip()


def test_every_option_of_a_command_is_in_its_page():
    hook = options_hook()
    marked = {}
    for page in PAGES:
        text = page.read_text()
        for words in hook._MARK.findall(text):
            marked[words] = hook.on_page_markdown(text)
    assert {"generate", "train", "evaluate multipl-e", "plan"} <= marked.keys()
    for words, text in marked.items():
        for parameter in hook.command_of(words).params:
            assert (
                parameter.name == "help"
                or max(parameter.opts, key=len) in text
                or (parameter.name.upper() in text)
            ), (words, parameter.name)


def test_the_table_of_an_unknown_command_is_an_error():
    with pytest.raises(KeyError):
        options_hook().table("no-such-verb")


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env=os.environ | QUICK | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "site/guides/train/index.html").read_text()
    assert "--learning-rate" in text
    shutil.rmtree(tmp_path / "site")
