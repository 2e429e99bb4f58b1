"""Programs of known outcome through the command: passed, failed, resumed, the same twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.evaluator_proof import (
    constant_generations,
    good_generations,
    swapped_generations,
    write_lines,
)
from flora_jax.evaluate import multipl_e
from flora_jax.evaluate.completions import read_generations
from flora_jax.evaluate.execution import Runner
from flora_jax.evaluate.languages import LANGUAGES
from flora_jax.sandbox.sandbox import Sandbox
from tests.helpers import toolchains

pytestmark = pytest.mark.toolchains
# What needs none of MultiPL-E's files: a body that is right, one that is wrong, one that is no text
# of the language, one that does not end, and tests that pass whatever went before but for a failure.
OWN = {
    "d": ("int one()", "{ return 1; }", "{ return 2; }", "{ return", "{ while (true) {} }",
          "unittest { assert(one() == 1); }\nvoid main(){}"),
    "lua": ("local function one()\n", "return 1 end", "return 2 end", "return (", "while true do end end",
            "lu = require('luaunit')\nfunction test_one() lu.assertEquals(one(), 1) end\n"
            "os.exit(lu.LuaUnit.run())"),
    "pl": ("sub one {\n", "1 }", "2 }", "1 ) }", "1 while 1; }",
           "use Test::Deep;\nif (eq_deeply(one(), 1)) { print 'ok!' } else { exit 1 }"),
    "rb": ("def one\n", "1\nend", "2\nend", "1 )\nend", "loop {}\nend",
           "require 'test/unit'\nclass T < Test::Unit::TestCase\n  def test_one\n"
           "    assert_equal(1, one)\n  end\nend"),
    "rkt": ("#lang racket\n(define (one)\n", "1)", "2)", "1", "(one))",
            "(require rackunit)\n(check-within (one) 1 0.001)"),
    "rs": ("fn one() -> i32 {\n", "1", "2", "1 )", "loop {}",
           "}\nfn main() { assert_eq!(one(), 1); }"),
    "swift": ("func one() -> Int {\n", "return 1", "return 2", "return (", "while true {}",
              "}\nassert(one() == 1)"),
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_program_is_judged_by_its_language_s_rule(language, tmp_path):
    toolchains.need(language)
    prompt, *completions, tests = OWN[language]
    line = {"name": "one", "language": language, "prompt": prompt, "tests": tests,
            "stop_tokens": [], "completions": completions}  # fmt: skip
    file = write_lines(tmp_path / "own.jsonl", [line])
    # What runs alone anyway is not run again.
    found = toolchains.evaluate(file, tmp_path / "out", "--workers", "1")
    assert found[language, "one"] == ["OK", "Exception", "SyntaxError", "Timeout"]


@pytest.mark.parametrize(
    ("language", "body"),
    [("d", "{ return 1 + one(); }"), ("lua", "return 1 + one() end"), ("rb", "1 + one\nend"),
     ("rs", "1 + one()")],
)  # fmt: skip
def test_a_program_that_dies_without_end_of_calls_was_a_program(language, body, tmp_path):
    toolchains.need(language)
    prompt, *_, tests = OWN[language]
    line = {"name": "one", "language": language, "prompt": prompt, "tests": tests,
            "stop_tokens": [], "completions": [body]}  # fmt: skip
    file = write_lines(tmp_path / "own.jsonl", [line])
    found = toolchains.evaluate(file, tmp_path / "out", "--workers", "1")
    assert found[language, "one"] == ["Exception"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_ten_known_problems_pass_and_wrong_bodies_fail(language, tmp_path, shared_data):
    toolchains.need(language)
    good = good_generations(shared_data, language)[:10]
    names = {one["name"] for one in good}
    constant = [one for one in constant_generations(shared_data, language) if one["name"] in names]
    lines = [
        one | {"name": f"{kind}/{one['name']}"}
        for kind, ones in (
            ("good", good), ("swapped", swapped_generations(good)), ("constant", constant)
        )
        for one in ones
    ]  # fmt: skip
    found = toolchains.evaluate(write_lines(tmp_path / "ten.jsonl", lines), tmp_path / "out")
    passed = {name for (_, name), statuses in found.items() if statuses == ["OK"]}
    assert passed == {f"good/{name}" for name in names}
    assert len(found) >= 28
    assert {status for statuses in found.values() for status in statuses} <= {
        "OK", "Exception", "SyntaxError"
    }  # fmt: skip


def perl_lines(count):
    """Programs that differ, a few of them wrong, with every third given twice."""
    prompt, right, wrong, *_, tests = OWN["pl"]
    return [
        {"name": f"p{i}", "language": "pl", "prompt": f"# {i // 3 * 2 + i % 3 % 2}\n{prompt}",
         "tests": tests, "stop_tokens": [], "completions": [right, wrong if i % 5 else right]}
        for i in range(count)
    ]  # fmt: skip


def test_killed_at_any_time_a_run_goes_on_and_ends_with_the_same_numbers(tmp_path):
    toolchains.need("pl")
    file = write_lines(tmp_path / "generations.jsonl", perl_lines(60))
    whole = toolchains.evaluate(file, tmp_path / "whole")
    assert {tuple(statuses) for statuses in whole.values()} == {("OK", "OK"), ("OK", "Exception")}
    command = [sys.executable, "-m", "flora_jax.cli", "evaluate", "multipl-e", "--workers", "1"]
    command += ["--load-generations", str(file), "--output", str(tmp_path / "killed")]
    journal, had = tmp_path / "killed/executions.jsonl", 0
    for _ in range(2):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not journal.is_file() or journal.read_bytes().count(b"\n") < had + 5:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        had = journal.read_bytes().count(b"\n")
    assert not (tmp_path / "killed/summary.json").exists()
    assert toolchains.evaluate(file, tmp_path / "killed") == whole
    run = json.loads((tmp_path / "killed/run.json").read_text())
    assert run["programs_run_before"] == had
    # As many as there are different ones, however often a run was killed.
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({one["key"] for one in lines}) == len(lines) == run["programs"]
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_is_stopped_leaves_no_results_of_other_generations(tmp_path, monkeypatch):
    toolchains.need("pl")
    first = write_lines(tmp_path / "first.jsonl", perl_lines(2))
    toolchains.evaluate(first, tmp_path / "out")
    generations = read_generations(write_lines(tmp_path / "second.jsonl", perl_lines(3)))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", stop)
    for known, left in ((read_generations(first), True), (generations, False)):
        with pytest.raises(KeyboardInterrupt), multipl_e.claim(tmp_path / "out") as output:
            multipl_e.evaluate(known, output, Runner(Sandbox()))
        for name in ("results.jsonl", "summary.json", "run.json"):
            assert (tmp_path / "out" / name).exists() == left


def test_identical_programs_run_once(tmp_path):
    toolchains.need("pl")
    line = perl_lines(1)[0] | {"completions": ["1 }"] * 20 + ["2 }"] * 20}
    found = toolchains.evaluate(write_lines(tmp_path / "same.jsonl", [line]), tmp_path / "out")
    assert found["pl", "p0"] == ["OK"] * 20 + ["Exception"] * 20
    assert len((tmp_path / "out/executions.jsonl").read_text().splitlines()) == 2
