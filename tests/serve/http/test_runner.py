"""The engine's thread and its callers on a loop, over an engine that does what it is told."""

import asyncio
import threading
import time

import pytest

from flora_jax.errors import InputError
from flora_jax.serve.http.runner import (
    EngineFailed,
    EngineHung,
    QueueFull,
    Runner,
    TimedOut,
    Unavailable,
)
from tests.helpers.http_server import ScriptedEngine
from tests.helpers.requests import make_request


class Notes:
    """An observer that writes down what it is told."""

    def __init__(self):
        self.told = []

    def arrived(self, timing):
        self.told.append(("arrived", timing.request.request_id))

    def refused(self, request):
        self.told.append(("refused", request.request_id))

    def began(self, timing):
        assert timing.time_to_first_token_s > 0
        self.told.append(("began", timing.request.request_id, timing.queued_s))

    def progressed(self, timing, tokens, gap_s):
        assert gap_s >= 0
        self.told.append(("progressed", timing.request.request_id, timing.tokens))

    def ended(self, timing, outcome, seconds):
        self.told.append(("ended", timing.request.request_id, outcome))


def request(name, max_tokens=3, prompt=(1, 2)):
    return make_request(None, prompt, request_id=name, max_tokens=max_tokens)


def run(body, engine=None, rows=2, max_queue=2, observers=(), **options):
    """Runs ``body(runner, engine)`` on a loop with a runner that is ready."""
    engine = engine or ScriptedEngine(rows)

    async def main():
        runner = Runner(lambda report: engine, rows, max_queue, observers, **options)
        runner.start()
        try:
            assert await runner.wait_until("ready") == "ready"
            return await asyncio.wait_for(body(runner, engine), 30)
        finally:
            await runner.close()
            assert engine.closed

    return asyncio.run(main())


async def tokens_of(answers):
    found = {}
    async for come in answers:
        for place, update in come:
            found.setdefault(place, []).extend(update.token_ids)
    return found


def test_requests_of_one_submission_come_back_by_their_places():
    async def body(runner, engine):
        first = runner.submit([request("a", 2), request("b", 4)])
        second = runner.submit([request("c", 3)])
        found = await asyncio.gather(tokens_of(first), tokens_of(second))
        return [{place: len(tokens) for place, tokens in one.items()} for one in found]

    assert run(body) == [{0: 2, 1: 4}, {0: 3}]


def test_an_observer_hears_of_every_request_in_order_and_of_its_latencies():
    notes = Notes()

    async def body(runner, engine):
        await tokens_of(runner.submit([request("a", 2)]))

    run(body, observers=[notes])
    assert notes.told == [
        ("arrived", "a"), ("began", "a", 0.5), ("progressed", "a", 1), ("progressed", "a", 2),
        ("ended", "a", "length"),
    ]  # fmt: skip


def test_a_full_queue_refuses_all_of_a_submission_and_says_when_to_come_back():
    notes = Notes()

    async def body(runner, engine):
        engine.going.clear()
        held = runner.submit([request("a"), request("b"), request("c")])
        with pytest.raises(QueueFull) as caught:
            runner.submit([request("d"), request("e")])
        assert 1 <= caught.value.retry_after_s <= 60
        assert set(engine.open) == {"a", "b", "c"}
        last = runner.submit([request("f")])
        engine.going.set()
        assert set(await tokens_of(held)) == {0, 1, 2}
        assert set(await tokens_of(last)) == {0}
        await tokens_of(runner.submit([request("g"), request("h")]))

    run(body, observers=[notes])
    assert [told[1] for told in notes.told if told[0] == "refused"] == ["d", "e"]


def test_who_cancels_frees_the_row_before_the_next_step():
    notes = Notes()

    async def body(runner, engine):
        answers = runner.submit([request("a", 10**6), request("b", 10**6)])
        await anext(answers)
        answers.cancel()
        assert runner.open_requests == 0
        assert set(engine.cancelled) == {"a", "b"}
        assert not engine.open
        await tokens_of(answers)  # Ends.
        answers.cancel()
        assert len(engine.cancelled) == 2

    run(body, observers=[notes])
    assert notes.told[-2:] == [("ended", "a", "abort"), ("ended", "b", "abort")]


def test_a_request_that_cannot_be_added_takes_its_submission_with_it():
    async def body(runner, engine):
        with pytest.raises(InputError, match="too long"):
            runner.submit([request("a", 100), request("b", prompt=(1,) * 200)])
        assert runner.open_requests == 0
        assert engine.cancelled == ["a"]

    run(body)


def test_what_takes_too_long_is_cancelled_and_says_so():
    async def body(runner, engine):
        answers = runner.submit([request("a", 10**6)], timeout_s=0.05)
        with pytest.raises(TimedOut, match=r"within 0\.05 s"):
            await tokens_of(answers)
        assert engine.cancelled == ["a"]
        quick = runner.submit([request("b", 1)], timeout_s=0.05)
        await tokens_of(quick)
        await asyncio.sleep(0.1)
        assert engine.cancelled == ["a"]

    run(body)


def test_a_step_that_raises_fails_what_is_open_and_whatever_comes_later():
    async def body(runner, engine):
        engine.going.clear()
        answers = runner.submit([request("a"), request("b")])
        engine.error = MemoryError("no more")
        with pytest.raises(EngineFailed):
            await tokens_of(answers)
        assert await runner.wait_until("stopped") == "failed"
        assert isinstance(runner.error, MemoryError)
        with pytest.raises(Unavailable):
            runner.submit([request("c")])
        with pytest.raises(Unavailable):
            await runner.place("x")

    run(body)


