"""Table 1's program: which languages it runs, and what its report says beside the figures."""

import pytest

from experiments import table1
from flora_jax.errors import InputError
from flora_jax.evaluate.doctor import Finding, Report


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
    with pytest.raises(InputError, match="--language is d,lua, none.*: D: ldc2 not found; no lua"):
        table1.runnable("d,lua")
