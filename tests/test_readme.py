"""What the README and the guides show is run as written."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flora_jax.demo import PROMPTS
from flora_jax.shipped import shipped_adapters

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


# The examples' programs compile longer than they run.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(command, directory, **environment):
    """Runs with this environment's programs first on the path; fails with the output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = dict(os.environ, PATH=path) | environment
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_lines_of_python_run_as_they_stand(tmp_path):
    (source,) = blocks("python")
    done = run([sys.executable, "-c", source], tmp_path, **QUICK)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["None", "perl", "lua"]


def test_the_lines_of_shell_run_as_they_stand(tmp_path):
    (tmp_path / "flora_jax").symlink_to(ROOT / "flora_jax")
    (command,) = [block for block in blocks("sh") if "flora-jax generate" in block]
    run(["bash", "-euc", command], tmp_path, **QUICK)
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["adapter"] for line in lines] == ["perl", None]
    config = json.loads((tmp_path / "runs/mine/mine/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("FLORA", 2)


# Streams a completion under each adapter, all at once.
STREAMS = """
import asyncio, openai

async def one(client, name):
    parts = await client.completions.create(
        model=name, prompt="\\n", max_tokens=24, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )
    return name, len([part async for part in parts if part.choices[0].text])

async def main():
    async with openai.AsyncOpenAI(base_url="http://localhost:PORT/v1", api_key="none") as client:
        names = [card.id async for card in client.models.list() if card.parent]
        for name, parts in await asyncio.gather(*(one(client, name) for name in names)):
            print(name, parts)

asyncio.run(main())
"""


def test_the_server_runs_as_it_stands_and_streams_seven_languages_at_once(tmp_path):
    """But for the port, which may be taken."""
    (command,) = [block for block in blocks("sh") if "flora-jax serve" in block]
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    command = command.replace("serve mini ", f"serve mini --port {port} ").replace("8000", port)
    (tmp_path / "streams.py").write_text(STREAMS.replace("PORT", port))
    # SIGTERM ends it with 0.
    ended = f"\n{sys.executable} streams.py\nkill $!\nwait $!\n"
    done = run(["bash", "-euc", command + ended], tmp_path, **QUICK)
    lines = done.stdout.splitlines()
    # curl ends no line.
    answer = json.JSONDecoder().raw_decode(lines[0])[0]
    assert answer["model"] == "perl"
    assert answer["usage"]["completion_tokens"] > 0
    streams = dict(line.split() for line in done.stdout.partition("}}")[2].split("\n") if line)
    assert set(streams) == {"d", "lua", "perl", "ruby", "rust", "racket", "swift"}
    assert all(int(parts) > 0 for parts in streams.values())


def test_the_guides_requests_are_completed_under_their_adapters(tmp_path):
    (command,) = [
        block for block in blocks("sh", "docs/guides/serve.md") if "flora-jax generate" in block
    ]
    run(["bash", "-euc", command], tmp_path, **QUICK)
    lines = (tmp_path / "mixed.completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["adapter"] for line in lines] == [None, "perl", "perl", None]


def test_the_training_example_leaves_two_adapters_and_goes_on_when_told_to(tmp_path):
    for name in ("flora_jax", "tests", "convert"):
        (tmp_path / name).symlink_to(ROOT / name)
    shown = blocks("sh", "docs/guides/train.md")
    (command,) = [block for block in shown if "flora-jax train" in block]
    cached = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **QUICK}
    done = run(["bash", "-euc", command], tmp_path, **cached)
    assert "nothing to do" in done.stderr
    lines = (tmp_path / "runs/two/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 10, 20]
    for name in ("library", "tests"):
        config = json.loads((tmp_path / "runs/two" / name / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("FLORA", 2)
    # What the guide then makes of one of them.
    (command,) = [block for block in shown if "--output runs/as-hira" in block]
    run(["bash", "-euc", command], tmp_path, **cached)
    config = json.loads((tmp_path / "runs/as-hira/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("HIRA", 3)


def test_no_two_examples_write_the_same_output():
    """Followed one after another in one directory, none is refused what another has left there."""
    writes = re.compile(
        r"""--output (\w[\w./-]*)|> (\w[\w.-]*) <<|flora_jax\.train\(\w+, "([^"]+)"\)"""
    )
    found = {}
    for page in ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]:
        for block in blocks("(?:sh|console|python)", page):
            for output in {"".join(groups) for groups in writes.findall(block)}:
                found.setdefault(output, []).append(page)
    assert {"requests.jsonl", "completions.jsonl", "runs/mine", "runs/two"} <= found.keys()
    assert {output: pages for output, pages in found.items() if len(pages) > 1} == {}


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 120


def test_the_demo_checks_every_row_against_itself_alone(tmp_path):
    done = run(["flora-jax", "demo", "--max-tokens", "4"], tmp_path)
    # A neutral prompt and every language's own under the base and FLoRA, one under all its kinds.
    kinds = sum(name.endswith("/lua") for name in shipped_adapters())
    rows = 1 + len(PROMPTS) + 2 * (len(PROMPTS) - 1) + 1 + kinds
    said = f"{rows} of {rows} rows have the same tokens as when they run alone"
    assert said in " ".join(done.stdout.split())


def test_every_language_of_the_demo_has_its_adapters():
    named = {f"{kind}/{language}" for kind in ("flora", "lora", "ia3") for language in PROMPTS}
    assert named <= {*shipped_adapters()}


@pytest.mark.parametrize("name", shipped_adapters())
def test_every_embedded_adapter_is_small_has_its_card_and_has_learned(name):
    folder = ROOT / "flora_jax/assets/adapters" / name
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert sizes.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert sum(sizes.values()) < 40_000
    card = (folder / "README.md").read_text()
    losses = [float(loss) for loss in re.findall(r"^\| \d+ \| (\d\.\d+) \|", card, re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"\.venv/bin/(pytest[^\n]*)", "\n".join(blocks("sh")))
    assert ci.rstrip().endswith(command)


@pytest.mark.parametrize("name", ["mini"])
def test_the_embedded_model_is_small_and_has_its_card(name):
    folder = ROOT / "flora_jax" / "assets" / name
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sizes.keys()
    assert sizes["model.safetensors"] <= 13_000_000
    assert re.search(r"\| python \| \d\.\d{3} \| [\d,]+ \|", (folder / "README.md").read_text())
