"""The engine: continuous batching over one model, every sequence under its own adapter.

Any thread may add and cancel requests and register adapters. One thread calls ``step``, which asks the
scheduler for a plan and runs it: adapters that were read are written, sequences enter, chunks of prompts
are prefilled, the others draw tokens. A step never sleeps; ``wait`` does, until a step can bring
something. Knows nothing of HTTP or files.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Many
from types import TracebackType
from typing import Any, Literal, Self

from flora_jax.errors import InputError, RunError
from flora_jax.mixing.bank import Prepared
from flora_jax.models.family import ModelConfig
from flora_jax.models.model import Model
from flora_jax.platforms import Platform
from flora_jax.platforms import platform as platform_of
from flora_jax.serve.ahead import Compilations, compile_all, programs
from flora_jax.serve.device import Device, Drawn, Flight
from flora_jax.serve.lattice import Lattice
from flora_jax.serve.options import WHILE_READING, EngineOptions
from flora_jax.serve.pace import Pace
from flora_jax.serve.placement import placement_of
from flora_jax.serve.prefixes import PromptKeys, block_keys, prompt_keys
from flora_jax.serve.preloading import Preloading
from flora_jax.serve.readers import Readers
from flora_jax.serve.registry import Registry, Source, Version, named_sources, version
from flora_jax.serve.request import Limits, Request, RequestId, is_request_id
from flora_jax.serve.residency import make_residency, target_groups
from flora_jax.serve.scheduler import Bounds, Plan, Scheduler
from flora_jax.serve.sequence import Sequence
from flora_jax.serve.state import BROKEN
from flora_jax.serve.stream import Stream
from flora_jax.serve.updates import Stats, Update

# Where an adapter is: in the bank's slots, ready in memory, or in its folder.
AdapterState = Literal["resident", "host", "disk"]
# A sequence's number and what is told of it.
_Told = tuple[int, Update]


class Engine:
    """A model with adapters, ready to serve; a context manager, which closes it.

    Args:
        model: the base; one that was loaded with a mesh is computed by all devices of it together.
        adapters: in memory, or folders, by the names that requests use. All are read at once, and what
            they need bounds later ones too, unless ``options`` ask for more.
        tokenizer: a ``tokenizers.Tokenizer``; without one completions have no text.
        options: the fixed sizes.
        platform: whose choices of shapes and kernels to follow; by default those of JAX's device.

    Raises:
        InputError: an adapter that does not fit the model, options that it cannot have, more end tokens
            than are looked for, or a mesh that cannot share the model.
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
        config, options = model.config, options or EngineOptions()
        options.check(config)
        wanted = options.max_model_len or config.n_positions
        context = options.longest(config.n_positions)
        self.compilations = Compilations()
        self.platform = platform = platform or platform_of()
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.registry = Registry()
        placement = placement_of(model)
        first: dict[Version, Prepared] = {}
        for name, source in named_sources(adapters).items():
            known = version(name, source)
            first[known] = known.read(config, model.weight)
            self.registry.register(name, known.source)
        # Guards the inbox, which sequences there are, and whether something has come since the last step.
        self._changed = threading.Condition()
        self._news = False
        self.residency = make_residency(
            first, config, options,
            platform.additive(model.embedding.dtype),
            readers=Readers(options.adapter_readers, options.adapter_timeout_s, self._notify),
            is_pinned=self.registry.is_pinned,
            placement=placement,
        )  # fmt: skip
        self.residency.weights = model.weight
        groups = target_groups(first)
        self.lattice = lattice = Lattice(self.residency, options, context, platform, groups)
        self.device = Device(model, self.residency, lattice, options, platform, placement=placement)
        bounds = bounds_of(lattice, options, platform, self.device.blocks)
        self.scheduler = Scheduler(bounds, self.device.form_of)
        self.limits = Limits(
            context, config.vocab_size, tokenizer, max_logprobs=options.max_logprobs,
            shortened_by="cache_tokens" if context < wanted else None,
        )  # fmt: skip
        self._arrivals = itertools.count()
        self._inbox: collections.deque[Sequence | RequestId] = collections.deque()
        # Those that have not ended: by number of arrival, and the numbers by request id.
        self._sequences: dict[int, Sequence] = {}
        self._numbers: dict[RequestId, int] = {}
        # What the blocks of preempted sequences hold.
        self._copies: dict[int, Any] = {}
        self._preloading = Preloading(self.residency, self.registry.is_current, self._is_awaited)
        self._flight: Flight | None = None
        self._pace = Pace(options.decode_seconds)
        self._broken: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> int:
        """Compiles every program that can be needed; ``progress`` gets the name of one that is there, how
        many are, and of how many. Resets ``compilations``, which stays 0 from here on.

        Returns:
            How many compilations were counted since the engine was made.
        """
        compile_all(self.device, progress)
        return self.compilations.reset()

    @property
    def programs(self) -> int:
        """How many programs :meth:`warm_up` compiles."""
        return len(programs(self.device))

    @property
    def config(self) -> ModelConfig:
        """The base model's."""
        return self.model.config

    @property
    def max_model_len(self) -> int:
        """Positions of the longest sequence, prompt and output together: no more than the cache has."""
        return self.lattice.context

    @property
    def attention_note(self) -> str | None:
        """Which attention prompts go through and why, where it is not what the platform wants."""
        why = self.device.attention_note
        return None if why is None else f"{self.device.prompt_attention} ({why})"

    def register(self, name: str, source: Source, *, pinned: bool = False) -> None:
        """Makes an adapter known, or replaces what the name stood for; any thread may call.

        Requests that were added before keep what the name stood for then. A folder is hashed here, by
        the calling thread, and read when a request needs it. A pinned adapter is never evicted.

        Raises:
            InputError: there is no adapter at that path.
        """
        self.registry.register(name, source, pinned=pinned)

    def unregister(self, name: str) -> None:
        """Forgets an adapter's name; requests that were added before keep it. Any thread may call.

        Raises:
            InputError: nothing has this name.
        """
        try:
            self.registry.unregister(name)
        except KeyError:
            raise InputError(f"unknown adapter {name!r}") from None

    @property
    def adapters(self) -> dict[str, AdapterState]:
        """Where the adapters are, by the names that requests use; any thread may ask."""
        found: dict[str, AdapterState] = {}
        for known in self.registry.versions():
            ready = known.in_memory or self.residency.is_read(known)
            host: AdapterState = "host" if ready else "disk"
            found[known.name] = "resident" if self.residency.is_resident(known) else host
        return found

    def preload(self, names: Iterable[str]) -> None:
        """Reads adapters and writes them into the bank, as their first requests would.

        Returns when all are there; what does not fit evicts what was used least recently, also those
        that were preloaded just before. By the thread that calls ``step``.

        Raises:
            InputError: nothing has such a name, or its adapter cannot be read or does not fit.
            RunError: running sequences leave no slots for it.
        """
        self._preloading.place_all([self._current(name) for name in names], self._pause)

    def try_preload(self, name: str) -> bool:
        """One attempt of :meth:`preload` that waits for nothing: reading goes on in the background, and
        running sequences may hold the slots. By the thread that calls ``step``.

        Returns:
            Whether the adapter is resident now.

        Raises:
            InputError: nothing has this name, or its adapter cannot be read or does not fit.
        """
        self._preloading.give_up_replaced()
        return self._preloading.place(self._current(name)) == "ready"

    @property
    def has_work(self) -> bool:
        """Whether a request or a cancellation has not come to its end yet; any thread may ask."""
        with self._changed:
            return bool(self._inbox or self._sequences) or self._flight is not None

    @property
    def stats(self) -> Stats:
        scheduler = self.scheduler
        return Stats(
            running=len(scheduler.running), waiting=scheduler.waiting + len(self._inbox),
            preemptions=scheduler.preemptions,
            adapter_loads=self.residency.loads, adapter_evictions=self.residency.evictions,
            cache_usage=1 - scheduler.blocks.available / scheduler.blocks.count,
            prefix_queries=scheduler.prefixes.queries, prefix_hits=scheduler.prefixes.hits,
        )  # fmt: skip

    def add(self, request: Request) -> RequestId:
        """Takes a request under the adapter that its name stands for now; any thread may call.

        Returns:
            The request id that updates carry: the request's own, or a number that no other has.

        Raises:
            InputError: the model or the known adapters cannot serve it, or its id is in use.
            RunError: an iteration broke off.
        """
        self._check_whole()
        own = self._check(request)
        ids, params = request.prompt_token_ids, request.sampling_params
        budget = min(params.max_tokens, self.max_model_len - len(ids))
        stops = self.limits.stop_ids(params, self.config.eos_token_ids)
        with self._changed:
            request, request_id, number = self._named(request)
            stream = Stream(request, stops, budget, self.tokenizer)
            if not budget and params.prompt_logprobs is not None and len(ids) > 1:
                # Its last token follows from the others: they are prefilled, and what is drawn is left.
                ids, budget = ids[:-1], 1
            sequence = Sequence(
                number, request.adapter, len(ids), budget, request, own, stream,
                keys=self._keys(own, ids), may_share=params.prompt_logprobs is None,
                arrived_s=time.monotonic(),
            )  # fmt: skip
            self._sequences[number], self._numbers[request_id] = sequence, number
            self._inbox.append(sequence)
        self._notify()
        return request_id

    def _named(self, request: Request) -> tuple[Request, RequestId, int]:
        """The request with an id and a number to fold in, its id, and its number of arrival."""
        number = next(self._arrivals)
        found = request.request_id
        if found is None:
            found = number
            while found in self._numbers:
                found = next(self._arrivals)
        elif found in self._numbers:
            raise InputError(f"{request.label}: another request with this id has not ended")
        fold_in = number % 2**32 if request.fold_in is None else request.fold_in
        return dataclasses.replace(request, request_id=found, fold_in=fold_in), found, number

    def cancel(self, request_id: RequestId) -> None:
        """Ends a request without a further update; one that is gone already is no error. Any thread.

        Raises:
            TypeError: no request id is of this type.
        """
        if not is_request_id(request_id):
            raise TypeError(f"request_id is {request_id!r}, expected a string or an integer")
        with self._changed:
            self._inbox.append(request_id)
        self._notify()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until a step can bring something, for at most ``timeout`` seconds.

        That is at once where anything runs, else when a request, a cancellation or an adapter comes. By
        the thread that calls ``step``.

        Returns:
            Whether a step can bring something.
        """
        end_s = float("inf") if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._can_step():
                deadline_s = self.residency.deadline_s()
                until_s = end_s if deadline_s is None else min(end_s, deadline_s)
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return until_s < end_s  # A read is overdue.
                self._changed.wait(None if left_s == float("inf") else left_s)
            return True

    def _can_step(self) -> bool:
        runs = bool(self.scheduler.running) or self._flight is not None
        return self._news or runs or (self.scheduler.has_work and not self.residency.is_reading)

    def _notify(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def step(self) -> list[Update]:
        """Runs one iteration and returns what it brought, in the order in which the requests came.

        It returns at once where nothing can run; see :meth:`wait`.

        Raises:
            RunError: an iteration before broke off, by an interrupt or for want of memory: what the host
                knows of the rows and what the device holds may differ since, so the engine is of no use.
        """
        self._check_whole()
        try:
            updates = self._iterate()
        except BaseException as error:
            self._broken = error
            raise
        return [update for _, update in sorted(updates, key=lambda found: found[0])]

    def close(self) -> None:
        """Reads no further adapters. Waits for none that is being read."""
        self.residency.close()

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise RunError(
                f"the engine is of no use since an iteration broke off ({self._broken!r}), make another"
            )

    def _iterate(self) -> list[_Told]:
        updates = self._receive()
        self.residency.expire()
        self._preloading.give_up_replaced()
        if self.scheduler.swapped:
            updates += self._land()  # Who comes back needs its last token.
        steps = self._pace.steps(self.options.decode_steps)
        plan = self.scheduler.plan(self.residency, steps)
        for sequence, why in plan.refused:
            self._release(sequence, claimed=False)
            updates.append(_told(sequence, error=why))
        # The adapters of those that come next are read, though there is no row for them yet.
        for sequence in self.scheduler.heads():
            if sequence.version is not None:
                self.residency.prefetch(sequence.version)
        now_s = time.monotonic()
        for sequence in plan.admitted:
            sequence.queued_s = now_s - sequence.arrived_s
        before, self._flight = self._flight, self._run(plan)
        if plan.unread or not self.platform.pipelined:
            # Also where nothing of the plan was dispatched: what is under way comes first.
            return updates + self._read(before) + self._land()
        return updates + self._read(before)

    def _run(self, plan: Plan) -> Flight | None:
        """Dispatches what a plan says, in its order; nothing waits for the device."""
        began_s = time.monotonic()
        prefilled = self.device.start(plan.started)
        self.device.forget(self.scheduler.blocks.take_forgotten())
        for sequence in plan.swapped_in:
            self.device.swap_in(sequence, self._copies.pop(sequence.number))
        self.residency.write_claimed()
        for chunks in plan.chunks:
            found = self.device.prefill(chunks)
            if found is not None:
                prefilled.append(found)
        for sequence, blocks in plan.swapped_out:
            self._copies[sequence.number] = self.device.copy_out(blocks)
        decoded = None if plan.decode is None else self.device.decode(plan.decode)
        if plan.decode is None and not prefilled:
            return None
        return Flight(prefilled, plan.decode, decoded, began_s)

    def _check(self, request: Request) -> Version | None:
        try:
            self.limits.check(request)
        except InputError as error:
            raise InputError(f"{request.label}: {error}") from None
        if request.adapter is None:
            return None
        try:
            return self._current(request.adapter)
        except InputError as error:
            raise InputError(f"{request.label}: {error}") from None

    def _current(self, name: str) -> Version:
        try:
            return self.registry.current(name)
        except KeyError:
            raise InputError(f"unknown adapter {name!r}") from None

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait(0.05)

    def _is_awaited(self, own: Version) -> bool:
        return any(other.version == own for other in self.scheduler.queued(own.name))

    def _receive(self) -> list[_Told]:
        """Takes what has come; the updates of requests that end without a token."""
        with self._changed:
            arrived, self._news = [*self._inbox], False
            self._inbox.clear()
        cancelled = {one for one in arrived if not isinstance(one, Sequence)}
        updates = []
        for one in arrived:
            if not isinstance(one, Sequence):
                sequence = self._sequences.get(self._numbers.get(one, -1))
                if sequence is not None:
                    self._drop(sequence)
            elif one.budget:
                self.scheduler.add(one)
            else:
                self._forget(one)
                if one.request.request_id not in cancelled:
                    updates.append(_ended(one, ()))
        return updates

    def _land(self) -> list[_Told]:
        """Reads what is under way, if anything is."""
        flight, self._flight = self._flight, None
        return self._read(flight)

    def _read(self, flight: Flight | None) -> list[_Told]:
        """Waits for the tokens of a dispatch and gives them to those sequences that are still there."""
        if flight is None:
            return []
        drawn = flight.read()
        ran = (
            0
            if flight.prefilled
            else max((len(own.token_ids) for own in drawn.values()), default=0)
        )
        self._pace.took(ran, flight.began_s, time.monotonic())
        if flight.decode is not None:
            self.scheduler.landed(flight.decode)
        found = [
            self._extend(self._sequences[number], own)
            for number, own in drawn.items()
            if number in self._sequences
        ]
        return [told for told in found if told is not None]

    def _extend(self, sequence: Sequence, drawn: Drawn) -> _Told | None:
        """Gives a sequence its new tokens; ends it where they do."""
        stream, tokens = sequence.stream, drawn.token_ids
        before = len(stream.token_ids)
        broken = BROKEN in tokens
        for start, logprobs in drawn.prompt:
            stream.add_prompt(start, logprobs)
        if not tokens:
            return None
        try:
            stream.add(tokens[: tokens.index(BROKEN)] if broken else tokens, drawn.logprobs)
        except Exception as error:  # What a tokenizer makes of its text is its own affair.
            self._drop(sequence)
            return _told(sequence, error=_no_text(error))
        new = tuple(stream.token_ids[before:])
        self.scheduler.drew(sequence, len(stream.token_ids))
        if broken and stream.running:
            name = sequence.request.adapter
            adapter = "no adapter" if name is None else f"adapter {name!r}"
            reason = (
                f"{adapter}: the logits after {sequence.drawn} tokens are not finite in "
                f"{self.device.dtype}"
            )
            self._drop(sequence)
            return _told(sequence, new, error=reason)
        if not stream.running:
            self._drop(sequence)
            return _ended(sequence, new)
        return _told(sequence, new) if new else None

    def _keys(self, own: Version | None, token_ids: Many[int]) -> PromptKeys | None:
        """What a prompt under an adapter, and its full blocks, can be found by."""
        if not self.options.prefix_caching:
            return None
        return prompt_keys(_root(own), token_ids, self.options.block_size)

    def _drop(self, sequence: Sequence) -> None:
        """Takes a sequence out with all that it holds."""
        claimed = sequence.stage != "waiting"
        keys = sequence.keys
        if sequence.stage == "decode" and keys is not None and not self.options.batch_invariant:
            # Who goes on with a conversation finds the answer as well. Its bits are those of decoding.
            size = self.options.block_size
            start = len(keys.blocks) * size
            rest = [*sequence.request.prompt_token_ids[start:], *sequence.stream.token_ids]
            before = keys.blocks[-1] if keys.blocks else _root(sequence.version)
            more = block_keys(before, rest, size)
            sequence.keys = keys._replace(blocks=[*keys.blocks, *more])
        self.scheduler.remove(sequence)
        self._release(sequence, claimed)

    def _release(self, sequence: Sequence, claimed: bool) -> None:
        """Gives back what a sequence holds beside its row and blocks; ``claimed``: it had its adapter."""
        own = sequence.version
        if own is not None and claimed:
            self.residency.release(own)
        elif own is not None:
            self._preloading.forget(own)
        self._forget(sequence)
        if self.scheduler.has_work:
            # What is free now may be for one that waits, whatever is being read for others.
            self._notify()

    def _forget(self, sequence: Sequence) -> None:
        self._copies.pop(sequence.number, None)
        request_id = sequence.request.request_id
        assert request_id is not None
        with self._changed:
            del self._sequences[sequence.number], self._numbers[request_id]


def bounds_of(lattice: Lattice, options: EngineOptions, platform: Platform, blocks: int) -> Bounds:
    """What the scheduler keeps to, for an engine of these sizes with so many blocks of the cache."""
    return Bounds(
        rows=options.max_num_seqs,
        blocks=blocks,
        block=options.block_size,
        chunk=lattice.short,
        long_chunk=lattice.long,
        chunks=lattice.chunks[-1],
        budget=lattice.budget,
        steps=options.decode_steps,
        steps_while_waiting=platform.steps_while_waiting,
        steps_while_reading=WHILE_READING,
        # Then a prompt is cut into the same chunks whatever it shares, so its bits are the same.
        shared_stride=lattice.long if options.batch_invariant else 1,
    )


def _root(version: Version | None) -> bytes:
    """Stands for what decides the cache's content beside the tokens; as long as a block's key."""
    own = b"" if version is None else version.digest.encode()
    return hashlib.blake2b(own, digest_size=16).digest()


def _told(sequence: Sequence, new: tuple[int, ...] = (), **end: Any) -> _Told:
    """An update with what is new of a sequence's tokens and text."""
    request_id, stream = sequence.request.request_id, sequence.stream
    assert request_id is not None
    if new and stream.logprobs is not None:
        end["logprobs"] = tuple(stream.logprobs[-len(new) :])
    if len(new) == len(stream.token_ids):  # The first.
        end["queued_s"] = sequence.queued_s
        if stream.prompt_logprobs is not None:
            end["prompt_logprobs"] = tuple(stream.prompt_logprobs)
    return sequence.number, Update(request_id, new, stream.take_text(), **end)


def _ended(sequence: Sequence, new: tuple[int, ...]) -> _Told:
    """The last update of a sequence that is through."""
    try:
        completion = sequence.stream.completion()
    except Exception as error:
        return _told(sequence, new, error=_no_text(error))
    return _told(sequence, new, completion=completion)


def _no_text(error: Exception) -> str:
    return f"its tokens have no text: {type(error).__name__}: {error}"
