"""What sequences that begin to decode start from, as host arrays. Knows nothing of models or devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flora_jax.serve.scheduler import Sequence as Scheduled
from flora_jax.serve.state import MAX_STOPS, Entries, Settings


def list_entries(entering: Sequence[Scheduled | None], count: int, rows: int, seed: int) -> Entries:
    """``count`` entries; ``None`` is no sequence, and stands past the last of ``rows``.

    ``seed`` is that of requests without one.
    """
    row_B = np.full(count, rows, np.int32)
    position_B, drawn_B, left_B = (np.zeros(count, np.int32) for _ in range(3))
    stops_BE = np.full((count, MAX_STOPS), -1, np.int32)
    for entry, sequence in enumerate(entering):
        if sequence is not None:
            # A row that has not drawn yet has done so with this token.
            drawn = max(1, sequence.drawn)
            assert sequence.row is not None
            row_B[entry], drawn_B[entry] = sequence.row, drawn
            position_B[entry] = sequence.prompt + drawn - 1
            left_B[entry] = sequence.room - drawn
            stops = sequence.content.stream.stops
            stops_BE[entry, : len(stops)] = sorted(stops)
    settings = _settings(entering, count, seed)
    return Entries(row_B, position_B, drawn_B, left_B, stops_BE, settings)


def _settings(sequences: Sequence[Scheduled | None], count: int, seed: int) -> Settings:
    temperature_B, top_p_B = np.zeros(count, np.float32), np.ones(count, np.float32)
    top_k_B, seeded_B = np.zeros(count, np.int32), np.zeros(count, bool)
    seed_BX = np.zeros((count, 2), np.uint32)
    for row, sequence in enumerate(sequences):
        if sequence is None:
            continue
        request = sequence.content.request
        params = request.sampling_params
        temperature_B[row] = params.temperature
        top_k_B[row], top_p_B[row] = params.top_k, params.top_p
        seeded_B[row] = params.seed is not None
        seed_BX[row] = (seed, request.fold_in) if params.seed is None else (params.seed, 0)
    return Settings(temperature_B, top_k_B, top_p_B, seed_BX, seeded_B)
