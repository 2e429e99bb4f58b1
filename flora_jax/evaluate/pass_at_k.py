"""pass@k and how sure it is: over problems, over samples, and between two models. Plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

RESAMPLES = 1000


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of Chen et al. (2021): that one of ``k`` of the ``samples`` is correct.

    Raises:
        ValueError: not ``0 <= correct <= samples`` and ``1 <= k <= samples``.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"found samples={samples}, correct={correct}, k={k}")
    # Of whole numbers, and so exact but for the division.
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of ``values`` as a sample of all problems; ``None`` for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def sampling_error(counts: Sequence[tuple[int, int]]) -> float | None:
    """Standard error of pass@1 with these very problems, from ``(samples, correct)`` of each.

    It tells how far another run of the same sampling would lie, and is far below the error over
    problems at low temperatures; ``None`` where a problem has a single sample.
    """
    if not counts or min(samples for samples, _ in counts) < 2:
        return None
    variance = 0.0
    for samples, correct in counts:
        share = correct / samples
        variance += share * (1 - share) / (samples - 1)
    return math.sqrt(variance) / len(counts)


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> list[float]:
    """Sorted means of ``resamples`` samples of ``values`` with replacement."""
    draw = random.Random(seed)
    return sorted(fmean(draw.choices(values, k=len(values))) for _ in range(resamples))


def interval(means: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """The middle ``share`` of sorted ``means``."""
    tail = (1 - share) / 2
    last = len(means) - 1
    return means[round(tail * last)], means[round((1 - tail) * last)]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same problems; ``difference`` is the second's pass@k less the first's.

    ``low`` and ``high`` bound its 95 % interval by bootstrap over problems; ``better`` and
    ``worse`` count problems on which the second has the higher and the lower pass@k.
    """

    problems: int
    first: float
    second: float
    difference: float
    stderr: float | None
    low: float
    high: float
    better: int
    worse: int


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Compares pass@k problem by problem, which the spread between problems does not blur."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    low, high = interval(bootstrap(differences, seed))
    return Comparison(
        len(differences), fmean(first), fmean(second), fmean(differences),
        standard_error(differences), low, high,
        sum(d > 0 for d in differences), sum(d < 0 for d in differences),
    )  # fmt: skip
