"""One table of languages: how MultiPL-E names, compiles, runs, times and judges a program.

Knows nothing of sandboxes: commands are given as a program's directory sees them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flora_jax.errors import InputError

OK, TIMEOUT, SYNTAX_ERROR, EXCEPTION = "OK", "Timeout", "SyntaxError", "Exception"
# Classes that MultiPL-E does not have; none of them passes there either.
OUTPUT_LIMIT, MEMORY_LIMIT = "OutputLimit", "MemoryLimit"
STATUSES = (OK, TIMEOUT, SYNTAX_ERROR, EXCEPTION, OUTPUT_LIMIT, MEMORY_LIMIT)

ARTEFACT = "program"
"""The file that a step with ``keeps`` hands to the next."""


@dataclass(frozen=True)
class Step:
    """One command of a program, and how long it may take.

    ``seconds`` are MultiPL-E's, which measures by the clock. Here the program's own processor time and
    the time that it sleeps are counted, so that it does not matter what else the machine does.
    """

    command: tuple[str, ...]
    seconds: float
    keeps: bool = False


@dataclass(frozen=True)
class Toolchain:
    """``programs`` that have to be there, the first with ``version`` as arguments."""

    programs: tuple[str, ...]
    version: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Language:
    """How to judge one language.

    ``packages`` are Debian's, the one with the program first; ``probe`` is a program that passes where
    all that tests need is there. ``passes`` judges by exit code, stdout and stderr of the last step;
    ``syntax`` finds in its stderr that a failure is an error of syntax. ``withdrawn_stops`` are stop
    tokens of older releases of MultiPL-E's data set that its current one no longer has.
    """

    name: str
    file: str
    toolchains: tuple[Toolchain, ...]
    packages: str
    probe: str
    passes: Callable[[int, str, str], bool]
    syntax: re.Pattern[str] | None = None
    note: str = ""
    withdrawn_stops: tuple[str, ...] = ()


def _exit_0(code: int, stdout: str, stderr: str) -> bool:
    return code == 0


def _exit_0_without_error(code: int, stdout: str, stderr: str) -> bool:
    # A failed test of MultiPL-E's Perl may print this and go on.
    return code == 0 and "ERROR" not in stdout and "ERROR" not in stderr


def _exit_0_in_silence(code: int, stdout: str, stderr: str) -> bool:
    # rackunit reports failures on stderr and exits with 0.
    return code == 0 and not stderr


def _one(programs: str, version: str, *steps: Step) -> Toolchain:
    return Toolchain(tuple(programs.split()), tuple(version.split()), steps)


def _compiled(compiler: str, file: str, compile_seconds: float, programs: str) -> Toolchain:
    build = Step((compiler, file, "-o", ARTEFACT), compile_seconds, keeps=True)
    return _one(programs, "--version", build, Step((f"./{ARTEFACT}",), 5))


LANGUAGES: dict[str, Language] = {
    "d": Language(
        "D",
        "program.d",
        (
            # rdmd only drives a compiler; its default is dmd.
            _one("rdmd dmd", "--help", Step(("rdmd", "-unittest", "program.d"), 15)),
            _one("ldc2 cc", "--version", Step(("ldc2", "-unittest", "-run", "program.d"), 15)),
        ),
        "ldc",
        "import std.math;\nunittest { assert(sqrt(4.0) == 2.0); }\nvoid main(){}\n",
        _exit_0,
        # ldc2 says of a program that failed, or died, that it "failed with status" or "received signal".
        re.compile(
            r"\.d\(\d+.*\): Error:|^Error: (?!.* failed with status|program received signal)", re.M
        ),
    ),
    "lua": Language(
        "Lua",
        "program.lua",
        (_one("lua", "-v", Step(("lua", "program.lua"), 15)),),
        "lua5.3 lua-unit",
        "lu = require('luaunit')\nfunction test_one() lu.assertEquals(1, 1) end\n"
        "os.exit(lu.LuaUnit.run())\n",
        _exit_0,
        re.compile(r"^lua[\d.]*: program\.lua:\d+: .* near ", re.MULTILINE),
        # Release 3.3: a blank line inside a body ended it.
        withdrawn_stops=("\n\n",),
    ),
    "pl": Language(
        "Perl",
        "program.pl",
        (_one("perl", "-e printf('%vd',$^V)", Step(("perl", "program.pl"), 15)),),
        "perl libtest-deep-perl",
        "use Test::Deep;\nexit(eq_deeply([1], [1]) ? 0 : 1);\n",
        _exit_0_without_error,
        re.compile(r"^syntax error at |had compilation errors|due to compilation errors", re.M),
    ),
    "rb": Language(
        "Ruby",
        "program.rb",
        (_one("ruby", "--version", Step(("ruby", "program.rb"), 5)),),
        "ruby ruby-test-unit",
        "require 'test/unit'\nclass T < Test::Unit::TestCase\n"
        "  def test_one\n    assert_equal(1, 1)\n  end\nend\n",
        _exit_0,
        re.compile(r"^program\.rb:\d+: syntax error|\(SyntaxError\)", re.MULTILINE),
    ),
    "rkt": Language(
        "Racket",
        "program.rkt",
        (_one("racket", "--version", Step(("racket", "program.rkt"), 15)),),
        "racket",
        "#lang racket\n(require rackunit)\n(check-equal? 1 1)\n",
        _exit_0_in_silence,
        re.compile("read-syntax"),
    ),
    "rs": Language(
        "Rust",
        "program.rs",
        (_compiled("rustc", "program.rs", 15, "rustc cc"),),
        "rustc",
        "fn main() { assert_eq!(1, 1); }\n",
        _exit_0,
    ),
    "swift": Language(
        "Swift",
        "program.swift",
        (_compiled("swiftc", "program.swift", 45, "swiftc"),),
        "swiftlang",
        "assert(1 == 1)\n",
        _exit_0,
        note="in Debian 13 (trixie) and newer, not in 12",
    ),
}


def limits(toolchain: Toolchain) -> str:
    """How long a program may take, for people: a step after another, in seconds."""
    return " + ".join(f"{step.seconds:g} s" for step in toolchain.steps)


def check_status(status: str, where: str) -> None:
    """``InputError`` if ``status`` is none of :data:`STATUSES`."""
    if status not in STATUSES:
        raise InputError(f"{where}: status is {status!r}, expected one of {', '.join(STATUSES)}")


def select(names: Iterable[str]) -> tuple[str, ...]:
    """The languages of ``--language`` in the order given, ``all`` being every one of the table.

    Raises:
        InputError: a name that is not in the table.
    """
    chosen: dict[str, None] = {}
    for name in names:
        if name != "all" and name not in LANGUAGES:
            raise InputError(f"--language is {name!r}, expected all or {', '.join(LANGUAGES)}")
        chosen |= dict.fromkeys(LANGUAGES if name == "all" else [name])
    return tuple(chosen)
