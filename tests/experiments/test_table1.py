"""Table 1's program: which languages it runs, and what its report says beside the figures."""

import pytest

from experiments import table1, table1_report
from flora_jax.errors import InputError
from flora_jax.evaluate.completions import Generation
from flora_jax.evaluate.doctor import Finding, Report
from flora_jax.evaluate.results import Result


@pytest.fixture
def perl_alone(monkeypatch):
    """A machine with Perl's toolchain and no other."""
    findings = (
        Finding("pl", "Perl", "ready"),
        Finding("d", "D", "missing", advice="D: ldc2 not found"),
        Finding("lua", "Lua", "broken", advice="no luaunit"),
    )
    monkeypatch.setattr(table1, "examine", lambda sandbox: Report(findings, ""))


def test_a_language_without_a_toolchain_is_left_out_and_named(perl_alone):
    assert table1.runnable("d,pl,lua") == (["pl"], ["d", "lua"])


def test_a_name_that_is_no_language_is_refused(perl_alone):
    with pytest.raises(InputError, match="--language is 'perl', expected all or d, lua"):
        table1.runnable("pl,perl")


def test_a_run_of_nothing_is_refused_with_what_is_missing(perl_alone):
    with pytest.raises(InputError, match=r"--language is d,lua, none.*: D: ldc2 not found; no lua"):
        table1.runnable("d,lua")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("mini --problems /a --output runs/t", "mini --problems DIR --output runs/t"),
        (
            "starcoder --problems hub --data /d --output o --language d,pl --limit 5",
            "starcoder --problems hub --output o --data DIR --language d,pl --limit 5",
        ),
    ],
)
def test_the_receipt_s_command_makes_the_same_again(words, expected):
    arguments = table1.parser().parse_args(words.split())
    command = table1.command(arguments)
    assert command == f"python experiments/table1.py {expected} --stop-tokens current"
    again = vars(table1.parser().parse_args(command.split()[2:]))
    given = {name: value for name, value in vars(arguments).items() if str(value)[0] != "/"}
    assert given.items() <= again.items()


def test_empty_completions_are_counted_by_language():
    def one(language, *completions):
        return Generation("a", language, "", "", (), completions)

    generations = [one("pl", "a", ""), one("rb", "", ""), one("pl", "b", "c")]
    assert table1.empty(generations) == {"pl": 25, "rb": 100}


def test_a_report_says_what_was_found_and_nothing_that_was_not(tmp_path, monkeypatch):
    """Its words come from the results: others say something else."""
    found = {
        "base": [Result("a", "pl", ("OK", "SyntaxError")), Result("b", "pl", ("Exception", "OK"))],
        "flora": [Result("a", "pl", ("OK", "OK")), Result("b", "pl", ("Timeout", "SyntaxError"))],
    }
    monkeypatch.setattr(table1_report, "read_results", lambda path: found[path.name])
    receipt = {"parameters": "12", "empty completions under the base, %": {"pl": 25.0}}
    table1_report.write("other", tmp_path, ("base", "flora"), receipt, tmp_path)
    head, _ = (tmp_path / "table1_other.md").read_text().split("\n## ", 1)
    assert head.splitlines() == [
        "# Table 1, other", "", "- parameters: 12", "- empty completions under the base, %: pl 25",
        "- samples of a problem: 2", "",
        "Of 8 samples under all methods 4 pass, 2 more get past the compiler or parser.",
    ]  # fmt: skip
