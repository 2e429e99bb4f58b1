"""How long requests are: files of (prompt, output) token counts, and a fit for whoever has none.

The filter is the one of vLLM's ShareGPT sampler. Knows nothing of requests, adapters or seeds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flora_jax.errors import InputError

# The columns of a length file by what they hold; the second is Azure's way, with arrivals in seconds.
_COLUMNS = (
    ("input_tokens", "output_tokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
)
ARRIVED = "arrived_at"
# vLLM's filter for ShareGPT, tokens.
LEAST, MOST_PROMPT, MOST_TOTAL = 4, 1024, 2048


class Lengths(NamedTuple):
    """Prompt and output lengths in tokens ``[N, 2]`` that passed vLLM's filter, and where a trace has
    them the arrival times in seconds ``[N]``.
    """

    pairs: np.ndarray
    arrivals_s: np.ndarray | None = None


def passes_filter(pairs_N2: np.ndarray) -> np.ndarray:
    """Which (prompt, output) lengths vLLM's ShareGPT sampler keeps."""
    prompt_N, output_N = pairs_N2.T
    long_enough_N = (prompt_N >= LEAST) & (output_N >= LEAST)
    return long_enough_N & (prompt_N <= MOST_PROMPT) & (prompt_N + output_N <= MOST_TOTAL)


def read_lengths(path: Path) -> Lengths:
    """The lengths of a CSV file, with its arrival times where it has some.

    Raises:
        InputError: no such file, other columns, a value that is no number, or no row within the filter.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            columns = next((pair for pair in _COLUMNS if set(pair) <= set(header)), None)
            if columns is None:
                wanted = " or ".join(",".join(pair) for pair in _COLUMNS)
                raise InputError(f"{path}: columns {','.join(header)}, expected {wanted}")
            timed = ARRIVED in header
            rows = [_row(path, n, row, columns, timed) for n, row in enumerate(reader, 2)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--lengths {path}: {error}") from None
    table_NX = np.array(rows, float).reshape(-1, 2 + timed)
    kept_NX = table_NX[passes_filter(table_NX[:, :2])]
    if not len(kept_NX):
        raise InputError(
            f"{path}: none of {len(table_NX)} rows has {LEAST} to {MOST_PROMPT} tokens of prompt, "
            f"{LEAST} or more of output and at most {MOST_TOTAL} together"
        )
    return Lengths(kept_NX[:, :2].astype(int), kept_NX[:, 2] if timed else None)


def _row(
    path: Path, number: int, row: dict[str, Any], columns: Sequence[str], timed: bool
) -> list[float]:
    try:
        found = [int(row[name]) for name in columns]
        time_s = [float(row[ARRIVED])] if timed else []
    except (TypeError, ValueError):
        raise InputError(f"{path}, line {number}: expected numbers, found {row}") from None
    if not all(math.isfinite(value) for value in time_s):
        raise InputError(f"{path}, line {number}: {ARRIVED} is {time_s[0]}, expected a finite time")
    return [*found, *time_s]


def sharegpt_like(count: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs ``[count, 2]`` like those of 300 chats with GPT-4, for whoever has no file of lengths.

    Prompts are short (68 %, log-normal around 20 tokens) or long (around 470), outputs log-normal
    around 270 and at most 768, independent of the prompts (the correlation of the logarithms was
    -0.02). Against the file, after the filter: means of 144 and 285 tokens instead of 149 and 284,
    medians of 29 and 245 instead of 30 and 270.
    """
    found = np.empty((0, 2), int)
    while len(found) < count:
        # A fixed block: more requests leave the first ones as they are.
        is_short_N = rng.random(1024) < 0.68
        short_N, long_N, output_N = rng.standard_normal((3, 1024))
        prompt_N = np.where(is_short_N, 3.0 + 0.8 * short_N, 6.15 + 0.75 * long_N)
        pairs_N2 = np.rint(np.exp(np.stack([prompt_N, 5.6 + 0.8 * output_N], axis=1))).astype(int)
        kept_N = passes_filter(pairs_N2) & (pairs_N2[:, 1] <= 768)
        found = np.concatenate([found, pairs_N2[kept_N]])
    return found[:count]


def clipped(pairs_N2: np.ndarray, min_total: int, max_total: int) -> np.ndarray:
    """The pairs with totals from ``min_total``, for which outputs are lengthened, to ``max_total``, for
    which outputs are cut to what the prompt leaves, and prompts where they leave less than 4 tokens.
    """
    prompt_N, output_N = pairs_N2.T
    prompt_N = np.minimum(prompt_N, max_total - np.minimum(output_N, LEAST))
    output_N = np.minimum(output_N, max_total - prompt_N)
    output_N = np.maximum(output_N, min_total - prompt_N)
    return np.stack([prompt_N, output_N], axis=1)


def scaled(pairs_N2: np.ndarray, scale: float) -> np.ndarray:
    """Both lengths multiplied, rounded half up, with at least 4 tokens of prompt and 1 of output."""
    return np.maximum(np.floor(pairs_N2 * scale + 0.5).astype(int), [LEAST, 1])
