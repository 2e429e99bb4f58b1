"""Says which languages can be evaluated here, by what, and how to install the others."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from flora_jax.errors import InputError
from flora_jax.evaluate import toolchains
from flora_jax.evaluate.languages import LANGUAGES, limits
from flora_jax.sandbox.sandbox import Sandbox

PACKAGES = {"bwrap": "bubblewrap", "prlimit": "util-linux", "setpriv": "util-linux"}
"""Debian's packages of what a sandbox is made with."""


@dataclass(frozen=True)
class Finding:
    """One language: ``state`` is ready, missing, broken or unknown; ``advice`` where it is not ready.

    ``seconds`` are what a program may take, see :func:`~flora_jax.evaluate.languages.limits`.
    """

    language: str
    name: str
    state: str
    seconds: str = ""
    path: str = ""
    version: str = ""
    packages: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """``trouble`` says why no program can be run safely, or is empty."""

    findings: tuple[Finding, ...]
    trouble: str

    @property
    def install(self) -> str:
        """One command for Debian that installs all that is missing there; empty if nothing is."""
        sandbox = [
            package for program, package in PACKAGES.items() if shutil.which(program) is None
        ]
        packages = [
            one.packages for one in self.findings if not LANGUAGES[one.language].note
        ]  # fmt: skip
        names = " ".join(dict.fromkeys(filter(None, [*sandbox, *packages])))
        return f"apt-get install --no-install-recommends {names}" if names else ""


def examine(sandbox: Sandbox) -> Report:
    """Looks for every language of the table and runs a small program in each that is there.

    Where there is no sandbox the toolchains are still looked for, as this user sees them.

    Raises:
        InputError: the sandbox's root has no ``usr``.
    """
    if not Path(sandbox.root, "usr").is_dir():
        raise InputError(f"--root is {sandbox.root}, expected a directory with usr/ in it")
    try:
        sandbox.check()
        trouble = ""
    except InputError as error:
        trouble = str(error)
        sandbox = Sandbox(sandbox.root, unsafe=True)
        try:
            sandbox.check()
        except InputError as worse:
            nothing = [Finding(key, one.name, "unknown") for key, one in LANGUAGES.items()]
            return Report(tuple(nothing), str(worse))
    return Report(tuple(_examine(language, sandbox) for language in LANGUAGES), trouble)


def _examine(language: str, sandbox: Sandbox) -> Finding:
    entry = LANGUAGES[language]
    found = toolchains.find(language, sandbox)
    if found is None:
        return Finding(
            language, entry.name, "missing", packages=entry.packages,
            advice=toolchains.missing(language),
        )  # fmt: skip
    seconds = limits(found.toolchain)
    failure = toolchains.probe(found, sandbox)
    if failure is None:
        return Finding(language, entry.name, "ready", seconds, found.path, found.version)
    packages = toolchains.libraries(language)
    advice = f"{failure} (apt-get install {packages})"
    return Finding(
        language, entry.name, "broken", seconds, found.path, found.version, packages, advice
    )


def describe_user() -> str:
    """Whose rights programs get: another, unknown user's where this one is root."""
    return "root, programs run as nobody" if os.geteuid() == 0 else f"user {os.geteuid()}"
