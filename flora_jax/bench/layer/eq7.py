"""The paper's cost model of one projection (its Eq. 7), fitted to measured times.

With ``b·l`` tokens, an adapter of rank ``r`` and a weight ``[I, O]`` the paper counts

    FLoRA       c2 · r · I·O · b·l
    bmm-LoRA    c2 · I·O · b·l  +  c1 · r · (I + O) · b·l

where ``c2`` is the cost of a multiplication in the plain product with the weight, and ``c1`` of one in
the batched products with each row's own factors. For a square weight, ``I = O = d``, the second is
``c2·d²·b·l + 2·c1·r·d·b·l``, and FLoRA is the cheaper one while

    c2·r·d² ≤ c2·d² + 2·c1·r·d        divided by c2·r·d²:        1 ≤ 2·c1/(d·c2) + 1/r

which is Eq. 7. For any weight ``2/d`` is ``(I + O)/(I·O)``. Solved for the rank, the two cost the same at
``r* = 1 / (1 − c1·(I + O)/(c2·I·O))``; where the bracket is not positive FLoRA is cheaper at every rank.

Both constants come from one linear least-squares fit of all measured times, every one divided by
itself so that large ranks do not outweigh small ones; negative ones are not allowed. The base's plain
product, where it was measured, is FLoRA of rank 1 to the model. The model knows neither a constant term
nor that a weight read once serves many rows: ``error`` says how far it is from what was measured.

Knows nothing of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

LARGEST_ERROR = 0.5
"""A fit that is farther off than this somewhere says nothing of the rank where the two cost the same."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """``c1`` and ``c2`` in seconds per multiplication, and the model's largest relative ``error``."""

    c1: float
    c2: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether the model describes what was measured well enough for its conclusion."""
        return self.error <= LARGEST_ERROR


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where FLoRA begins to cost more than bmm-LoRA, in ranks.

    ``rank`` is ``None`` where that does not happen within the ranks measured; ``verdict`` says in words
    which one is cheaper there. ``changes`` counts how often the cheaper one changes over the ranks: more
    than once is noise, or two curves that lie on each other.
    """

    rank: float | None
    verdict: str
    changes: int


def fit(
    inputs: int,
    outputs: int,
    tokens: int,
    flora: Mapping[int, float],
    lora: Mapping[int, float],
    base: float | None = None,
) -> Fit:
    """The constants for seconds by rank of FLoRA and bmm-LoRA over ``tokens = b·l`` tokens.

    Raises:
        ValueError: a side has no times, so that a constant cannot be told.
    """
    if not flora or not lora:
        raise ValueError(
            f"{len(flora)} times of FLoRA and {len(lora)} of LoRA, expected some of both"
        )
    square, border = inputs * outputs * tokens, (inputs + outputs) * tokens
    counts = [(0, r * square) for r in flora] + [(r * border, square) for r in lora]
    times = [*flora.values(), *lora.values()]
    if base is not None:
        counts.append((0, square))
        times.append(base)
    relative = np.asarray(counts, np.float64) / np.asarray(times, np.float64)[:, None]
    one = np.ones(len(times))
    c1, c2 = np.linalg.lstsq(relative, one, rcond=None)[0]
    if c1 < 0:  # Adding ranks to LoRA costs nothing that was measured.
        c1, c2 = 0.0, float(relative[:, 1] @ one / (relative[:, 1] @ relative[:, 1]))
    error = np.max(np.abs(relative @ np.array([c1, c2]) - 1))
    return Fit(float(c1), float(c2), float(error))


def predicted_rank(found: Fit, inputs: int, outputs: int) -> float | None:
    """Eq. 7's rank from which FLoRA costs more; ``None`` where it is cheaper at every rank.

    It says nothing where the fit does not hold (:attr:`Fit.holds`).
    """
    share = found.c1 * (inputs + outputs) / (found.c2 * inputs * outputs) if found.c2 else math.inf
    return 1 / (1 - share) if share < 1 else None


def measured_crossing(flora: Mapping[int, float], lora: Mapping[int, float]) -> Crossing:
    """The last rank at which FLoRA turns from cheaper to more expensive, over the ranks that both have.

    Between two neighbouring ranks the logarithm of the ratio of the times is taken as linear in the
    logarithm of the rank. No rank is given beyond those measured.
    """
    ranks = sorted(flora.keys() & lora.keys())
    gaps = [math.log(flora[r] / lora[r]) for r in ranks]
    turns = [n for n in range(1, len(ranks)) if (gaps[n - 1] <= 0) != (gaps[n] <= 0)]
    if not ranks:
        return Crossing(None, "not measured at a common rank", 0)
    if gaps[-1] <= 0:
        words = (
            "FLoRA is cheaper at the largest rank measured"
            if turns
            else "FLoRA is cheaper at every rank measured"
        )
        return Crossing(None, words, len(turns))
    if not turns:
        return Crossing(None, "FLoRA is more expensive at every rank measured", 0)
    after = turns[-1]
    low, high = math.log(ranks[after - 1]), math.log(ranks[after])
    part = -gaps[after - 1] / (gaps[after] - gaps[after - 1])
    rank = math.exp(low + part * (high - low))
    return Crossing(rank, "FLoRA is more expensive from this rank on", len(turns))
