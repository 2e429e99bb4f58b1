"""``flora-jax serve`` as its users start it: bad options are one line and exit code 2."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from flora_jax.checkpoints import open_checkpoint
from flora_jax.cli.serve import ServeOptions, _adapters, _engine_options, _parts, _warm_up
from flora_jax.peft.write import write_adapter
from tests.helpers.program import program_in
from tests.helpers.random_adapters import random_adapter

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "flora_jax/assets/mini"

# A server whose engine's first step does not end.
HUNG = """
import threading
import flora_jax.serve.engine
from flora_jax import cli
from tests.helpers.http_server import ScriptedEngine

class Hung(ScriptedEngine):
    attention_note, programs = None, 1

    def __init__(self, *parts, **options):
        super().__init__()

    def warm_up(self, report):
        report("one", 1, 1)

    def step(self):
        threading.Event().wait()

flora_jax.serve.engine.Engine = Hung
cli.main()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    config = open_checkpoint(MINI).config
    write_adapter(random_adapter("lora", 0, config.projections(), 6, rank=2), home / "good")
    wide = {"attn.c_attn": (32, 48)}
    write_adapter(random_adapter("lora", 0, wide, 6, rank=2), home / "wide")
    shutil.copytree(home / "good", home / "broken")
    (home / "broken/adapter_model.safetensors").write_bytes(b"nothing")
    (home / "root").mkdir()
    return home


@pytest.fixture
def program(home, monkeypatch, capsys):
    """Runs the program; returns exit code and stderr."""
    run = program_in(home, monkeypatch, capsys, "serve")
    return lambda *words: run(*words)[::2]


@pytest.mark.parametrize(
    "options, words",
    [
        (["missing"], "missing"),
        (["mini", "--adapter", "x"], "--adapter is 'x', expected NAME=DIR"),
        (["mini", "--adapter", "x=nowhere"], "nowhere"),
        (["mini", "--adapter", "x=broken"], "broken/adapter_model.safetensors: not a whole"),
        (["mini", "--lora-modules", "y=good", "x=broken"], "broken/adapter_model.safetensors"),
        (["mini", "--lora-modules", "y=good", "x"], "--adapter is 'x', expected NAME=DIR"),
        (["mini", "--adapter", "mini=good"], "--adapter mini: the base has this name"),
        (["mini", "--lora-modules", '{"name": "x"}'], "--lora-modules is"),
        (
            ["mini", "--lora-modules", '{"name": "x", "path": "good", "more": 1}'],
            "--lora-modules is",
        ),
        (["mini", "--admin-key", "a"], "no adapter root"),
        (["mini", "--adapter-root", "root"], "no admin key"),
        (["mini", "--admin-key", "a", "--adapter-root", "nowhere"], "nowhere: no such directory"),
        (["mini", "--api-key", "a b\n"], "api_keys: a key is empty or has characters"),
        (["mini", "--chat-template", "nowhere"], "--chat-template nowhere: cannot be read"),
        (["mini", "--port", "70000"], "port"),
        (["mini", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: cannot listen"),
        (["mini", "--max-num-seqs", "0"], "max-num-seqs"),
        (["mini", "--max-model-len", "9999"], "max_model_len is 9999, the model has 512 positions"),
    ],
)
def test_bad_options_are_one_line_before_anything_listens(program, options, words):
    code, error = program(*options)
    assert (code, len(error.splitlines())) == (2, 1), error
    assert words in error


def test_a_port_that_is_taken_is_named(program):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = program("mini", "--port", port)
    assert (code, len(error.splitlines())) == (2, 1)
    assert f"--port {port}: cannot listen" in error


def test_an_adapter_of_another_base_ends_the_server_with_its_reason(program):
    code, error = program("mini", "--port", 0, "--adapter", "x=wide")
    assert code == 2
    assert "wide/adapter_model.safetensors" in error.splitlines()[-1]


def test_how_far_the_start_is_is_shown_to_whoever_started_the_server(monkeypatch, capsys):
    class Bar:
        @staticmethod
        def show(done, total, note):
            shown.append((note, done, total))

    @contextlib.contextmanager
    def bar(what, total):
        shown.append((what, 0, total))
        yield Bar

    def warm_up(report):
        for done, name in enumerate(("prefill", "decode"), 1):
            report(name, done, 2)

    shown, reported = [], []
    monkeypatch.setitem(_warm_up.__globals__, "progress", bar)
    _warm_up(SimpleNamespace(programs=2, warm_up=warm_up), lambda *told: reported.append(told))
    assert reported == [("prefill", 1, 2), ("decode", 2, 2)]
    assert shown == [("compile", 0, 2), *reported]
    assert capsys.readouterr().err == "compiling 2 programs\n"


def test_an_adapter_may_be_given_as_vllm_has_it(home, monkeypatch):
    monkeypatch.chdir(home)
    written = json.dumps({"name": "x", "path": "good", "base_model_name": "mini"})
    assert _adapters([written, "y=good"], ("mini",)) == {"x": Path("good"), "y": Path("good")}


def test_a_rank_reserves_room_for_every_kind_on_every_target():
    opened = open_checkpoint(MINI)
    options = _engine_options(ServeOptions("mini", max_lora_rank=4, max_loras=3), opened)
    assert (options.max_components, options.resident_adapters) == (5, 3)
    assert options.targets == tuple(opened.config.projections())
    assert options.max_logprobs == 20
    plain = _engine_options(ServeOptions("mini"), opened)
    assert (plain.max_components, plain.targets) == (None, ())
    later = ServeOptions("mini", adapter_root=Path("x"))
    assert _engine_options(later, opened).max_components == 17


@pytest.mark.parametrize("sizes, context", [
    ({"cache_tokens": 250}, 256), ({"max_model_len": 100, "cache_tokens": 250}, 100),
    ({"max_model_len": 300, "cache_tokens": 250}, 256), ({"max_model_len": 300}, 300),
])  # fmt: skip
def test_a_cache_smaller_than_the_context_is_told_as_the_context(sizes, context):
    parts = _parts(ServeOptions(str(MINI), **sizes))
    assert parts.served.limits.context == context
    assert {card.max_model_len for card in parts.served.cards([])} == {context}


def test_an_engine_that_hangs_ends_the_process_for_its_supervisor():
    command = [sys.executable, "-c", HUNG, "serve", "mini", "--port", "0", "--step-timeout", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("ready"):
                break
        (url,) = re.findall(r"http://\S+", lines[-1])
        answer = httpx.post(f"{url}/v1/completions", json={"model": "mini", "prompt": [1, 2]})
        last = process.stderr.read().splitlines()[-1]
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    said = ("listening", "compiling", "ready")
    assert [line.split()[0] for line in lines if line.startswith(said)] == [*said]
    assert process.returncode == 1
    assert last == "flora-jax: a step of the engine did not end within 2 s"
