"""The engine: continuous batching over one model, every sequence under its own adapter.

``add`` and ``cancel`` may be called by any thread; ``step``, by one, runs an iteration: adapters that
have come are written, sequences enter, pieces of prompts are prefilled, the others draw tokens. Knows
nothing of HTTP or files.
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from flora_jax.errors import InputError, RunError
from flora_jax.mixing.bank import Prepared
from flora_jax.models.model import Model
from flora_jax.models.transpose import for_decoding
from flora_jax.platforms import Platform
from flora_jax.platforms import platform as platform_of
from flora_jax.serve.ahead import compile_all
from flora_jax.serve.compilations import Compilations
from flora_jax.serve.dispatch import Device, Job
from flora_jax.serve.flight import Flight
from flora_jax.serve.layout import longest_sequence, make_pool, target_groups
from flora_jax.serve.options import WHILE_READING, EngineOptions
from flora_jax.serve.pieces import dispatch_prompts
from flora_jax.serve.pool import LoadError
from flora_jax.serve.programs import Lattice
from flora_jax.serve.request import Request
from flora_jax.serve.scheduler import Admission, Scheduler, Sequence
from flora_jax.serve.state import BROKEN
from flora_jax.serve.stream import Stream
from flora_jax.serve.updates import Stats, Update
from flora_jax.serve.versions import Source, Version, version


class Engine:
    """A model with a pool of adapters, ready to serve.

    Args:
        model: the base. On a CPU a copy of its kernels is held by outputs, unless it comes from
            :func:`~flora_jax.models.transpose.for_decoding` already.
        adapters: in memory, or folders, by the names that requests use. All are read at once, and what
            they need bounds later ones too, unless ``options`` ask for more.
        tokenizer: a ``tokenizers.Tokenizer``; without one completions have no text.
        options: the fixed sizes.
        platform: whose choices of shapes and kernels to follow; by default those of JAX's device.

    Raises:
        InputError: an adapter that does not fit the model, options that it cannot have, or more end
            tokens than are looked for.
    """

    def __init__(
        self,
        model: Model,
        adapters: Mapping[str, Source] | None = None,
        *,
        tokenizer: Any | None = None,
        options: EngineOptions | None = None,
        platform: Platform | None = None,
    ):
        config = model.config
        options = options or EngineOptions()
        context = longest_sequence(config, options)
        self.compilations = Compilations()
        self.platform = platform = platform or platform_of()
        model = for_decoding(model, platform=platform)
        self.model, self.tokenizer, self.options, self.context = model, tokenizer, options, context
        first: dict[Version, Prepared] = {}
        for name, source in (adapters or {}).items():
            known = version(name, source)
            first[known] = known.read(config)
        additive = platform.additive(model.embedding.dtype)
        self.pool = make_pool(first, config, options, additive)
        self.lattice = Lattice(self.pool, options, context, platform, target_groups(first))
        pages = options.cache_pages(context)
        self.scheduler = Scheduler(options.max_num_seqs, pages, options.page)
        self.device = Device(model, self.pool, self.lattice, options, pages, platform)
        self._tickets = itertools.count()
        self._inbox: collections.deque[Sequence | int] = collections.deque()
        self._sequences: dict[int, Sequence] = {}
        self._copies: dict[int, Any] = {}
        self._updates: list[Update] = []
        self._written, self._due = 0, False
        self._flight: Flight | None = None
        self._broken: BaseException | None = None
        self._refused: list[tuple[Sequence, Admission]] = []

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compiles every program that can be needed; ``progress`` gets the name of one that is there, how
        many are, and of how many. Resets ``compilations``, which stays 0 from here on.
        """
        compile_all(self.device, progress)
        self.compilations.reset()

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or self.scheduler.has_work or self._flight is not None

    @property
    def stats(self) -> Stats:
        scheduler = self.scheduler
        return Stats(
            running=len(scheduler.running), waiting=scheduler.waiting + len(self._inbox),
            preemptions=scheduler.preemptions,
            adapter_loads=self.pool.loads, adapter_evictions=self.pool.evictions,
            cache_usage=1 - len(scheduler.free_pages) / scheduler.pages,
        )  # fmt: skip

    def add(self, request: Request) -> int:
        """Takes a request under the adapter that its name stands for now; any thread may call.

        Returns:
            The ticket that updates carry.

        Raises:
            InputError: the model or the known adapters cannot serve it.
            RunError: an iteration broke off.
        """
        self._check_whole()
        own = self._check(request)
        config, ids = self.model.config, request.token_ids
        room = min(request.max_tokens, self.context - len(ids))
        most = self.scheduler.pages * self.options.page
        if len(ids) + room > most:
            raise InputError(
                f"request {request.index}: {len(ids)} tokens and {room} more, the cache holds {most}"
            )
        stops = {*request.stop_token_ids, *(() if request.ignore_eos else config.eos_token_ids)}
        job = Job(request, own, Stream(request, stops, room, self.tokenizer))
        ticket = next(self._tickets)
        self._inbox.append(Sequence(ticket, request.adapter, len(ids), room, job))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Ends a request without a further update; one that is gone already is no error. Any thread.

        Raises:
            TypeError: no ticket is of this type.
        """
        self._inbox.append(operator.index(ticket))

    def step(self) -> list[Update]:
        """Runs one iteration and returns what it brought, in the order of tickets.

        Without anything that can run it waits a moment for adapters that are being read.

        Raises:
            RunError: an iteration before broke off, by an interrupt or for want of memory: what the host
                knows of the rows and what the device holds may differ since, so the engine is of no use.
        """
        self._check_whole()
        try:
            self._iterate()
        except BaseException as error:
            self._broken = error
            raise
        return sorted(self._updates, key=lambda update: update.ticket)

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise RunError(
                f"the engine is of no use since an iteration broke off ({self._broken!r}), make another"
            )

    def _iterate(self) -> None:
        self._updates = []
        self._receive()
        if self.scheduler.aside:
            self._land()  # Who comes back needs its last token.
        for sequence in self.scheduler.resume():
            if sequence.stage == "decode":
                self.device.restore(sequence, self._copies.pop(sequence.ticket))
        self._written, self._due, self._refused = self.pool.loads, False, []
        self.scheduler.admit(self._admission, lambda s: self.pool.is_read(s.content.version))
        self._read_ahead()
        if self.scheduler.running:
            self._run()
        elif self._flight is not None:
            self._land()
        elif self._refused:
            self.pool.wait([sequence.content.version for sequence, _ in self._refused], 0.1)

    def close(self) -> None:
        """Ends the pool's background reader."""
        self.pool.close()

    def _check(self, request: Request) -> Version | None:
        request.check(self.context, self.model.config.vocab_size, self.tokenizer is not None)
        if request.adapter is None:
            return None
        try:
            return self.pool.current(request.adapter)
        except KeyError:
            raise InputError(
                f"request {request.index}: unknown adapter {request.adapter!r}"
            ) from None

    def _receive(self) -> None:
        arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
        cancelled = {one for one in arrived if isinstance(one, int)}
        for one in arrived:
            if isinstance(one, int):
                sequence = self._sequences.get(one)
                if sequence is not None:
                    self._drop(sequence)
            elif one.room:
                self._sequences[one.ticket] = one
                self.scheduler.add(one)
            elif one.ticket not in cancelled:
                completion = one.content.stream.completion()
                self._updates.append(Update(one.ticket, completion=completion))

    def _read_ahead(self) -> None:
        """Begins to read the adapters of those that come next, though there is no row for them yet."""
        for sequence in self.scheduler.heads():
            if sequence.content.version is not None:
                self.pool.prefetch(sequence.content.version)

    def _admission(self, sequence: Sequence) -> Admission:
        own = sequence.content.version
        if own is None:
            return "ready"
        found: Admission = "loading"
        # A write delays those who run: one in an iteration.
        decoding = any(other.stage == "decode" for other in self.scheduler.running)
        due = decoding and self.pool.loads > self._written and not self.pool.is_resident(own)
        self._due = self._due or due
        if not due:
            try:
                found = self.pool.acquire(own)
            except LoadError as error:
                self._drop(sequence)
                self._updates.append(Update(sequence.ticket, error=str(error)))
                return "loading"
        if found != "ready":
            self._refused.append((sequence, found))
        return found

    def _run(self) -> None:
        prefilled = dispatch_prompts(self.scheduler.running, self.device)
        # Nobody should wait for long who has, or could have, a row; how long a read takes nobody knows.
        hurry = prefilled or self._due or any(s.stage == "prefill" for s in self.scheduler.running)
        reading = any(found == "loading" for _, found in self._refused)
        reading_most = WHILE_READING if reading else self.options.decode_steps
        most = self.platform.steps_while_waiting if hurry else reading_most
        if not self.scheduler.can_grow():
            self._land()  # Who is preempted needs its last token.
        rows, steps, preempted = self.scheduler.grow(min(most, self.options.decode_steps))
        for sequence, pages in preempted:
            if pages:
                self._copies[sequence.ticket] = self.device.copy_out(pages)
        eager = self.scheduler.waiting > 0
        tokens_BN = self.device.decode(rows, steps, eager) if rows else None
        before, self._flight = self._flight, None
        if rows or prefilled:
            self._flight = Flight.of(prefilled, rows, tokens_BN, steps)
        if self.platform.pipelined:
            self._read(before)
        else:
            self._land()

    def _land(self) -> None:
        """Reads what is under way, if anything is."""
        flight, self._flight = self._flight, None
        self._read(flight)

    def _read(self, flight: Flight | None) -> None:
        """Waits for the tokens of a dispatch and gives them to those sequences that are still there."""
        for ticket, tokens in (flight.land() if flight else {}).items():
            if ticket in self._sequences:
                self._extend(self._sequences[ticket], tokens)

    def _extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """Gives a sequence its new tokens; ends it where they do."""
        stream = sequence.content.stream
        before = len(stream.token_ids)
        broken = BROKEN in tokens
        stream.add(tokens[: tokens.index(BROKEN)] if broken else tokens)
        new = tuple(stream.token_ids[before:])
        sequence.drawn = len(stream.token_ids)
        if broken and stream.running:
            name = sequence.content.request.adapter
            adapter = "no adapter" if name is None else f"adapter {name!r}"
            reason = (
                f"{adapter}: the logits after {sequence.drawn} tokens are not finite in "
                f"{self.device.dtype}"
            )
            self._drop(sequence)
            self._updates.append(Update(sequence.ticket, new, error=reason))
        elif not stream.running:
            self._drop(sequence)
            self._updates.append(Update(sequence.ticket, new, completion=stream.completion()))
        elif new:
            self._updates.append(Update(sequence.ticket, new))

    def _drop(self, sequence: Sequence) -> None:
        """Takes a sequence out with all that it holds."""
        waiting, own = sequence.stage == "waiting", sequence.content.version
        self.scheduler.remove(sequence)
        if own is not None and not waiting:
            self.pool.release(own)
        elif own is not None:
            others = self.scheduler.queued(sequence.owner)
            if not any(other.content.version == own for other in others):
                self.pool.forget(own)
        self._copies.pop(sequence.ticket, None)
        del self._sequences[sequence.ticket]
