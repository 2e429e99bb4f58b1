"""What running requests pay while an adapter that another request waits for is being read."""

import gc
import threading
import time
import weakref

import pytest

from flora_jax.errors import InputError, RunError
from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.peft.write import write_adapter
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import WHILE_READING, EngineOptions
from flora_jax.serve.registry import Version
from tests.helpers.random_adapters import random_adapter
from tests.helpers.requests import make_request

CONFIG = StarCoderConfig(vocab_size=61, n_positions=80, n_embd=16, n_layer=1, n_head=2, n_inner=32)
STEPS = 8


@pytest.fixture
def engine():
    adapters = {
        str(n): random_adapter("flora", n, CONFIG.projections(), 1, rank=1) for n in range(4)
    }
    options = EngineOptions(
        max_num_seqs=4,
        chunk=8,
        prefill_chunks=2,
        block_size=8,
        decode_steps=STEPS,
        resident_adapters=4,
    )
    engine = Engine(init_model(CONFIG), {"0": adapters["0"]}, options=options)
    for name in "123":
        engine.register(name, adapters[name])
    yield engine
    engine.close()


@pytest.fixture
def dispatched(engine, monkeypatch):
    """The steps of every decode dispatch."""
    found = []
    decode = engine.device.decode

    def recorded(planned):
        found.append(planned.steps)
        return decode(planned)

    monkeypatch.setattr(engine.device, "decode", recorded)
    return found


def hold(monkeypatch, slow):
    """Reading the adapters named ``slow`` waits for the event that is returned."""
    there = threading.Event()
    read = Version.read

    def delayed(version, *rest):
        if version.name in slow:
            assert there.wait(60)
        return read(version, *rest)

    monkeypatch.setattr(Version, "read", delayed)
    return there


def run(engine, updates=None):
    while engine.has_work:
        for update in engine.step():
            assert update.error is None
            if updates is not None and update.completion is not None:
                updates[update.request_id] = update.completion.token_ids


def test_a_read_shortens_dispatches_but_not_to_single_tokens(engine, dispatched, monkeypatch):
    there = hold(monkeypatch, {"1"})
    engine.add(make_request(0, (1, 2, 3), "0", max_tokens=40, ignore_eos=True))
    waiting = engine.add(make_request(1, (4, 5), "1", max_tokens=2, ignore_eos=True))
    for _ in range(6):
        assert all(update.request_id != waiting for update in engine.step())
    # The first dispatch comes with the prompt, whose row should not wait for its second token.
    assert dispatched == [1] + [WHILE_READING] * 5
    there.set()
    ended = {}
    run(engine, ended)
    assert len(ended[waiting]) == 2
    alone = engine.add(make_request(0, (1, 2, 3), "0", max_tokens=40, ignore_eos=True))
    before = dict(ended)
    run(engine, ended)
    assert ended[alone] == before[next(t for t in before if t != waiting)]


def test_an_adapter_whose_turn_to_be_written_comes_next_waits_for_one_token(engine, dispatched):
    engine.add(make_request(0, (1, 2, 3), "0", max_tokens=40, ignore_eos=True))
    engine.step()
    for number, name in enumerate("123", 1):
        engine.add(make_request(number, (4, 5), name, max_tokens=30, ignore_eos=True))
    loads = engine.stats.adapter_loads
    while engine.stats.running < 4:
        before = engine.stats.adapter_loads
        engine.step()
        assert engine.stats.adapter_loads <= before + 1
        assert dispatched[-1] <= WHILE_READING
    assert engine.stats.adapter_loads == loads + 3
    run(engine)
    assert max(dispatched) == STEPS


