"""Time-outs say as much of the machine as of a program: they depend on no neighbour and are not kept."""

import json
import threading
import time

import pytest

from flora_jax.errors import InputError
from flora_jax.evaluate import execution, multipl_e, toolchains
from flora_jax.evaluate.completions import Generation
from flora_jax.evaluate.execution import Memory, Outcome, Runner, Task
from flora_jax.evaluate.languages import LANGUAGES, OK, TIMEOUT, limits
from flora_jax.evaluate.results import read_results
from flora_jax.jsonl import Journal
from flora_jax.sandbox.sandbox import Sandbox

PERL = LANGUAGES["pl"].toolchains[0]


@pytest.fixture
def crowded(monkeypatch):
    """Programs that run out of time beside any other, "loop" always; how many ran at once each time."""
    running, lock, seen = 0, threading.Lock(), []

    def execute(task):
        nonlocal running
        with lock:
            running += 1
        time.sleep(0.01)
        with lock:
            seen.append((task.program, running))
            status = TIMEOUT if running > 1 or "loop" in task.program else OK
        time.sleep(0.01)
        with lock:
            running -= 1
        return Outcome(status, 0, 0.01, "")

    monkeypatch.setattr(execution, "execute", execute)
    monkeypatch.setattr(execution, "cores", lambda: 2)
    return seen


def tasks(*programs):
    return [(name, Task("pl", name, PERL, Sandbox())) for name in programs]


@pytest.mark.parametrize("workers", [1, 2, 12])
def test_a_right_program_passes_beside_however_many(crowded, workers):
    names = [f"right{i}" for i in range(12)] + ["loop"]
    found = {name: one.status for name, one in Runner(Sandbox(), workers).run(tasks(*names))}
    assert found == {name: TIMEOUT if name == "loop" else OK for name in names}
    # A time-out counts only where it was seen alone, and a program that was alone runs once.
    assert ("loop", 1) in crowded
    again = {name for name, _ in crowded if [one for one, _ in crowded].count(name) > 1}
    assert all(dict(crowded)[name] == 1 for name in again)
    assert bool(again) == (workers > 1)


def test_what_ran_out_of_time_before_runs_alone_at_once(crowded):
    found = dict(Runner(Sandbox(), 4).run(tasks("a"), slow=tasks("b", "c")))
    assert {name: one.status for name, one in found.items()} == {"a": OK, "b": OK, "c": OK}
    assert [count for _, count in crowded] == [1, 1, 1]


def test_a_journal_s_time_outs_are_not_known(tmp_path):
    with Journal(tmp_path / "executions.jsonl") as journal:
        memory = Memory(journal)
        memory.add("fast", "pl", Outcome(OK, 0, 0.1, ""))
        memory.add("slow", "pl", Outcome(TIMEOUT, -1, 15.0, ""))
        assert memory.status("slow") == TIMEOUT
        again = Memory(journal)
        assert "fast" in again
        assert "slow" not in again
        assert again.slow == {"slow"}


def test_a_line_that_is_no_outcome_is_named(tmp_path):
    path = tmp_path / "executions.jsonl"
    path.write_text('{"key": "a", "status": "OK"}\n{"key": "b", "status": "Late"}\n{}\n')
    with (
        Journal(path) as journal,
        pytest.raises(InputError, match=r"line 2: status is 'Late', exp"),
    ):
        Memory(journal)


def test_a_second_run_judges_again_what_ran_out_of_time(tmp_path, monkeypatch):
    found = toolchains.Found("pl", PERL, "/usr/bin/perl", "5")
    monkeypatch.setattr(toolchains, "require", lambda *_: {"pl": found})
    monkeypatch.setattr(Sandbox, "check", lambda self: None)
    ran = []

    def execute(task):
        ran.append(task.program)
        return Outcome(TIMEOUT if task.program in slow else OK, 0, 0.01, "")

    monkeypatch.setattr(execution, "execute", execute)
    one = Generation("one", "pl", "", "", (), ("right", "slow"))
    slow = {one.program(1)}
    for statuses, count in ((("OK", "Timeout"), 2), (("OK", "OK"), 1)):
        ran.clear()
        with multipl_e.claim(tmp_path / "out") as output:
            multipl_e.evaluate([one], output, Runner(Sandbox(), workers=1))
        assert read_results(tmp_path / "out")[0].statuses == statuses
        assert len(ran) == count
        slow.clear()
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["programs_run_before"] == 1
    assert run["stop_tokens"] == {"pl": [[]]}
    assert run["seconds_allowed"] == {"pl": "15 s"}
    assert run["sandbox"]["limits"]["wall"] == 4.0


def test_the_limits_of_every_step_are_said():
    assert limits(LANGUAGES["rs"].toolchains[0]) == "15 s + 5 s"


def test_two_evaluations_do_not_share_a_directory(tmp_path):
    with (
        multipl_e.claim(tmp_path / "out"),
        pytest.raises(InputError, match=r"out: in use by process \d+ on "),
        multipl_e.claim(tmp_path / "out"),
    ):
        pass
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds notes.txt, expected"), multipl_e.claim(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
