"""The engine in a thread of its own, for callers on an event loop.

Requests go in from the loop, updates come back to it, one hop an iteration whatever the number of
requests. Knows nothing of HTTP, text or keys. All methods are the loop's, except where one says
otherwise.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from flora_jax.errors import InputError, RunError
from flora_jax.serve.engine import Engine
from flora_jax.serve.request import Request, RequestId
from flora_jax.serve.updates import Update

State = Literal["starting", "ready", "draining", "failed", "stopped"]
# How a request left: as the engine ended it, or given up by its caller.
Outcome = Literal["stop", "length", "abort", "error"]

# The engine's thread looks for adapters to place and for its end so often while nothing else wakes it.
_LOOK_S = 0.05
# Looks at a step within its time limit. Looks are counted instead of seconds, so that a process that
# was stopped for a while takes no step for hung when it goes on.
_LOOKS = 8
# Bounds of what a refused caller is told to wait.
_LEAST_RETRY_S, _MOST_RETRY_S = 1, 60


class Refused(RunError):
    """Nothing is taken in now; ``retry_after_s`` says when to ask again, where that is known."""

    def __init__(self, message: str, retry_after_s: int | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """As many requests as may wait do."""


class Unavailable(Refused):
    """The engine is not there yet, is on its way out, or broke off."""


class EngineFailed(RunError):
    """The engine broke off, or was ended, while it ran these requests."""


class EngineHung(RunError):
    """A step of the engine did not end in time; its thread is given up, and cannot be joined."""


class TimedOut(RunError):
    """These requests took longer than their caller allows."""


class WarmUp(NamedTuple):
    """How far the start is: ``done`` programs of ``total`` are compiled, ``name`` the last of them."""

    name: str = "loading the model"
    done: int = 0
    total: int = 0


@dataclasses.dataclass
class Timing:
    """When things happened to one request, in seconds of ``time.monotonic``.

    ``last_s`` and ``tokens`` are those of the last update. ``queued_s`` is how long it waited for a row.
    """

    request: Request
    arrived_s: float
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    queued_s: float | None = None

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time between tokens after the first; ``None`` with fewer than two."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)


class Observer(Protocol):
    """Who is told how requests go; the one who knows latencies is :class:`Runner`."""

    def arrived(self, timing: Timing) -> None:
        """It was taken in."""

    def refused(self, request: Request) -> None:
        """The queue was full."""

    def began(self, timing: Timing) -> None:
        """The first token is there."""

    def progressed(self, timing: Timing, tokens: int, gap_s: float) -> None:
        """``tokens`` more are there, ``gap_s`` after the last ones, or after the arrival."""

    def ended(self, timing: Timing, outcome: Outcome, seconds: float) -> None:
        """``seconds`` after its arrival."""


class Answers:
    """What requests that were submitted together bring; iterated over by one task.

    Each item is all that has come since the last: pairs of a request's place among them and an update.
    The iteration ends when all have ended, or after :meth:`cancel`.

    Raises, from the iteration:
        EngineFailed: the engine broke off.
        TimedOut: they took too long; those that had not ended are cancelled.
    """

    def __init__(self, runner: Runner, ids: Sequence[RequestId]):
        self._runner = runner
        self._places = {request_id: place for place, request_id in enumerate(ids)}
        self._left = len(ids)
        self._come: list[tuple[int, Update]] = []
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.cancelled = False

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> list[tuple[int, Update]]:
        while not self._come:
            if self._error is not None:
                raise self._error
            if self.cancelled or not self._left:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        come, self._come = self._come, []
        return come

    @property
    def timed_out(self) -> bool:
        return isinstance(self._error, TimedOut)

    def cancel(self) -> None:
        """Ends those that have not ended; they give up their rows at the engine's next step."""
        if not self.cancelled:
            self.cancelled = True
            if self._timer is not None:
                self._timer.cancel()
            self._runner._abandon(list(self._places))
            self._wake.set()

    def _end_after(self, seconds: float) -> None:
        def expire() -> None:
            self._error = TimedOut(f"not answered within {seconds:g} s")
            self.cancel()

        self._timer = asyncio.get_running_loop().call_later(seconds, expire)

    def _add(self, update: Update) -> None:
        self._come.append((self._places[update.request_id], update))
        if update.finish_reason is not None:
            self._left -= 1
            if not self._left and self._timer is not None:
                self._timer.cancel()
        self._wake.set()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._wake.set()


class _Stopped(Exception):
    """The start was given up."""


class _Open(NamedTuple):
    """A request that has not ended."""

    timing: Timing
    answers: Answers


