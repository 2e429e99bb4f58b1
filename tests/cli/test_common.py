"""Where the program keeps what it can make again."""

from pathlib import Path

import pytest

from flora_jax.cli.common import cache_directory


@pytest.mark.parametrize(
    "variable, place", [(None, "/h/.cache"), ("", "/h/.cache"), ("/own", "/own")]
)
def test_an_empty_variable_is_no_cache_directory(variable, place, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    if variable is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_directory() == Path(place) / "flora_jax"
