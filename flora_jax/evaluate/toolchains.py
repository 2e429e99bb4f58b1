"""Which toolchains there are, seen from where the programs run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from flora_jax.errors import InputError, listing
from flora_jax.evaluate.execution import Task, execute
from flora_jax.evaluate.languages import LANGUAGES, OK, Toolchain
from flora_jax.sandbox.sandbox import Sandbox

_SEARCH = ("sh", "-c", 'for p; do command -v "$p" || exit 1; done', "sh")
_SECONDS = 30.0  # For saying a version; a busy machine's first start is slow.


@dataclass(frozen=True)
class Found:
    """A toolchain, where its first program is and what that says of its version."""

    language: str
    toolchain: Toolchain
    path: str
    version: str


def find(language: str, sandbox: Sandbox) -> Found | None:
    """The first of a language's toolchains that is there."""
    for toolchain in LANGUAGES[language].toolchains:
        ran, _ = sandbox.run((*_SEARCH, *toolchain.programs), {}, _SECONDS)
        if ran.exit_code == 0:
            command = (toolchain.programs[0], *toolchain.version)
            said, _ = sandbox.run(command, {}, _SECONDS)
            return Found(language, toolchain, ran.stdout.split("\n")[0], _version(said.stdout))
    return None


def _version(said: str) -> str:
    found = re.search(r"\d+(\.\d+)+\S*", said)
    return found[0].rstrip("):].,") if found else " ".join(said.split())[:40]


def missing(language: str) -> str:
    """Says what is missing, where a copy is that cannot be used, and how to install it on Debian."""
    entry = LANGUAGES[language]
    names = dict.fromkeys(" and ".join(chain.programs) for chain in entry.toolchains)
    outside = [
        f"{place} is outside /usr, where a sandbox does not see it"
        for chain in entry.toolchains
        for name in chain.programs
        if (place := shutil.which(name)) and not place.startswith(("/usr/", "/bin/"))
    ]
    note = [entry.note] if entry.note else []
    said = "; ".join([f"apt-get install {entry.packages}", *note, *outside])
    return f"{entry.name}: {' or '.join(names)} not found ({said})"


def libraries(language: str) -> str:
    """What to install where the programs of a language are there, but not all that tests need."""
    program, *others = LANGUAGES[language].packages.split()
    return " ".join(others) or program


def require(languages: Iterable[str], sandbox: Sandbox) -> dict[str, Found]:
    """The toolchains of all ``languages``, each tried on a program that must pass.

    Raises:
        InputError: some are missing, or lack what the tests need; all are named.
    """
    found: dict[str, Found] = {}
    problems: list[str] = []
    for language in languages:
        one = find(language, sandbox)
        if one is None:
            problems.append(missing(language))
            continue
        found[language] = one
        failure = probe(one, sandbox)
        if failure is not None:
            advice = f"{failure} (apt-get install {libraries(language)})"
            problems.append(f"{LANGUAGES[language].name}: {advice}")
    if problems:
        raise InputError(listing("toolchains are missing", problems))
    return found


def probe(found: Found, sandbox: Sandbox) -> str | None:
    """Why a program that needs what MultiPL-E's tests need does not pass; ``None`` if it does."""
    program = LANGUAGES[found.language].probe
    outcome = execute(Task(found.language, program, found.toolchain, sandbox))
    if outcome.status == OK:
        return None
    lines = outcome.stderr.strip().splitlines() or ["no message"]
    return f"a program that should pass ends with {outcome.status}: {lines[0]}"
