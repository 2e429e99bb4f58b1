"""What a compiled program launches and copies, read off its optimised HLO.

A launch is a kernel, a library's call or a copy: what XLA's list of thunks has for an instruction that is
neither a view nor control flow. A loop counts its body times its trip count, where that is known when
compiling; where it is not, the body and the condition count once and the loop is named, so that a step's
own loop gives the launches of one step. A conditional counts its dearest branch. Knows nothing of models.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterator

# Instructions that launch nothing.
_VIEWS = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id "
    "opt-barrier optimization-barrier add-dependency domain".split()
)
# The second half of an instruction that was counted when it started.
_DONE = re.compile(r"-(done|update)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = ")
_TRIP = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_ARRAY = re.compile(r"^([a-z]+\d*)\[([\d,]*)\]")
_MOVES = ("copy", "transpose", "copy-start")
_COLLECTIVES = frozenset(
    "all-reduce all-gather reduce-scatter all-to-all collective-permute collective-broadcast".split()
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: ``shape`` and ``op`` as they stand there, ``text`` the whole line."""

    name: str
    shape: str
    op: str
    text: str

    def callee(self, role: str) -> str:
        """The computation of ``body=``, ``condition=``, ``calls=`` or ``to_apply=``; "" without one."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.text)
        return found[1] if found else ""

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if found:
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        names = (self.callee(role) for role in ("true_computation", "false_computation"))
        return [name for name in names if name]

    @property
    def trips(self) -> int | None:
        """Of a loop, where it is known."""
        found = _TRIP.search(self.text)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Launches:
    """``total``: launches; ``loops``: the names of loops whose trip count is not known, counted once;
    ``static_loops``: how many loops with a known one there are, each in its place once.
    """

    total: int
    loops: tuple[str, ...] = ()
    static_loops: int = 0


class Program:
    """The computations of an optimised HLO module.

    Args:
        text: as ``compiled.as_text()`` gives it.

    Raises:
        ValueError: it has no entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        own: list[Instruction] | None = None
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                own = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                own = None
            elif own is not None and (found := _instruction(line.strip())):
                own.append(found)
        if not self.entry:
            raise ValueError("the text has no entry computation, expected an HLO module")

    def launches(self, name: str | None = None) -> Launches:
        """Of one computation, by default the whole program."""
        total, static = 0, 0
        loops: tuple[str, ...] = ()
        for one in self.computations[name or self.entry]:
            found = self._of(one)
            total, loops = total + found.total, (*loops, *found.loops)
            static += found.static_loops
        return Launches(total, loops, static)

    def _of(self, one: Instruction) -> Launches:
        if one.op in _VIEWS or _DONE.search(one.op):
            return Launches(0)
        if one.op == "while":
            body = self.launches(one.callee("body"))
            if one.trips is not None:
                return Launches(one.trips * body.total, body.loops, body.static_loops + 1)
            condition = self.launches(one.callee("condition"))
            return Launches(
                body.total + condition.total, (one.name, *body.loops), body.static_loops
            )
        if one.op == "conditional":
            return max((self.launches(name) for name in one.branches()), key=lambda own: own.total)
        if one.op == "call" or (one.op == "async-start" and one.callee("calls")):
            return self.launches(one.callee("to_apply") or one.callee("calls"))
        return Launches(1)

    def collectives(self) -> dict[str, int]:
        """By HLO's name how many instructions send between devices, wherever they stand."""
        ops = (one.op.removesuffix("-start") for one in self._instructions())
        return dict(sorted(collections.Counter(op for op in ops if op in _COLLECTIVES).items()))

    def copies_of(self, shapes: Collection[tuple[str, tuple[int, ...]]]) -> list[str]:
        """Copies and transposes, alone or inside a kernel, whose result is one of these arrays.

        Args:
            shapes: HLO's name of a dtype ("f16") and dimensions; either way round counts.

        Returns:
            The instructions' names.
        """
        wanted = {(dtype, tuple(sorted(dims))) for dtype, dims in shapes}
        return [
            one.name
            for one in self._instructions()
            if one.op in _MOVES and _array(one.shape) in wanted
        ]

    def _instructions(self) -> Iterator[Instruction]:
        for own in self.computations.values():
            yield from own


def _array(shape: str) -> tuple[str, tuple[int, ...]] | None:
    """The dtype and the dimensions in order of size, the first array's of a tuple, without ones."""
    found = _ARRAY.match(shape.lstrip("("))
    if found is None:
        return None
    dims = (int(size) for size in found[2].split(",") if size)
    return found[1], tuple(sorted(size for size in dims if size != 1))


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    if rest.startswith("("):  # A tuple's shape has parentheses and blanks of its own.
        depth = 0
        end = 0
        while not end or depth:
            depth += (rest[end] == "(") - (rest[end] == ")")
            end += 1
        shape, rest = rest[:end], rest[end + 1 :]
    else:
        shape, _, rest = rest.partition(" ")
    return Instruction(head[1], shape, rest.partition("(")[0], line)
