"""Flags reach XLA where it knows them, and never a user who has chosen, a CPU, or a process too late."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flora_jax import xla_flags
from flora_jax.xla_flags import FLAGS, is_known, set_flags

WHILE = "--xla_gpu_enable_command_buffer=+WHILE"


@pytest.fixture
def early(monkeypatch):
    """As before JAX is imported, on a machine with a GPU."""
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(xla_flags, "_has_gpu", lambda environment: True)


def test_a_known_flag_is_added_to_the_users(early, tmp_path):
    environment = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    assert set_flags(tmp_path, environment) == [WHILE]
    assert environment["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {WHILE}"


def test_the_users_own_choice_stays(early, tmp_path):
    environment = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=FUSION"}
    assert set_flags(tmp_path, environment) == []
    assert environment["XLA_FLAGS"] == "--xla_gpu_enable_command_buffer=FUSION"


def test_an_unknown_flag_is_tried_elsewhere_once_and_left_out(early, tmp_path, monkeypatch):
    monkeypatch.setitem(FLAGS, "--xla_gpu_no_such_thing", "1")
    environment = {}
    assert set_flags(tmp_path, environment) == [WHILE]
    answers = json.loads((tmp_path / "xla_flags.json").read_text())
    assert sorted(answers.values()) == [False, True]
    monkeypatch.setattr(subprocess, "run", None)
    assert set_flags(tmp_path, {}) == [WHILE]


def test_damaged_answers_are_asked_for_again(tmp_path):
    (tmp_path / "xla_flags.json").write_text("[1, 2")
    assert is_known(WHILE, tmp_path)
    assert list(json.loads((tmp_path / "xla_flags.json").read_text()).values()) == [True]


def test_nothing_is_set_once_jax_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(xla_flags, "_has_gpu", lambda environment: True)
    assert "jax" in sys.modules
    assert set_flags(tmp_path, {}) == []


@pytest.mark.parametrize(
    "plugins, given, kept",
    [
        (["xla_cuda13"], {}, "cpu"),
        (["xla_cuda13"], {"JAX_PLATFORMS": "cuda"}, "cuda"),
        (["xla_cuda13", "libtpu"], {}, None),
        ([], {}, None),
    ],
)
def test_a_compiler_for_a_gpu_alone_keeps_jax_on_the_cpu(
    plugins, given, kept, monkeypatch, tmp_path
):
    for name in plugins:
        (tmp_path / "jax_plugins" / name).mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "jax_plugins")])
    monkeypatch.setattr(
        xla_flags.importlib.util, "find_spec", lambda name: spec if plugins else None
    )
    xla_flags.keep_from_missing_gpu(given)
    assert given.get("JAX_PLATFORMS") == kept


@pytest.mark.parametrize("environment", [{"JAX_PLATFORMS": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_nothing_is_set_where_jax_is_kept_from_a_gpu(environment, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "jax")
    assert set_flags(tmp_path, environment) == []
    assert not (tmp_path / "xla_flags.json").exists()
