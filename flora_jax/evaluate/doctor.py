"""Says which languages can be evaluated here, by what, and how to install the others."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from flora_jax.errors import InputError
from flora_jax.evaluate import toolchains
from flora_jax.evaluate.languages import LANGUAGES
from flora_jax.sandbox.sandbox import Sandbox


@dataclass(frozen=True)
class Finding:
    """One language: ``state`` is ``ready``, ``missing`` or ``broken``; ``advice`` where it is not."""

    language: str
    name: str
    state: str
    path: str = ""
    version: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """``sandbox`` says why no program can be run safely, or is empty."""

    findings: tuple[Finding, ...]
    sandbox: str

    @property
    def install(self) -> str:
        """One command for Debian that installs all that is missing there; empty if nothing is."""
        bubblewrap = ["bubblewrap"] if shutil.which("bwrap") is None else []
        packages = [
            LANGUAGES[one.language].packages for one in self.findings
            if one.state != "ready" and not LANGUAGES[one.language].note
        ]  # fmt: skip
        names = " ".join([*bubblewrap, *packages])
        return f"apt-get install --no-install-recommends {names}" if names else ""


def examine(sandbox: Sandbox) -> Report:
    """Looks for every language of the table and runs a small program in each that is there.

    Where there is no sandbox the toolchains are still looked for, as this user sees them.
    """
    try:
        sandbox.check()
        trouble = ""
    except InputError as error:
        trouble = str(error)
        sandbox = Sandbox(sandbox.root, unsafe=True)
        try:
            sandbox.check()
        except InputError as worse:
            nothing = [Finding(key, one.name, "missing") for key, one in LANGUAGES.items()]
            return Report(tuple(nothing), str(worse))
    return Report(tuple(_examine(language, sandbox) for language in LANGUAGES), trouble)


def _examine(language: str, sandbox: Sandbox) -> Finding:
    entry = LANGUAGES[language]
    found = toolchains.find(language, sandbox)
    if found is None:
        return Finding(language, entry.name, "missing", advice=toolchains.missing(language))
    failure = toolchains.probe(found, sandbox)
    if failure is not None:
        advice = f"{failure} (apt-get install {entry.packages})"
        return Finding(language, entry.name, "broken", found.path, found.version, advice)
    return Finding(language, entry.name, "ready", found.path, found.version)


def describe_user() -> str:
    """Whose rights programs get: another, unknown user's where this one is root."""
    return "root, programs run as nobody" if os.geteuid() == 0 else f"user {os.geteuid()}"
