"""The program run inside the test's own process, as a user would from a directory."""

import sys

import pytest

from flora_jax import cli


def program_in(directory, monkeypatch, capsys, *verb):
    """A function of the words after ``verb`` that runs the program in ``directory``.

    It returns the exit code, standard output and standard error.
    """
    # Set, though to nothing, the variable keeps the program from choosing a place.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.chdir(directory)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["flora-jax", *verb, *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run
