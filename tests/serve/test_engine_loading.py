"""What running requests pay while an adapter that another request waits for is being read."""

import threading

import pytest

from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.serve.engine import Engine
from flora_jax.serve.options import WHILE_READING, EngineOptions
from flora_jax.serve.request import Request
from flora_jax.serve.versions import Version
from tests.helpers.random_adapters import random_adapter

CONFIG = StarCoderConfig(vocab_size=61, n_positions=80, n_embd=16, n_layer=1, n_head=2, n_inner=32)
STEPS = 8


@pytest.fixture
def engine():
    adapters = {
        str(n): random_adapter("flora", n, CONFIG.projections(), 1, rank=1) for n in range(4)
    }
    options = EngineOptions(
        max_num_seqs=4, chunk=8, pieces=2, page=8, decode_steps=STEPS, resident_adapters=4
    )
    engine = Engine(init_model(CONFIG), {"0": adapters["0"]}, options=options)
    for name in "123":
        engine.pool.register(name, adapters[name])
    yield engine
    engine.close()


@pytest.fixture
def dispatched(engine, monkeypatch):
    """The steps of every decode dispatch."""
    found = []
    decode = engine.device.decode

    def recorded(rows, steps, eager):
        found.append(steps)
        return decode(rows, steps, eager)

    monkeypatch.setattr(engine.device, "decode", recorded)
    return found


def hold(monkeypatch, slow):
    """Reading the adapters named ``slow`` waits for the event that is returned."""
    there = threading.Event()
    read = Version.read

    def delayed(version, config):
        if version.name in slow:
            assert there.wait(60)
        return read(version, config)

    monkeypatch.setattr(Version, "read", delayed)
    return there


def run(engine, updates=None):
    while engine.has_work:
        for update in engine.step():
            assert update.error is None
            if updates is not None and update.completion is not None:
                updates[update.ticket] = update.completion.token_ids


def test_a_read_shortens_dispatches_but_not_to_single_tokens(engine, dispatched, monkeypatch):
    there = hold(monkeypatch, {"1"})
    engine.add(Request(0, (1, 2, 3), "0", max_tokens=40, ignore_eos=True))
    waiting = engine.add(Request(1, (4, 5), "1", max_tokens=2, ignore_eos=True))
    for _ in range(6):
        assert all(update.ticket != waiting for update in engine.step())
    # The first dispatch comes with the prompt, whose row should not wait for its second token.
    assert dispatched == [1] + [WHILE_READING] * 5
    there.set()
    ended = {}
    run(engine, ended)
    assert len(ended[waiting]) == 2
    alone = engine.add(Request(0, (1, 2, 3), "0", max_tokens=40, ignore_eos=True))
    before = dict(ended)
    run(engine, ended)
    assert ended[alone] == before[next(t for t in before if t != waiting)]


def test_an_adapter_whose_turn_to_be_written_comes_next_waits_for_one_token(engine, dispatched):
    engine.add(Request(0, (1, 2, 3), "0", max_tokens=40, ignore_eos=True))
    engine.step()
    for number, name in enumerate("123", 1):
        engine.add(Request(number, (4, 5), name, max_tokens=30, ignore_eos=True))
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
    monkeypatch.setattr(
        Version, "read", lambda v, config: reads.append(v.name) or delayed(v, config)
    )
    patient = engine.add(Request(0, (4, 5), "1", max_tokens=2, ignore_eos=True))
    for _ in range(3):
        engine.cancel(engine.add(Request(1, (4, 5), "1", max_tokens=2, ignore_eos=True)))
        engine.step()
    there.set()
    ended = {}
    run(engine, ended)
    assert len(ended[patient]) == 2
    assert reads == ["1"]
    again = engine.add(Request(2, (4, 5), "1", max_tokens=2, ignore_eos=True))
    run(engine, ended)
    assert ended[again] == ended[patient]


def test_any_number_of_owners_that_are_being_read_hold_up_none_that_is_there(engine, monkeypatch):
    there = hold(monkeypatch, {"1"} | {f"cold {n}" for n in range(20)})
    for number in range(20):
        engine.pool.register(f"cold {number}", engine.pool.current("1").source)
        engine.add(Request(number, (4, 5), f"cold {number}", max_tokens=1, ignore_eos=True))
    ready = [engine.add(Request(30, (1, 2), n, max_tokens=2, ignore_eos=True)) for n in (None, "0")]
    done = set()
    for _ in range(8):
        done |= {update.ticket for update in engine.step() if update.completion}
    assert done == set(ready)
    there.set()
    run(engine)


def test_nothing_is_shortened_where_nothing_is_read(engine, dispatched):
    engine.add(Request(0, (1, 2, 3), "0", max_tokens=41, ignore_eos=True))
    run(engine)
    assert dispatched[:1] == [1]
    assert set(dispatched[1:]) == {STEPS}
