"""The doctor: what it says of a machine, what it advises, and how it ends."""

import subprocess
import sys

import pytest

from flora_jax.errors import InputError
from flora_jax.evaluate import doctor, toolchains
from flora_jax.evaluate.languages import LANGUAGES
from flora_jax.sandbox import sandbox as sandbox_module
from flora_jax.sandbox.sandbox import Sandbox


@pytest.fixture
def machine(monkeypatch):
    """All languages are there but Rust, and Lua has no luaunit; the sandbox works."""

    def find(language, sandbox):
        chain = LANGUAGES[language].toolchains[0]
        found = toolchains.Found(language, chain, f"/usr/bin/{language}", "1.0")
        return None if language == "rs" else found

    monkeypatch.setattr(toolchains, "find", find)
    monkeypatch.setattr(
        toolchains, "probe", lambda found, _: "no luaunit" if found.language == "lua" else None
    )
    monkeypatch.setattr(Sandbox, "check", lambda self: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_only_what_is_missing_is_advised(machine, monkeypatch):
    report = doctor.examine(Sandbox())
    assert report.install == "apt-get install --no-install-recommends lua-unit rustc"
    assert {one.language: one.state for one in report.findings if one.state != "ready"} == {
        "lua": "broken", "rs": "missing"
    }  # fmt: skip
    assert {one.seconds for one in report.findings} == {"15 s", "5 s", "45 s + 5 s", ""}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert report.install.split()[3:] == ["bubblewrap", "util-linux", "lua-unit", "rustc"]


def test_nothing_is_advised_where_nothing_is_known(monkeypatch):
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: None)
    report = doctor.examine(Sandbox())
    assert "no sandbox" in report.trouble
    assert {one.state for one in report.findings} == {"unknown"}
    assert report.install == "apt-get install --no-install-recommends bubblewrap util-linux"


def test_a_root_without_toolchains_is_refused(tmp_path):
    with pytest.raises(InputError, match=rf"--root is {tmp_path}, expected a directory with usr/"):
        doctor.examine(Sandbox(str(tmp_path)))


@pytest.mark.parametrize("options, code", [([], 1), (["--root", "/absent"], 2)])
def test_the_command_fails_where_no_program_can_be_run(options, code, tmp_path):
    command = [sys.executable, "-m", "flora_jax.cli", "evaluate", "doctor", *options]
    done = subprocess.run(
        command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert "no sandbox" in done.stdout if code == 1 else "--root is /absent" in done.stderr
