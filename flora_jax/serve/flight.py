"""What was dispatched and is not read yet. Knows nothing of queues or text."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from flora_jax.serve.dispatch import Piece
from flora_jax.serve.scheduler import Sequence
from flora_jax.serve.state import RESTING


class Flight(NamedTuple):
    """Prompts' last pieces with the first tokens by piece, on the device; and rows with their tokens
    ``[B, N]``, on the device, and how many each may have drawn.
    """

    prefilled: list[tuple[list[Piece], jax.Array]]
    rows: list[Sequence]
    tokens_BN: jax.Array | None
    flying: list[int]

    @classmethod
    def of(
        cls,
        prefilled: list[tuple[list[Piece], jax.Array]],
        rows: list[Sequence],
        tokens_BN: jax.Array | None,
        steps: int,
    ) -> Flight:
        """Marks the rows' sequences as drawing up to ``steps`` tokens that nobody has read."""
        flying = [min(steps, max(1, sequence.left)) for sequence in rows]
        for sequence, number in zip(rows, flying):
            sequence.flying += number
        return cls(prefilled, rows, tokens_BN, flying)

    def land(self) -> dict[int, list[int]]:
        """Waits for the tokens and returns them by ticket, in order."""
        drawn: dict[int, list[int]] = {}
        for pieces, tokens_B in self.prefilled:
            for piece, token in zip(pieces, jax.device_get(tokens_B)):
                if piece.last:
                    drawn[piece.sequence.ticket] = [int(token)]
        if self.tokens_BN is not None:
            tokens_BN = np.asarray(self.tokens_BN)
            for sequence, number, own_N in zip(self.rows, self.flying, tokens_BN):
                sequence.flying -= number
                own = drawn.setdefault(sequence.ticket, [])
                own += [int(token) for token in own_N if token != RESTING]
        return drawn
