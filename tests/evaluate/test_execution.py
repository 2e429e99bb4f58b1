"""Time-outs say as much of the machine as of a program: they depend on no neighbour and are not kept."""

import json
import re
import threading
import time
from dataclasses import replace

import pytest

from flora_jax.errors import InputError
from flora_jax.evaluate import execution, multipl_e, toolchains
from flora_jax.evaluate.completions import Generation
from flora_jax.evaluate.execution import Memory, Outcome, Runner, Task
from flora_jax.evaluate.languages import LANGUAGES, OK, TIMEOUT, limits
from flora_jax.evaluate.results import read_results
from flora_jax.jsonl import Journal
from flora_jax.sandbox.sandbox import Limits, Sandbox

PERL = LANGUAGES["pl"].toolchains[0]


@pytest.fixture
def crowded(monkeypatch):
    """Programs that take too long beside any other, "loop" for ever; how many ran at once each time."""
    running, lock, seen = 0, threading.Lock(), []

    def run_steps(task, times):
        nonlocal running
        with lock:
            running += 1
        time.sleep(0.01)
        with lock:
            seen.append((task.program, running))
            late = running > 1 and "loop" not in task.program
        time.sleep(0.01)
        with lock:
            running -= 1
        assert times in (1.0, 2.0)
        return Outcome(TIMEOUT if "loop" in task.program else OK, 0, 0.01, ""), late

    monkeypatch.setattr(execution, "_run_steps", run_steps)
    monkeypatch.setattr(execution, "cores", lambda: 2)
    return seen


def tasks(*programs):
    return [(name, Task("pl", name, PERL, Sandbox())) for name in programs]


@pytest.mark.parametrize("workers", [1, 2, 12])
def test_a_right_program_passes_beside_however_many(crowded, workers):
    names = [f"right{i}" for i in range(12)] + ["loop"]
    found = {name: one.status for name, one in Runner(Sandbox(), workers).run(tasks(*names))}
    assert found == {name: TIMEOUT if name == "loop" else OK for name in names}
    # What took long beside others runs alone again, what ran out of twice its time does not.
    again = {name for name, _ in crowded if [one for one, _ in crowded].count(name) > 1}
    assert "loop" not in again
    assert all(dict(crowded)[name] == 1 for name in again)
    assert bool(again) == (workers > 1)


def outcomes_of(sandbox, seconds, code):
    """Alone and beside others, of a Perl program in so much time."""
    step = replace(PERL.steps[0], seconds=seconds)
    task = Task("pl", code, replace(PERL, steps=(step,)), sandbox)
    return execution.execute(task), execution.execute_beside(task)


def test_between_its_time_and_twice_it_only_a_run_alone_can_tell():
    sandbox = Sandbox(unsafe=True)
    alone, beside = outcomes_of(sandbox, 0.4, "select undef, undef, undef, 0.6; print 'x';")
    assert alone.status == TIMEOUT
    assert beside is None
    alone, beside = outcomes_of(sandbox, 0.4, "while (1) {}")
    assert (alone.status, alone.machine) == (TIMEOUT, "")
    assert (beside.status, beside.machine) == (TIMEOUT, execution.machine())
    assert beside.seconds >= 0.8
    alone, beside = outcomes_of(sandbox, 20.0, "exit 1;")
    assert alone.status == beside.status != TIMEOUT


def test_what_waits_for_a_core_too_long_runs_alone():
    starved = Sandbox(unsafe=True, limits=Limits(wall=0.75))  # Ends it before its own time is over.
    alone, beside = outcomes_of(starved, 0.4, "sleep 60;")
    assert alone.status == TIMEOUT
    assert beside is None


def test_what_ran_out_of_time_before_runs_alone_at_once(crowded):
    found = dict(Runner(Sandbox(), 4).run(tasks("a"), slow=tasks("b", "c")))
    assert {name: one.status for name, one in found.items()} == {"a": OK, "b": OK, "c": OK}
    assert [count for _, count in crowded] == [1, 1, 1]


def test_a_journal_s_time_outs_are_not_known_unless_certain_on_this_machine(tmp_path):
    with Journal(tmp_path / "executions.jsonl") as journal:
        memory = Memory(journal)
        memory.add("fast", "pl", Outcome(OK, 0, 0.1, ""))
        memory.add("slow", "pl", Outcome(TIMEOUT, -1, 15.0, ""))
        memory.add("elsewhere", "pl", Outcome(TIMEOUT, -1, 30.0, "", "an abacus"))
        memory.add("loop", "pl", Outcome(TIMEOUT, -1, 30.0, "", execution.machine()))
        assert memory.status("slow") == TIMEOUT
        again = Memory(journal)
        assert "fast" in again
        assert "slow" not in again
        assert "loop" in again
        assert again.slow == {"slow", "elsewhere"}


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


def test_an_outcome_is_not_known_under_another_rule_of_judging(monkeypatch):
    def key():
        return Task("pl", "right", PERL, Sandbox()).key("5")

    before, own = key(), LANGUAGES["pl"]
    assert key() == before
    for change in ({"syntax": re.compile("oops")}, {"passes": lambda *ran: True}):
        monkeypatch.setitem(LANGUAGES, "pl", replace(own, **change))
        assert key() != before


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
