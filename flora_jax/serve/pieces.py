"""Which pieces of prompts go into the next prefill dispatches."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listed
from typing import Any

import jax

from flora_jax.serve.dispatch import Device, Piece
from flora_jax.serve.scheduler import Sequence


def dispatch_prompts(
    running: Listed[Sequence], device: Device
) -> list[tuple[list[Piece], jax.Array]]:
    """Dispatches pieces of prompts within an iteration's budget of tokens.

    Returns those with the last piece of a prompt, and the first tokens by piece, on the device.
    """
    budget = device.lattice.budget - sum(sequence.stage == "decode" for sequence in running)
    dispatched = []
    while pieces := next_pieces(running, device, budget):
        tokens_B = device.prefill(pieces)
        for piece in pieces:
            piece.sequence.prefilled = piece.start + piece.length
            if piece.last:
                piece.sequence.stage, piece.sequence.drawn = "decode", 1
        budget -= sum(piece.length for piece in pieces)
        if tokens_B is not None:
            dispatched.append((pieces, tokens_B))
    return dispatched


def next_pieces(running: Iterable[Sequence], device: Device, budget: int) -> list[Piece]:
    """The oldest prompt's next long piece, or its short ones beside others of the same form; none
    where nobody is in its prompt, or the ``budget`` of tokens does not reach for one.
    """
    found: list[Piece] = []
    lattice = device.lattice
    shared: Any = None
    for sequence in running:
        if sequence.stage != "prefill":
            continue
        start, form = sequence.prefilled, device.form_of(sequence)
        if sequence.prompt - start >= lattice.long:
            if not found:
                return [Piece(sequence, start, lattice.long)] if budget > 0 else []
            continue
        if shared not in (None, form):
            continue
        shared = form
        while start < sequence.prompt and len(found) < max(lattice.pieces):
            count = min(lattice.short, sequence.prompt - start)
            if count > budget:
                return found
            found.append(Piece(sequence, start, count))
            start, budget = start + count, budget - count
    return found
