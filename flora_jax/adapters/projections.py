"""What adapters and their files need to know of a base model: its blocks' projections, and their names.

A family of models owns one description (:class:`ModuleNames`); nothing here knows a family, arrays or
files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModuleNames:
    """How the torch model of a family names its modules, and what PEFT adapts where it is not told.

    Args:
        blocks: path of the list of blocks; a block's number follows it.
        embeddings: paths of the embeddings and of the output head, which cannot be adapted.
        others: paths of further modules outside the blocks.
        others_in_block: paths of further modules of a block, below the block; "" is the block.
        defaults: PEFT's own targets by kind, as suffixes of paths; a kind without any takes "lora"'s.
        feedforward: those of the targets of which IA3 scales the input.
    """

    blocks: str
    embeddings: tuple[str, ...]
    others: tuple[str, ...]
    others_in_block: tuple[str, ...]
    defaults: Mapping[str, tuple[str, ...]]
    feedforward: tuple[str, ...]

    def path(self, layer: int, target: str) -> str:
        """The path of a projection, as ``named_modules`` of the torch model has it."""
        return f"{self.blocks}.{layer}.{target}"

    def other_paths(self, layers: int) -> list[str]:
        """The paths of all modules of a model of so many layers that are no projections."""
        below = [f".{name}" if name else "" for name in self.others_in_block]
        in_blocks = [f"{self.blocks}.{n}{name}" for n in range(layers) for name in below]
        return [*self.others, *self.embeddings, *in_blocks]

    def default_targets(self, kind: str) -> tuple[str, ...]:
        """What PEFT adapts in this family where ``target_modules`` is null, as suffixes of paths."""
        return self.defaults.get(kind, self.defaults["lora"])


@dataclasses.dataclass(frozen=True)
class Projections(Mapping[str, tuple[int, int]]):
    """The linear projections of one block: ``{target: (inputs, outputs)}`` in the block's order.

    A target is the projection's path below the block; ``names`` say where the block stands.
    """

    widths: Mapping[str, tuple[int, int]]
    names: ModuleNames

    def __getitem__(self, target: str) -> tuple[int, int]:
        return self.widths[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)

    def suffix(self, target: str) -> str:
        """The shortest end of a target's path that no other projection of the block ends in."""
        parts = target.split(".")
        ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        return next(end for end in ends if match_targets([end], self) == (target,))


def match_targets(names: Sequence[str], projections: Mapping[str, object]) -> tuple[str, ...]:
    """The projections that ``names`` mean, by the end of their path as in PEFT: one may be several.

    They come in the order of ``projections``.

    Raises:
        InputError: a name that no projection ends in.
    """
    for name in names:
        if not any(ends_in(target, name) for target in projections):
            raise InputError(
                f"target {name!r}: expected the end of one of {', '.join(projections)}"
            )
    return tuple(t for t in projections if any(ends_in(t, name) for name in names))


def ends_in(path: str, name: str) -> bool:
    """Whether ``name`` is a path's last part or parts."""
    return path == name or path.endswith(f".{name}")


def check_rank(
    rank: int,
    projections: Projections,
    targets: Iterable[str],
    named: str = "rank",
    model: str = "the model",
) -> None:
    """Whether every target has as many directions; ``named`` and ``model`` are what messages call them.

    Raises:
        InputError: a target's smaller side is less.
    """
    for target in targets:
        inputs, outputs = projections[target]
        if rank > min(inputs, outputs):
            raise InputError(
                f"{named} is {rank}, expected at most {min(inputs, outputs)}: {target} of {model} "
                f"has {inputs} inputs and {outputs} outputs"
            )