def test_who_is_cancelled_takes_no_read_from_others_who_wait_for_it(engine, monkeypatch):
    reads = []
    there = hold(monkeypatch, {"1"})
    delayed = Version.read
    monkeypatch.setattr(Version, "read", lambda v, *rest: reads.append(v.name) or delayed(v, *rest))
    patient = engine.add(make_request(0, (4, 5), "1", max_tokens=2, ignore_eos=True))
    for _ in range(3):
        engine.cancel(engine.add(make_request(1, (4, 5), "1", max_tokens=2, ignore_eos=True)))
        engine.step()
    there.set()
    ended = {}
    run(engine, ended)
    assert len(ended[patient]) == 2
    assert reads == ["1"]
    again = engine.add(make_request(2, (4, 5), "1", max_tokens=2, ignore_eos=True))
    run(engine, ended)
    assert ended[again] == ended[patient]


def test_any_number_of_owners_that_are_being_read_hold_up_none_that_is_there(engine, monkeypatch):
    there = hold(monkeypatch, {"1"} | {f"cold {n}" for n in range(20)})
    for number in range(20):
        engine.register(f"cold {number}", engine.registry.current("1").source)
        engine.add(make_request(number, (4, 5), f"cold {number}", max_tokens=1, ignore_eos=True))
    ready = [
        engine.add(make_request(30, (1, 2), n, max_tokens=2, ignore_eos=True)) for n in (None, "0")
    ]
    done = set()
    for _ in range(8):
        done |= {update.request_id for update in engine.step() if update.completion}
    assert done == set(ready)
    there.set()
    run(engine)


def test_a_read_holds_up_none_that_needs_none_once_rows_are_free(engine, monkeypatch):
    there = hold(monkeypatch, {"1"})
    slow = engine.add(make_request(0, (4, 5), "1", max_tokens=2, ignore_eos=True))
    ready = {
        engine.add(make_request(1, (1, number), name, max_tokens=3, ignore_eos=True))
        for number, name in enumerate((*[None] * 9, "0"))
    }
    done = set()
    while engine.wait(0.2):
        done |= {update.request_id for update in engine.step() if update.completion}
    assert done == ready
    there.set()
    ended = {}
    while engine.has_work:
        assert engine.wait(10)
        ended |= {update.request_id: update.error for update in engine.step() if update.completion}
    assert ended == {slow: None}


def test_a_refused_request_holds_up_none_behind_it(engine, monkeypatch):
    there = hold(monkeypatch, {"1"})
    engine.preload(["0"])
    good = engine.registry.current("0").source
    engine.add(make_request(0, (4, 5), "1", max_tokens=2, ignore_eos=True))
    engine.register("0", random_adapter("flora", 9, CONFIG.projections(), 1, rank=3))
    refused = engine.add(make_request(1, (4, 5), "0", max_tokens=2))
    engine.register("0", good)
    ready = engine.add(make_request(1, (4, 5), "0", max_tokens=2, ignore_eos=True))
    ended = {}
    while engine.wait(0.2):
        ended |= {u.request_id: u.error for u in engine.step() if u.completion or u.error}
    assert "at most" in ended.pop(refused)
    assert ended == {ready: None}
    there.set()
    run(engine)


def test_nothing_is_shortened_where_nothing_is_read(engine, dispatched):
    engine.add(make_request(0, (1, 2, 3), "0", max_tokens=41, ignore_eos=True))
    run(engine)
    assert dispatched[:1] == [1]
    assert set(dispatched[1:]) == {STEPS}


def seconds(call):
    began = time.monotonic()
    result = call()
    return time.monotonic() - began, result


def test_a_step_never_sleeps_and_who_waits_is_woken_by_what_comes(engine, monkeypatch):
    there = hold(monkeypatch, {"1"})
    assert not engine.wait(0.01)
    slow = engine.add(make_request(0, (4, 5), "1", max_tokens=1, ignore_eos=True))
    assert engine.wait(10)
    engine.step()
    assert engine.has_work
    assert min(seconds(engine.step)[0] for _ in range(3)) < 0.05
    assert not engine.wait(0.02)
    ended = set()

    def woken_by(call):
        threading.Timer(0.05, call).start()
        waited, found = seconds(lambda: engine.wait(20))
        assert found
        assert 0.03 < waited < 10
        while engine.wait(0):
            ended.update(update.request_id for update in engine.step() if update.completion)

    added = []
    woken_by(
        lambda: added.append(engine.add(make_request(1, (1, 2), max_tokens=1, ignore_eos=True)))
    )
    assert ended == {*added}
    woken_by(lambda: engine.cancel(10**6))
    assert ended == {*added}
    woken_by(there.set)
    assert ended == {*added, slow}
    assert not engine.has_work