def test_a_step_that_does_not_end_fails_what_is_open_and_is_not_waited_for():
    engine, gone_on = ScriptedEngine(), threading.Event()
    step, closed = engine.step, []
    engine.step = lambda: [gone_on.wait(20), step()][1]

    async def body(runner, engine):
        answers = runner.submit([request("a", 1)])
        with pytest.raises(EngineFailed):
            await tokens_of(answers)
        assert runner.state == "failed"
        assert isinstance(runner.error, EngineHung)
        with pytest.raises(Unavailable):
            runner.submit([request("b")])
        await asyncio.wait_for(runner.close(), 2)
        assert not engine.closed
        closed.append(True)
        gone_on.set()  # Whoever hung ends once it goes on.
        await asyncio.to_thread(runner._thread.join)
        await asyncio.sleep(0)
        assert isinstance(runner.error, EngineHung)

    run(body, engine, step_timeout_s=0.5)
    assert closed


async def waiting_for_an_adapter(runner, engine):
    """Who waits for an adapter that the engine's thread has begun to load."""
    asked = threading.Event()
    engine.try_preload = lambda name: asked.set()  # Nothing: it is not there yet.
    waiter = asyncio.ensure_future(runner.place("later"))
    assert await asyncio.to_thread(asked.wait, 10)
    return waiter


def test_whoever_waits_for_an_adapter_is_told_that_the_engine_broke():
    async def body(runner, engine):
        tell = runner._tell

        def tell_and_wait(function, *arguments):
            """The loop has done it before the engine's thread goes on."""
            done = threading.Event()
            tell(lambda: (function(*arguments), done.set()))
            assert done.wait(10)

        waiter = await waiting_for_an_adapter(runner, engine)
        runner._tell = tell_and_wait
        engine.error = MemoryError("no more")
        runner.submit([request("a")])
        with pytest.raises(Unavailable, match="broke off"):
            await asyncio.wait_for(waiter, 10)

    run(body)


def test_whoever_waits_for_an_adapter_is_told_that_the_engine_hangs():
    engine, gone_on = ScriptedEngine(), threading.Event()

    async def body(runner, engine):
        waiter = await waiting_for_an_adapter(runner, engine)
        engine.step = lambda: gone_on.wait(20) and []
        runner.submit([request("a")])
        with pytest.raises(Unavailable, match="broke off"):
            await asyncio.wait_for(waiter, 10)
        gone_on.set()
        await asyncio.to_thread(runner._thread.join)

    run(body, engine, step_timeout_s=0.5)


def test_whoever_waits_for_an_adapter_when_the_runner_closes_is_told():
    async def body(runner, engine):
        waiter = await waiting_for_an_adapter(runner, engine)
        await runner.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await asyncio.wait_for(waiter, 10)

    run(body)


def test_an_idle_engine_and_one_with_short_steps_are_not_hung():
    async def body(runner, engine):
        await asyncio.sleep(1.3)
        await tokens_of(runner.submit([request("a", 20)]))
        assert runner.state == "ready"

    run(body, ScriptedEngine(steps_per_s=50), step_timeout_s=1.0)


def test_an_engine_that_cannot_be_made_leaves_its_reason():
    def make(report):
        raise InputError("no such model")

    async def main():
        runner = Runner(make, 1, 1)
        runner.start()
        assert await runner.wait_until("ready") == "failed"
        await runner.close()
        return str(runner.error)

    assert asyncio.run(main()) == "no such model"


def test_the_start_says_how_far_it_is_and_can_be_given_up():
    first, second = threading.Event(), threading.Event()
    ended = []

    def make(report):
        report("prefill", 1, 3)
        first.set()
        second.wait(10)
        try:
            report("decode", 2, 3)
        finally:
            ended.append(True)

    async def main():
        runner = Runner(make, 1, 1)
        runner.start()
        await asyncio.to_thread(first.wait, 10)
        await asyncio.sleep(0.01)
        assert runner.warm_up == ("prefill", 1, 3)
        with pytest.raises(Unavailable, match="1 of 3 programs"):
            runner.submit([request("a")])
        runner._stop.set()
        second.set()
        await runner.close()
        return runner.state

    assert asyncio.run(main()) == "stopped"
    assert ended == [True]


def test_a_drain_takes_nothing_in_and_lets_what_runs_end():
    async def body(runner, engine):
        engine.going.clear()
        answers = runner.submit([request("a")])
        runner.drain()
        with pytest.raises(Unavailable, match="shutting down"):
            runner.submit([request("b")])
        waiting = asyncio.ensure_future(runner.wait_until_idle())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        engine.going.set()
        assert len((await tokens_of(answers))[0]) == 3
        await waiting

    run(body)


def test_what_is_open_when_the_runner_closes_fails():
    async def body(runner, engine):
        engine.going.clear()
        answers = runner.submit([request("a")])
        await runner.close()
        with pytest.raises(EngineFailed, match="shutting down"):
            await tokens_of(answers)

    run(body)


def test_who_reads_late_gets_all_that_has_come_at_once():
    async def body(runner, engine):
        answers = runner.submit([request("a", 50)])
        await runner.wait_until_idle()
        come = await anext(answers)
        assert len(come) == 50
        with pytest.raises(StopAsyncIteration):
            await anext(answers)

    run(body)


def test_an_adapter_is_placed_between_steps_or_says_why_not():
    async def body(runner, engine):
        await runner.place("fits")
        assert engine.resident == {"fits"}
        with pytest.raises(InputError, match="does not fit"):
            await runner.place("unfit")
        engine.try_preload = lambda name: False
        begun_s = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(runner.place("later"), 0.1)
        assert time.monotonic() - begun_s < 5

    run(body)
