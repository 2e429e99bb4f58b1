"""Which logical axes a parameter has, by rules that a family of models owns, and their mesh axes.

Knows nothing of arrays: importing it brings no JAX in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# A pattern of a parameter's path, "*" for any one part, and one logical axis for each of its dimensions.
Rules = Sequence[tuple[str, tuple[str, ...]]]
# The axes that all families name. As in Megatron: the first product of a pair is split on its outputs
# and the second on its inputs: a block needs one all-reduce after attention and one after the MLP.
MESH_AXES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "qkv": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": None,
    "head_dim": None,
    "position": None,
}


def logical_axes(name: str, dimensions: int, rules: Rules) -> tuple[str, ...]:
    """The logical axes of one parameter.

    Raises:
        ValueError: not exactly one rule matches ``name``, or it is for another number of dimensions.
    """
    found = [(pattern, axes) for pattern, axes in rules if _matches(pattern, name)]
    if len(found) != 1:
        patterns = ", ".join(pattern for pattern, _ in found) or "none"
        raise ValueError(f"sharding: {name} matches {len(found)} rules ({patterns}), expected one")
    pattern, axes = found[0]
    if len(axes) != dimensions:
        raise ValueError(
            f"sharding: {name} has {dimensions} dimensions, rule {pattern} is for {len(axes)}"
        )
    return axes


def _matches(pattern: str, name: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted))