def test_an_engine_has_work_for_as_long_as_a_request_is_on_its_way(engine, monkeypatch):
    """Also where it is neither in the inbox any more nor in the scheduler yet."""
    seen, add = [], engine.scheduler.add
    monkeypatch.setattr(
        engine.scheduler, "add", lambda sequence: seen.append(engine.has_work) or add(sequence)
    )
    engine.add(make_request(0, (1, 2), max_tokens=1, ignore_eos=True))
    assert engine.has_work
    run(engine)
    assert seen == [True]
    assert not engine.has_work


def test_mounts_that_hang_fail_their_own_requests_and_no_others(monkeypatch):
    """More of them than readers; who asks again while a thread hangs there takes no other thread."""
    adapters = {
        str(n): random_adapter("flora", n, CONFIG.projections(), 1, rank=1) for n in range(2)
    }
    options = EngineOptions(
        max_num_seqs=4, chunk=8, prefill_chunks=2, block_size=8, resident_adapters=4, adapter_readers=2,
        adapter_timeout_s=0.3,
    )  # fmt: skip
    bad = [f"bad {number}" for number in range(3)]
    there = hold(monkeypatch, {*bad})
    engine = Engine(init_model(CONFIG), {"0": adapters["0"]}, options=options)
    for name in ("1", *bad):
        engine.register(name, adapters["1"])
    before = threading.active_count()
    for round_ in range(2):
        names = {
            engine.add(make_request(0, (4, 5), name, max_tokens=2, ignore_eos=True)): name
            for name in (*bad, "1", "0", None)
        }
        ended = {}
        while engine.has_work:
            assert engine.wait(20)
            ended |= {names[u.request_id]: u for u in engine.step() if u.completion or u.error}
        for name in bad:
            assert ended[name].error == f"adapter {name!r}: memory: not read within 0.3 s"
        for name in ("1", "0", None):
            assert len(ended[name].completion.token_ids) == 2
        assert threading.active_count() <= before + 5, round_
    there.set()
    engine.close()


def test_adapters_are_known_by_name_and_by_where_they_are(tmp_path):
    """In memory or in folders; preloaded without a request, forgotten while a request has them."""
    adapters = {str(n): random_adapter("flora", n, CONFIG.projections(), 1) for n in range(4)}
    write_adapter(adapters["2"], tmp_path / "2")
    options = EngineOptions(
        max_num_seqs=2, chunk=8, prefill_chunks=2, block_size=8, resident_adapters=2
    )
    with Engine(init_model(CONFIG), {"0": adapters["0"]}, options=options) as engine:
        assert (engine.config, engine.max_model_len) == (CONFIG, 80)
        engine.register("2", tmp_path / "2")
        engine.register("3", adapters["3"])
        assert engine.adapters == {"0": "host", "2": "disk", "3": "host"}
        engine.preload(["2", "0"])
        assert engine.adapters == {"0": "resident", "2": "resident", "3": "host"}
        assert engine.stats.adapter_loads == 2
        engine.preload(["3"])
        assert engine.adapters == {"0": "resident", "2": "host", "3": "resident"}
        engine.add(make_request(0, (4, 5), "2", max_tokens=2, ignore_eos=True))
        engine.unregister("2")
        for unknown in (
            lambda: engine.unregister("2"),
            lambda: engine.preload(["2"]),
            lambda: engine.add(make_request(1, (4, 5), "2")),
        ):
            with pytest.raises(InputError, match="unknown adapter '2'"):
                unknown()
        ended = {}
        run(engine, ended)
        assert [*map(len, ended.values())] == [2]
        large = random_adapter("flora", 9, CONFIG.projections(), 1, rank=3)
        engine.register("large", large)
        with pytest.raises(InputError, match=r"adapter 'large': attn.c_attn has .* at most"):
            engine.preload(["large"])


