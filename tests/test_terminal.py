"""Bars on standard error: nothing in a log but what is kept, and names are never markup."""

import pytest

from flora_jax import terminal


def test_a_log_has_no_bars_but_those_that_are_kept(capfd):
    with terminal.progress("reading", 3) as bar:
        bar.advance()
        bar.show(3, note="done")
    assert capfd.readouterr() == ("", "")
    with terminal.progress("[red]step[/nothing]", keep=True) as bar:
        bar.show(2, 5, "[loss]")
    out, error = capfd.readouterr()
    assert out == ""
    assert "[red]step[/nothing]" in error
    assert "2/5" in error
    assert "[loss]" in error


def test_a_terminal_shows_every_bar_and_clears_them(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with terminal.bars() as add:
        add("compile", 20).show(7, note="decode of 4")
        add("requests").advance()
    error = capfd.readouterr().err
    assert "compile" in error
    assert "7/20" in error
    assert "decode of 4" in error
    assert "requests" in error


def test_the_bars_are_gone_after_a_failure(capfd):
    with pytest.raises(ZeroDivisionError), terminal.progress("failing", 1):
        raise ZeroDivisionError
    with terminal.progress("next", 1, keep=True) as bar:
        bar.advance()
    assert "1/1" in capfd.readouterr().err
