"""How an engine is laid out: rows, cache, lengths of pieces; checked on the host, without JAX."""

from __future__ import annotations

import dataclasses

from flora_jax.errors import InputError

# Tokens of a dispatch at most while a row is free and an adapter for it is being read.
WHILE_READING = 4


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The engine's fixed sizes; every shape that is ever compiled follows from them.

    Args:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of one iteration; longer prompts are prefilled over several. A
            long piece is never cut, so there may be up to ``chunk · pieces - 1`` more.
        max_model_len: prompt and output together; the model's context where it is ``None``.
        cache_tokens: positions of the key/value cache over all sequences; room for ``max_num_seqs``
            sequences of ``max_model_len`` where it is ``None``. With less, sequences are set aside when
            it is full.
        page: positions of a cache page.
        chunk: tokens of a short piece of a prompt; a long one has ``chunk · pieces``.
        pieces: short pieces of one prefill dispatch at most.
        decode_steps: tokens a row may draw in one dispatch while nobody waits.
        row_buckets: numbers of rows that a decode dispatch is padded to; ``max_num_seqs`` is always
            one, and ``None`` adds it divided by powers of four.
        resident_adapters: how many adapters of the largest size fit the device; all that are given at
            the start where it is ``None``.
        max_components: the most components an adapter may have on a target (its rank; one more for
            HiRA); where it is ``None``, and at least, what the adapters given at the start have.
        targets: projections that later adapters may have besides those of the first ones; without
            ``max_components`` with as many components as any of the first ones has anywhere.
        host_adapter_bytes: bound of the host's cache of adapters that are ready to be written; those
            read ahead for who comes next, at most 4 · ``max_num_seqs``, are not counted.
        merge_prompts: prompts under two or more multiplicative components go through their explicit
            weight; else by the paper's formula (Eq. 6), as decoding does: more products and no weight.
        batch_invariant: always use the largest shapes, so that a row has the same bits in any company.
        seed: of requests that have none of their own.

    Raises:
        InputError: a value that no engine can have.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    cache_tokens: int | None = None
    page: int = 16
    chunk: int = 64
    pieces: int = 4
    decode_steps: int = 16
    row_buckets: tuple[int, ...] | None = None
    resident_adapters: int | None = None
    max_components: int | None = None
    targets: tuple[str, ...] = ()
    host_adapter_bytes: int = 4 << 30
    merge_prompts: bool = True
    batch_invariant: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "max_num_seqs": 1, "page": 1, "chunk": 1, "pieces": 1, "decode_steps": 1,
            "max_num_batched_tokens": self.max_num_seqs + self.chunk, "resident_adapters": 1,
            "max_model_len": 1, "cache_tokens": self.page, "max_components": 1,
            "host_adapter_bytes": 0, "seed": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name} is {value}, expected at least {bound}")
        if self.seed >= 2**32:
            raise InputError(f"seed is {self.seed}, expected below 2**32")
        for rows in self.row_buckets or ():
            if not 1 <= rows <= self.max_num_seqs:
                raise InputError(f"row_buckets has {rows}, expected 1 to {self.max_num_seqs}")

    def buckets(self) -> tuple[int, ...]:
        """Numbers of rows that a decode dispatch is padded to, ascending."""
        most = self.max_num_seqs
        if self.batch_invariant:
            return (most,)
        if self.row_buckets is not None:
            return tuple(sorted({*self.row_buckets, most}))
        sizes = {most}
        while most > 1:
            most //= 4
            sizes.add(max(1, most))
        return tuple(sorted(sizes))