def test_preloading_what_running_requests_leave_no_slots_for_says_so(engine):
    for name in "0123":
        engine.add(make_request(0, (1, 2), name, max_tokens=60, ignore_eos=True))
    while engine.stats.running < 4:
        engine.step()
    engine.register("more", engine.registry.current("1").source)
    with pytest.raises(RunError, match="adapter 'more': running requests leave no slots"):
        engine.preload(["more"])
    run(engine)
    engine.preload(["more"])
    assert engine.adapters["more"] == "resident"


@pytest.fixture
def read(monkeypatch):
    """Weak references to all that is read."""
    found = []
    original = Version.read

    def recorded(version, *rest):
        prepared = original(version, *rest)
        found.append(weakref.ref(prepared))
        return prepared

    monkeypatch.setattr(Version, "read", recorded)
    return found


def kept(engine, read, expected):
    """How many of them are kept, once the threads that read them have let go of what they returned."""
    deadline_s = time.monotonic() + 10
    while True:
        engine.residency.expire()
        gc.collect()
        number = sum(one() is not None for one in read)
        if number == expected or time.monotonic() > deadline_s:
            return number
        time.sleep(0.01)


def take_all_slots(engine, read):
    """Four long requests, each under an adapter of its own; what was read for them does not count."""
    for name in "0123":
        engine.add(make_request(0, (1, 2), name, max_tokens=60, ignore_eos=True))
    while engine.stats.running < 4:
        engine.step()
    read.clear()


def until_read(engine, name, read):
    """Tries to place an adapter, which running requests leave no slots for, until it is read."""
    before = len(read)
    while len(read) == before:
        assert not engine.try_preload(name)
        time.sleep(0.002)
    assert not engine.try_preload(name)


def test_an_adapter_whose_name_goes_before_it_has_slots_is_not_kept(engine, read):
    """Unloaded, replaced by another, or both, whoever asks next; what a request waits for is kept."""
    take_all_slots(engine, read)
    contents = [random_adapter("flora", 10 + n, CONFIG.projections(), 1, rank=1) for n in range(4)]
    for content in contents:
        engine.register("more", content)
        until_read(engine, "more", read)
    assert kept(engine, read, 1) == 1
    engine.unregister("more")
    with pytest.raises(InputError, match="unknown adapter"):
        engine.try_preload("more")
    assert kept(engine, read, 0) == 0
    engine.register("more", contents[0])
    until_read(engine, "more", read)
    engine.unregister("more")
    engine.step()
    assert kept(engine, read, 0) == 0
    engine.register("more", contents[0])
    until_read(engine, "more", read)
    waiting = engine.add(make_request(0, (1, 2), "more", max_tokens=1, ignore_eos=True))
    engine.step()
    engine.unregister("more")
    engine.step()
    reads = len(read)
    assert kept(engine, read, 1) == 1
    ended = {}
    run(engine, ended)
    assert len(ended[waiting]) == 1
    assert len(read) == reads


def test_preloading_that_fails_keeps_nothing_of_what_was_read(engine, read):
    take_all_slots(engine, read)
    for name in "ab":
        engine.register(name, random_adapter("flora", 5, CONFIG.projections(), 1, rank=1))
    with pytest.raises(RunError, match="adapter 'a': running requests leave no slots"):
        engine.preload(["a", "b"])
    assert kept(engine, read, 0) == 0


def test_an_adapter_that_finds_no_room_beside_pinned_ones_is_not_kept(engine, read):
    for name in "0123":
        engine.register(name, engine.registry.current(name).source, pinned=True)
    engine.preload("0123")
    read.clear()
    engine.register("more", random_adapter("flora", 5, CONFIG.projections(), 1, rank=1))
    with pytest.raises(InputError, match="no room beside the pinned ones"):
        engine.preload(["more"])
    assert kept(engine, read, 0) == 0
