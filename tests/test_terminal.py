"""Bars on standard error: nothing in a log but what is kept, and names are never markup."""

import time

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


def wait_for(capfd, text):
    """What standard error has once ``text`` is in it."""
    found = ""
    for _ in range(500):
        found += capfd.readouterr().err
        if text in found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {found!r}")


def test_long_work_says_in_a_log_how_far_it_is(capfd, monkeypatch):
    """Also while nothing is reported: a step may take minutes."""
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.02)
    with terminal.progress("step", 200) as bar:
        bar.show(0, note="compiling")
        said = wait_for(capfd, "\n")
        assert said.startswith("step 0/200, compiling\n")
        bar.show(1)
        time.sleep(0.01)
        bar.show(40, note="loss 1.234")
        assert "step 40/200, loss 1.234, " in wait_for(capfd, " s left\n")
    with terminal.progress("reading") as bar:
        bar.show(1200, note="documents tokenised, 2.0 MB")
        wait_for(capfd, "reading 1,200 documents tokenised, 2.0 MB\n")
    with terminal.bars() as add:
        add("compile", 2).advance(2)
        add("requests", 7).advance()
        said = wait_for(capfd, "requests 1/7\n")
    assert "compile" not in said


@pytest.mark.parametrize("steps, left", [(101, "30 s"), (301, "4 min"), (20001, "5.5 h")])
def test_the_time_left_is_that_of_the_steps_to_come_without_what_was_before_the_first(steps, left):
    now = [0.0]
    bar = terminal._Told("step", steps, lambda: now[0])
    bar.show(0, note="compiling")
    now[0] = 1000.0
    bar.advance()
    assert bar.line() == f"step 1/{steps}, compiling"
    now[0] = 1060.0
    bar.advance(60)
    now[0] += 10
    assert bar.line() == f"step 61/{steps}, compiling, {left} left"
    assert bar.line(left=False) == f"step 61/{steps}, compiling"


def test_the_end_of_a_closed_stream_is_none_of_the_works(monkeypatch):
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.01)

    def closed(_):
        raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(terminal, "say", closed)
    with terminal.progress("step", 2) as bar:
        time.sleep(0.05)
        bar.advance()
