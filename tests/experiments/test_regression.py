"""The regression benchmark: what counts as a miss, and that its bounds and ratios belong together."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flora_jax.errors import InputError

FILE = Path(__file__).resolve().parents[2] / "experiments" / "regression.py"


@pytest.fixture
def script(monkeypatch):
    """The program; its times are ``script.seconds``, of a second where a test says nothing else."""
    spec = importlib.util.spec_from_file_location("regression", FILE)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "regression", script)
    monkeypatch.syspath_prepend(FILE.parent)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "prepare_jax", lambda: None)
    names = {n for r in script.RATIOS.values() for n in (r.measured, r.reference)}
    script.seconds = dict.fromkeys(names, 1.0)
    monkeypatch.setattr(script, "measure", lambda *_: script.seconds)
    script.host = {"host, a dispatch": 0.001}
    monkeypatch.setattr(script, "host_seconds", lambda: script.host)
    return script


def run(script, path, **options):
    given = {"preset": "mini", "rounds": 5, "update": False, "margin": 0.1, "bounds": path}
    script.main(**(given | options))


def test_a_contender_that_became_slower_than_its_bound_fails_with_its_name(
    script, tmp_path, capsys
):
    path = tmp_path / "bounds.json"
    run(script, path, update=True)
    run(script, path)
    script.seconds["decode flora 1"] = 1.05  # Within the margin.
    run(script, path)
    script.seconds["decode flora 1"] = 1.25
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(script, path)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "regression: decode, FLoRA r 1 / base: 0.800, expected at least 0.900\n"
    )


def test_every_call_of_a_program_reads_its_prompts(script, monkeypatch):
    """A cache of prefixes would have them from the second call on."""
    programs = importlib.import_module("regression_programs")
    made = []

    def fake(model, adapters, options):
        made.append(options)
        return SimpleNamespace(model=model, options=options, preload=list, config=model.config)

    monkeypatch.setattr(programs, "Engine", fake)
    _, engine, names = programs.build("mini", 0)
    programs.unmerged(engine, names["flora 8"], 0)
    monkeypatch.setattr(programs, "MANY", 9)
    programs.resident_programs("mini", 8, 8, 0)
    assert [options.prefix_caching for options in made] == [False] * 5


def test_a_host_that_became_slow_fails_with_its_milliseconds(script, tmp_path, capsys):
    path = tmp_path / "bounds.json"
    run(script, path, update=True)
    script.host["host, a dispatch"] = 0.0041
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(script, path)
    assert capsys.readouterr().err == (
        "regression: host, a dispatch: 4.10 ms, expected at most 3\n"
    )


def test_bounds_keep_the_margin_and_say_what_they_come_from(script, tmp_path):
    path = tmp_path / "bounds.json"
    script.seconds["long base"] = 0.5
    run(script, path, update=True, margin=0.2)
    found = json.loads(path.read_text())
    assert found["bounds"]["prefill 512, FLoRA r 8 / base"] == 0.4
    assert {*found["bounds"].values()} == {0.8, 0.4}
    assert {"machine", "command", "versions", "measured"} <= set(found)


def test_bounds_of_other_ratios_are_refused(script, tmp_path):
    path = tmp_path / "bounds.json"
    with pytest.raises(InputError, match=r"bounds\.json: no bounds .* --update writes them"):
        run(script, path)
    run(script, path, update=True)
    found = json.loads(path.read_text())
    del found["bounds"]["decode, FLoRA r 1 / base"]
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"11 ratios, expected 12: \['decode, FLoRA r 1 / base'\]"):
        run(script, path)


@pytest.mark.parametrize(
    "options, message",
    [({"rounds": 4}, "--rounds is 4, expected"), ({"margin": 1.0}, "--margin is 1.0, expected")],
)
def test_bad_options_are_named(options, message, script, tmp_path):
    with pytest.raises(InputError, match=message):
        run(script, tmp_path / "bounds.json", **options)
