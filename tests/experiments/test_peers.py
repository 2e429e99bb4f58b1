"""The runner of the comparison with other engines: what it keeps, and where it goes on."""

import sys
from pathlib import Path

import pytest

from flora_jax.errors import InputError

DIRECTORY = Path(__file__).resolve().parents[2] / "experiments" / "peers"
MODULES = ("journal", "load", "ratios", "run")
ANSWER = {
    "prefill_seconds": 1.0, "total_seconds": 3.0, "tokens": [[5, 6, 7]], "foreign_load": 0.0,
}  # fmt: skip


@pytest.fixture
def peers(monkeypatch):
    """The modules, which find each other by their directory, by name."""
    monkeypatch.syspath_prepend(DIRECTORY)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: __import__(name)
    for name in MODULES:
        sys.modules.pop(name, None)


class Contender:
    """Answers every round, or fails from one on."""

    def __init__(self, fails=99):
        self.fails, self.asked = fails, []

    def ask(self, number, rows):
        self.asked.append((number, rows))
        return {"error": "no memory"} if number >= self.fails else dict(ANSWER)

    def close(self):
        pass


def go(peers, journal, outcome, workers):
    peers("run").wait_for_quiet = lambda rest: None
    outcome.about |= {name: {"versions": {}} for name in workers}
    peers("run").interleave(workers, outcome, journal, "base alone", [1, 8], 3, 0.0)


def test_a_run_goes_on_with_the_rounds_that_are_missing_alone(peers, tmp_path):
    journal = peers("journal").Journal(tmp_path / "answers.jsonl", {"--new-tokens": "3"})
    outcome = journal.begin()
    go(peers, journal, outcome, {"ours": Contender(), "vLLM": Contender(fails=1)})
    with journal.file.open("a") as file:
        file.write('{"group": "base al')  # A run that was killed while it wrote.

    outcome = journal.resume()
    workers = {"ours": Contender(), "vLLM": Contender()}
    go(peers, journal, outcome, workers)

    assert workers["ours"].asked == []
    assert workers["vLLM"].asked == [(1, 1), (1, 8), (2, 1), (2, 8)]
    kept = journal.resume()
    assert {key: len(found) for key, found in kept.rounds["base alone"].items()} == {
        (rows, name): 3 for rows in (1, 8) for name in ("ours", "vLLM")
    }
    assert kept.goes == 3


def test_a_contender_that_never_answered_is_no_part_of_the_tables(peers, tmp_path):
    journal = peers("journal").Journal(tmp_path / "answers.jsonl", {})
    outcome = journal.begin()
    go(peers, journal, outcome, {"ours": Contender(), "vLLM": Contender(fails=0)})

    text = peers("ratios").write_tables(tmp_path / "peers.json", outcome, "run.py", 64, 3)

    assert "| ours |" in text
    assert "| vLLM |" not in text
    assert "Missing: vLLM: round 0 of 1 rows: no memory." in text


def test_answers_to_other_settings_are_not_gone_on_with(peers, tmp_path):
    journal = peers("journal").Journal(tmp_path / "answers.jsonl", {"--new-tokens": "3"})
    journal.begin()
    other = peers("journal").Journal(journal.file, {"--new-tokens": "64"})
    with pytest.raises(InputError, match=r"answers.jsonl: --new-tokens is '3', expected '64'"):
        other.resume()


def test_a_group_has_its_own_numbers_of_rows_or_those_of_all(peers):
    read = peers("run").read_group
    assert read("base alone:1,8", "1,16") == ("base alone", [1, 8])
    assert read("base alone", "1,16") == ("base alone", [1, 16])
    with pytest.raises(InputError, match="base alone: '1,x', expected numbers of rows"):
        read("base alone:1,x", "1")
    with pytest.raises(InputError, match="--group is 'all', expected one of LoRA on c_fc"):
        read("all", "1")


def test_every_contender_of_a_group_is_known_and_every_ratio_is_between_contenders(peers):
    run = peers("run")
    assert {name for group in run.GROUPS.values() for name in group} <= set(run.CONTENDERS)
    assert {name for pair in peers("ratios").PAIRS for name in pair[:2]} <= set(run.CONTENDERS)


def test_tables_say_what_weights_are_held_and_that_rounds_were_not_all_together(peers, tmp_path):
    ratios = peers("ratios")
    outcome = ratios.Outcome(goes=2)
    outcome.about = {
        "llama.cpp": {"versions": {}, "weights": "llama 134M Q4_1"},
        "ours": {"versions": {}, "weights": "float32"},
    }
    slow = ANSWER | {"total_seconds": 5.0}
    outcome.rounds = {"base alone": {(8, "llama.cpp"): [slow], (8, "ours"): [dict(ANSWER)]}}

    text = ratios.write_tables(tmp_path / "peers.json", outcome, "run.py", 64, 3)

    assert "| ours / llama.cpp | 1.00 (1.00–1.00) | 2.00 (2.00–2.00) |  |" in text
    assert "Weights of llama.cpp: llama 134M Q4_1." in text
    assert "Weights of ours" not in text
    assert "Measured in 2 goes" in text
