"""How an engine is laid out: rows, cache, lengths of chunks; checked on the host, without JAX."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flora_jax.errors import InputError
from flora_jax.models.family import ModelConfig, positions_in_words
from flora_jax.platforms import Platform
from flora_jax.serve.request import MAX_STOP_TOKENS, MAX_STOPS

# Tokens of a dispatch at most while a row is free and an adapter for it is being read.
WHILE_READING = 4
# Tokens of a chunk that there is room for at least where the options name no chunk.
LEAST_CHUNK = 64
MOST_LOGPROBS = 1024


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The engine's fixed sizes; every shape that is ever compiled follows from them.

    Args:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of one iteration; longer prompts are prefilled over several. A
            long chunk is never cut, so there may be up to ``chunk · prefill_chunks - 1`` more. ``None``
            is 2,048, and enough for the largest dispatch of prompts beside all rows.
        max_model_len: prompt and output together; the model's context where it is ``None``.
        cache_tokens: positions of the key/value cache over all sequences; room for ``max_num_seqs``
            sequences of ``max_model_len`` where it is ``None``. With less, sequences are preempted when
            it is full; no sequence is longer than the cache.
        block_size: positions of a block of the cache.
        chunk: tokens of a short chunk of a prompt; a long one has ``chunk · prefill_chunks``. ``None``
            is what the platform wants.
        prefill_chunks: short chunks of one prefill dispatch at most; ``None`` likewise.
        decode_steps: tokens a row may draw in one dispatch while nobody waits.
        decode_seconds: about how long such a dispatch takes at most, by what the last one took. Who
            arrives waits for its end, and streams come in such pieces; each piece costs the host some
            work. ``None``: ``decode_steps`` alone decides, and not the time that anything takes.
        row_buckets: numbers of rows that a decode dispatch is padded to; ``max_num_seqs`` is always
            one, and ``None`` adds it divided by powers of four where the platform gains by it.
        resident_adapters: how many adapters of the largest size fit the device; all that are given at
            the start where it is ``None``.
        max_components: the most components an adapter may have on a target (its rank; one more for
            HiRA); where it is ``None``, and at least, what the adapters given at the start have.
        targets: projections that later adapters may have besides those of the first ones; without
            ``max_components`` with as many components as any of the first ones has anywhere.
        host_adapter_bytes: bound of the host's cache of adapters that are ready to be written; those
            preloaded for who comes next, at most 4 · ``max_num_seqs``, are not counted.
        adapter_readers: adapters that are read at once.
        adapter_timeout_s: seconds that reading one may take; its requests fail then, and no others.
        merge_prompts: prompts under two or more multiplicative components go through their explicit
            weight, where chunks are long enough for the platform; else by the paper's formula (Eq. 6), as
            decoding does: more products and no weight.
        prefix_caching: requests under one adapter that begin with the same tokens share the blocks of
            that beginning, also after the first has ended, until the cache needs them. With
            ``batch_invariant`` only whole prompts and whole chunks, so that no bit depends on it.
        batch_invariant: always use the largest shapes, so that a row's bits do not depend on its
            neighbours.
        max_logprobs: likeliest tokens whose log probabilities a request may ask for, beside those of
            its own tokens; 0: programs compute none, and requests that ask are refused.
        seed: of requests that have none of their own.

    Raises:
        InputError: a value that no engine can have.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    cache_tokens: int | None = None
    block_size: int = 16
    chunk: int | None = None
    prefill_chunks: int | None = None
    decode_steps: int = 16
    decode_seconds: float | None = None
    row_buckets: tuple[int, ...] | None = None
    resident_adapters: int | None = None
    max_components: int | None = None
    targets: tuple[str, ...] = ()
    host_adapter_bytes: int = 4 << 30
    adapter_readers: int = 4
    adapter_timeout_s: float = 60.0
    merge_prompts: bool = True
    prefix_caching: bool = True
    batch_invariant: bool = False
    max_logprobs: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "max_num_seqs": 1, "block_size": 1, "chunk": 1, "prefill_chunks": 1, "decode_steps": 1,
            "max_num_batched_tokens": self.max_num_seqs + (self.chunk or LEAST_CHUNK),
            "resident_adapters": 1,
            "max_model_len": 1, "cache_tokens": self.block_size, "max_components": 1,
            "host_adapter_bytes": 0, "adapter_readers": 1, "max_logprobs": 0, "seed": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name} is {value}, expected at least {bound}")
        for name in ("decode_seconds", "adapter_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}, expected above 0")
        if self.max_logprobs > MOST_LOGPROBS:
            raise InputError(
                f"max_logprobs is {self.max_logprobs}, expected at most {MOST_LOGPROBS}"
            )
        if self.seed >= 2**32:
            raise InputError(f"seed is {self.seed}, expected below 2**32")
        for rows in self.row_buckets or ():
            if not 1 <= rows <= self.max_num_seqs:
                raise InputError(f"row_buckets has {rows}, expected 1 to {self.max_num_seqs}")

    def check(self, config: ModelConfig) -> None:
        """Whether a model of this configuration can be laid out so; its weights are not needed for it.

        Raises:
            InputError: it has fewer positions or tokens, or more end tokens than are looked for.
        """
        context, most = self.max_model_len or 0, MAX_STOPS - MAX_STOP_TOKENS
        if len(config.eos_token_ids) > most:
            raise InputError(
                f"the model has {len(config.eos_token_ids)} end tokens, at most {most}"
            )
        if context > config.n_positions:
            raise InputError(
                f"max_model_len is {context}, the model has {positions_in_words(config)}"
            )
        if self.max_logprobs > config.vocab_size:
            raise InputError(
                f"max_logprobs is {self.max_logprobs}, the vocabulary has {config.vocab_size} tokens"
            )

    def cache_blocks(self, context: int) -> int:
        """Blocks of the cache of an engine whose longest sequence has ``context`` positions."""
        if self.cache_tokens is not None:
            return -(-self.cache_tokens // self.block_size)
        return self.max_num_seqs * -(-context // self.block_size)

    def longest(self, positions: int) -> int:
        """Positions of the longest sequence under a model that has so many: ``max_model_len``, and no
        more than the cache.
        """
        context = self.max_model_len or positions
        return min(context, self.cache_blocks(context) * self.block_size)

    def on(self, platform: Platform) -> Sizes:
        """The sizes that a platform chooses where the options leave it to it."""
        rows, budget = self.max_num_seqs, self.max_num_batched_tokens
        chunk = self.chunk or platform.chunk
        if budget is not None and self.chunk is None:
            chunk = min(chunk, budget - rows)
        together = self.prefill_chunks or platform.prefill_chunks
        if budget is None:
            budget = max(2048, chunk * together + rows)
        return Sizes(chunk, together, budget, self._buckets(platform))

    def _buckets(self, platform: Platform) -> tuple[int, ...]:
        most = self.max_num_seqs
        if self.batch_invariant:
            return (most,)
        if self.row_buckets is not None:
            return tuple(sorted({*self.row_buckets, most}))
        sizes = {most}
        while most > platform.padded_rows:
            most //= 4
            sizes.add(max(1, most))
        return tuple(sorted(sizes))


class Sizes(NamedTuple):
    """``chunk``, ``prefill_chunks`` and ``max_num_batched_tokens`` as they are used, and the numbers of
    rows that a decode dispatch is padded to, ascending.
    """

    chunk: int
    prefill_chunks: int
    max_num_batched_tokens: int
    row_buckets: tuple[int, ...]
