"""How long requests are: files of (prompt, output) token counts, and a fit for whoever has none.

Chats go through the filter of vLLM's ShareGPT sampler, traces of a service are taken as they are. Knows
nothing of requests, adapters or seeds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flora_jax.errors import InputError

# The columns of a file of chats, and those of a service's trace, which may have arrivals in seconds.
_CHATS = ("input_tokens", "output_tokens")
_TRACE = ("num_prefill_tokens", "num_decode_tokens")
ARRIVED = "arrived_at"
# vLLM's filter for ShareGPT, tokens.
LEAST, MOST_PROMPT, MOST_TOTAL = 4, 1024, 2048


class Lengths(NamedTuple):
    """Prompt and output lengths in tokens ``[N, 2]``, where a trace has them the arrival times in
    seconds ``[N]``; of a file also how many rows it has, and how many of them were kept.
    """

    pairs: np.ndarray
    arrivals_s: np.ndarray | None = None
    file_rows: tuple[int, int] | None = None


def passes_filter(pairs_N2: np.ndarray) -> np.ndarray:
    """Which (prompt, output) lengths vLLM's ShareGPT sampler keeps."""
    prompt_N, output_N = pairs_N2.T
    long_enough_N = (prompt_N >= LEAST) & (output_N >= LEAST)
    return long_enough_N & (prompt_N <= MOST_PROMPT) & (prompt_N + output_N <= MOST_TOTAL)


def read_lengths(path: Path) -> Lengths:
    """The lengths of a CSV file, with its arrival times where it has some.

    Of chats (``input_tokens,output_tokens``) those that pass vLLM's filter, which is made for them; of a
    trace in Azure's columns all that have a token of prompt and of output.

    Raises:
        InputError: no such file, other columns, a value that is no number, or no row that is left.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            columns = next((pair for pair in (_CHATS, _TRACE) if set(pair) <= set(header)), None)
            if columns is None:
                wanted = " or ".join(",".join(pair) for pair in (_CHATS, _TRACE))
                raise InputError(f"{path}: columns {','.join(header)}, expected {wanted}")
            timed = ARRIVED in header
            rows = [_row(path, n, row, columns, timed) for n, row in enumerate(reader, 2)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--lengths {path}: {error}") from None
    table_NX = np.array(rows, float).reshape(-1, 2 + timed)
    pairs_N2 = table_NX[:, :2]
    if columns == _CHATS:
        kept_N = passes_filter(pairs_N2)
        wanted = (
            f"{LEAST} to {MOST_PROMPT} tokens of prompt, {LEAST} or more of output and at most "
            f"{MOST_TOTAL} together"
        )
    else:
        kept_N = pairs_N2.min(axis=1) > 0
        wanted = "a token of prompt and of output"
    if not kept_N.any():
        raise InputError(f"{path}: none of {len(table_NX)} rows has {wanted}")
    arrivals_N = table_NX[kept_N, 2] if timed else None
    return Lengths(pairs_N2[kept_N].astype(int), arrivals_N, (len(table_NX), int(kept_N.sum())))


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
    which the longer of both is cut, to no less than the other, and then both alike.
    """
    prompt_N, output_N = pairs_N2.T
    half = max_total // 2
    short_N = np.minimum(np.minimum(prompt_N, output_N), half)
    long_N = np.minimum(np.maximum(prompt_N, output_N), max_total - short_N)
    longer_N = prompt_N > output_N
    prompt_N, output_N = np.where(longer_N, long_N, short_N), np.where(longer_N, short_N, long_N)
    output_N = np.maximum(output_N, min_total - prompt_N)
    return np.stack([prompt_N, output_N], axis=1)


def scaled(pairs_N2: np.ndarray, scale: float) -> np.ndarray:
    """Both lengths multiplied, rounded half up, with at least 4 tokens of prompt and 1 of output."""
    return np.maximum(np.floor(pairs_N2 * scale + 0.5).astype(int), [LEAST, 1])