class Runner:
    """One engine, its thread, and a bounded queue in front of it.

    Args:
        make: makes the engine, compiled and ready, in its thread; is given where to say how far it is.
        rows: sequences that the engine runs at once.
        max_queue: requests that may wait beside them.
        observers: told of every request.
        step_timeout_s: a step that takes longer counts as a failure of the engine.
    """

    def __init__(
        self,
        make: Callable[[Callable[[str, int, int], None]], Engine],
        rows: int,
        max_queue: int,
        observers: Sequence[Observer] = (),
        step_timeout_s: float = math.inf,
    ):
        self.rows, self.max_queue = rows, max_queue
        self.state: State = "starting"
        self.warm_up = WarmUp()
        # Why the engine broke off, or could not be made.
        self.error: BaseException | None = None
        self.observers = list(observers)
        self._make = make
        self._engine: Engine | None = None
        self._open: dict[RequestId, _Open] = {}
        self._recent_s: collections.deque[float] = collections.deque(maxlen=64)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._changed = asyncio.Event()
        self._step_timeout_s = step_timeout_s
        # Rounds of the engine's thread.
        self._rounds = 0
        # Adapters to place, each with who waits for it; the engine's thread takes them.
        self._wanted: collections.deque[tuple[str, asyncio.Future[None]]] = collections.deque()
        # All who wait for one, wherever the engine's thread has them; only the loop looks here.
        self._placing: set[asyncio.Future[None]] = set()

    def start(self) -> None:
        """Starts the engine's thread; the running loop is the one that gets its updates."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine, for what any thread may ask of it.

        Raises:
            Unavailable: it is not there yet, or no more.
        """
        if self._engine is None or self.state == "failed":
            raise self._unavailable()
        return self._engine

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def check_open(self) -> None:
        """Whether requests are taken in.

        Raises:
            Unavailable: they are not, and why.
        """
        if self.state != "ready":
            raise self._unavailable()

    def check_room(self, number: int) -> None:
        """Whether so many requests together can be taken in at all; to ask before they are made.

        Raises:
            InputError: they are too many for an empty queue.
        """
        room = self.rows + self.max_queue
        if number > room:
            raise InputError(f"{number} choices are asked for, at most {room} are served")

    def submit(self, requests: Sequence[Request], timeout_s: float | None = None) -> Answers:
        """Takes requests in, all or none of them; their request ids have to be new.

        Args:
            requests: what to run.
            timeout_s: how long all of them together may take.

        Raises:
            Unavailable: the engine is not ready.
            QueueFull: there is no room for all of them.
            InputError: the engine cannot serve one of them, or they are too many for an empty queue.
        """
        self.check_open()
        self.check_room(len(requests))
        engine, room = self.engine, self.rows + self.max_queue
        if len(self._open) + len(requests) > room:
            for observer in self.observers:
                for request in requests:
                    observer.refused(request)
            raise QueueFull(
                f"{max(0, len(self._open) - self.rows)} requests wait, at most {self.max_queue} may",
                self._retry_after_s(),
            )
        now_s = time.monotonic()
        ids: list[RequestId] = []
        for request in requests:
            assert request.request_id is not None
            ids.append(request.request_id)
        answers = Answers(self, ids)
        try:
            for request_id, request in zip(ids, requests):
                engine.add(request)
                self._open[request_id] = _Open(Timing(request, now_s), answers)
        except BaseException:
            for request_id in ids:
                if self._open.pop(request_id, None) is not None:
                    engine.cancel(request_id)
            raise
        if timeout_s is not None:
            answers._end_after(timeout_s)
        for observer in self.observers:
            for request_id in ids:
                observer.arrived(self._open[request_id].timing)
        return answers

    async def place(self, name: str) -> None:
        """Waits until an adapter is resident on the device.

        Raises:
            InputError: nothing has this name, or its adapter cannot be read or does not fit.
            Unavailable: the engine went away before.
        """
        found: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.check_open()
        self._placing.add(found)
        self._wanted.append((name, found))
        try:
            await found
        finally:
            self._placing.discard(found)

    def drain(self) -> None:
        """Takes nothing in any more; what is there goes on."""
        if self.state in ("starting", "ready"):
            self._become("draining")

    async def wait_until(self, *states: State) -> State:
        """Waits for one of these states; "failed" and "stopped" always end the wait."""
        while self.state not in (*states, "failed", "stopped"):
            await self._wait_for_change()
        return self.state

    async def wait_until_idle(self) -> None:
        """Waits until no request is open, or the engine is no more."""
        while self._open and self.state not in ("failed", "stopped"):
            await self._wait_for_change()

    async def close(self) -> None:
        """Ends the engine's thread after its current step; open requests fail."""
        self._stop.set()
        if self._thread.ident is not None and not isinstance(self.error, EngineHung):
            await asyncio.to_thread(self._thread.join)
        if self.state != "failed":
            self._fail_open("the server is shutting down")
            self._become("stopped")

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _become(self, state: State) -> None:
        self.state = state
        self._changed.set()

    def _unavailable(self) -> Unavailable:
        if self.state == "starting":
            name, done, total = self.warm_up
            far = f"{done} of {total} programs are compiled" if total else name
            return Unavailable(f"the server is starting: {far}", _LEAST_RETRY_S)
        if self.state == "failed":
            return Unavailable("the engine broke off")
        return Unavailable("the server is shutting down")

    def _retry_after_s(self) -> int:
        """About how long the queue needs until there is room: a request's usual time over the rows."""
        usual_s = sum(self._recent_s) / len(self._recent_s) if self._recent_s else 1.0
        wait_s = usual_s * max(1, self.max_queue) / (2 * self.rows)
        return max(_LEAST_RETRY_S, min(_MOST_RETRY_S, math.ceil(wait_s)))

    def _abandon(self, ids: Sequence[RequestId]) -> None:
        for request_id in ids:
            one = self._open.get(request_id)
            if one is None:
                continue
            if self._engine is not None:
                self._engine.cancel(request_id)
            self._end(request_id, "abort", time.monotonic())

    def _end(self, request_id: RequestId, outcome: Outcome, now_s: float) -> None:
        timing = self._open.pop(request_id).timing
        seconds = now_s - timing.arrived_s
        if outcome != "abort":
            self._recent_s.append(seconds)
        for observer in self.observers:
            observer.ended(timing, outcome, seconds)
        self._changed.set()

    # What the engine's thread has the loop do.

    def _opened(self, engine: Engine) -> None:
        self._engine = engine
        if self.state == "starting":
            self._become("ready")
        if self._step_timeout_s < math.inf:
            self._watch(self._rounds, 0)

    def _watch(self, rounds: int, looks: int) -> None:
        """Looks whether the engine's thread goes on, again and again."""
        if self.state in ("failed", "stopped"):
            return
        looks = looks + 1 if rounds == self._rounds else 0
        if looks > _LOOKS:
            seconds = f"{self._step_timeout_s:g} s"
            self._broke(EngineHung(f"a step of the engine did not end within {seconds}"))
            return
        assert self._loop is not None
        self._loop.call_later(self._step_timeout_s / _LOOKS, self._watch, self._rounds, looks)

    def _report(self, warm_up: WarmUp) -> None:
        self.warm_up = warm_up

    def _spread(self, updates: Sequence[Update], now_s: float) -> None:
        for update in updates:
            one = self._open.get(update.request_id)
            if one is None:
                continue  # Given up while this was on its way.
            timing = one.timing
            if update.token_ids:
                self._progress(timing, update, now_s)
            if update.finish_reason is not None:
                self._end(update.request_id, update.finish_reason, now_s)
            one.answers._add(update)

    def _progress(self, timing: Timing, update: Update, now_s: float) -> None:
        tokens, first = len(update.token_ids), timing.last_s is None
        gap_s = now_s - (timing.arrived_s if timing.last_s is None else timing.last_s)
        if first:
            timing.first_s, timing.queued_s = now_s, update.queued_s
        timing.last_s = now_s
        timing.tokens += tokens
        for observer in self.observers:
            if first:
                observer.began(timing)
            observer.progressed(timing, tokens, gap_s)

    def _broke(self, error: BaseException) -> None:
        if self.state == "failed":
            return  # What was given up has gone on, and broken.
        self.error = error
        self._stop.set()
        self._become("failed")
        self._fail_open("the engine broke off")

    def _fail_open(self, why: str) -> None:
        now_s = time.monotonic()
        for request_id, one in list(self._open.items()):
            one.answers._fail(EngineFailed(why))
            self._end(request_id, "error", now_s)
        for waiter in self._placing:
            _settle(waiter, Unavailable(why))

    # The engine's thread.

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody listens any more.
            self._loop.call_soon_threadsafe(function, *arguments)

    def _work(self) -> None:
        engine: Engine | None = None
        loading: list[tuple[str, asyncio.Future[None]]] = []
        try:
            engine = self._make(self._say)
            self._tell(self._opened, engine)
            while not self._stop.is_set():
                self._rounds += 1
                while self._wanted:
                    loading.append(self._wanted.popleft())
                loading = [one for one in loading if not self._placed(engine, *one)]
                if engine.wait(_LOOK_S):
                    updates = engine.step()
                    if updates:
                        self._tell(self._spread, updates, time.monotonic())
        except _Stopped:
            pass
        except BaseException as error:  # Whatever it is, the engine is of no use now.
            self._tell(self._broke, error)
        finally:
            if engine is not None:
                engine.close()

    def _say(self, name: str, done: int, total: int) -> None:
        """Passes on how far the start is; ends it where nobody wants the engine any more."""
        if self._stop.is_set():
            raise _Stopped
        self._tell(self._report, WarmUp(name, done, total))

    def _placed(self, engine: Engine, name: str, waiter: asyncio.Future[None]) -> bool:
        """Whether the waiter has its answer."""
        error: Exception | None = None
        try:
            if not engine.try_preload(name):
                return False
        except InputError as raised:
            error = raised
        self._tell(_settle, waiter, error)
        return True


def _settle(waiter: asyncio.Future[None], error: Exception | None) -> None:
    if waiter.done():
        return  # Nobody waits any more.
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)
