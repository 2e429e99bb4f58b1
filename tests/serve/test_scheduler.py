"""Plans: who runs next and what of it, who is preempted, and that nothing leaks. Without JAX."""

import random

import pytest

from flora_jax.serve.prefixes import PromptKeys, prompt_keys
from flora_jax.serve.scheduler import Bounds, LoadError, Scheduler
from flora_jax.serve.sequence import Sequence


class Adapters:
    """Each version is what it is told to be, all others are ready."""

    def __init__(self, **states):
        self.states = states
        self.resident = set()
        self.asked = []

    def claim(self, version):
        self.asked.append(version)
        found = self.states.get(version, "ready")
        if found not in ("ready", "loading", "full"):
            raise LoadError(found)
        if found == "ready":
            self.resident.add(version)
        return found

    def is_resident(self, version):
        return version in self.resident

    def is_read(self, version):
        return self.states.get(version, "ready") == "ready"


READY = Adapters()


def scheduler_of(rows, blocks=100, block=4, form_of=lambda sequence: None, **bounds):
    return Scheduler(Bounds(rows, blocks, block, **bounds), form_of)


def sequence(number, owner=None, prompt=4, budget=8, keys=(), whole=None, may_share=True):
    own = PromptKeys([*keys], whole) if keys or whole else None
    return Sequence(number, owner, prompt, budget, None, owner, None, keys=own, may_share=may_share)


def numbers(sequences):
    return [one.number for one in sequences]


def admitted(scheduler, adapters=READY):
    return numbers(scheduler.plan(adapters).admitted)


def land(scheduler, plan):
    """Reads a plan's tokens: all that its rows could draw."""
    if plan.decode is not None:
        scheduler.landed(plan.decode)
        for one, number in zip(plan.decode.sequences, plan.decode.most):
            scheduler.drew(one, min(one.budget, one.drawn + number))


def finish(scheduler, count=1):
    for done in scheduler.running[:count]:
        scheduler.remove(done)


def test_different_owners_are_served_in_the_order_of_arrival():
    scheduler = scheduler_of(rows=3)
    for number in range(7):
        scheduler.add(sequence(number, owner=f"adapter {number}"))
    assert admitted(scheduler) == [0, 1, 2]
    finish(scheduler)
    assert admitted(scheduler) == [3]


@pytest.mark.parametrize("flood", [10, 1000])
def test_an_owners_flood_does_not_keep_others_out(flood):
    scheduler = scheduler_of(rows=4)
    for number in range(flood):
        scheduler.add(sequence(number, owner="loud"))
    assert admitted(scheduler) == [0, 1, 2, 3]
    scheduler.add(sequence(flood, owner="quiet"))
    finish(scheduler)
    assert admitted(scheduler) == [flood]


def test_a_flooded_owner_is_served_although_others_keep_coming():
    scheduler = scheduler_of(rows=2)
    scheduler.add(sequence(0, owner="first"))
    scheduler.add(sequence(1, owner="first"))
    found = admitted(scheduler)
    for number in range(2, 12):
        scheduler.add(sequence(number, owner=f"other {number}"))
        finish(scheduler, 2)
        found += admitted(scheduler)
        if 1 in found:
            break
    assert 1 in found


def test_a_request_whose_adapter_is_loading_blocks_nobody():
    scheduler = scheduler_of(rows=2, steps=16, steps_while_reading=3)
    for number in range(4):
        scheduler.add(sequence(number, owner=str(number), budget=40))
    adapters = Adapters(**{"0": "loading"})
    assert admitted(scheduler, adapters) == [1, 2]
    # With a row free it shortens the others' dispatches, and no longer once it runs.
    finish(scheduler)
    scheduler.plan(adapters)
    finish(scheduler)
    assert scheduler.plan(adapters).decode.steps == 3
    adapters.states = {}
    assert numbers(scheduler.plan(adapters).admitted) == [0]
    assert scheduler.plan(adapters).decode.steps == 16


def test_requests_behind_any_number_of_loading_ones_run_if_they_need_no_load():
    scheduler = scheduler_of(rows=2)
    for number in range(40):
        scheduler.add(sequence(number, owner=str(number)))
    adapters = Adapters(**{str(n): "loading" for n in range(40) if n not in (20, 30)})
    assert admitted(scheduler, adapters) == [20, 30]
    # Of the others no adapter is asked for yet.
    assert {*adapters.asked} == {*map(str, range(8)), "20", "30"}


def test_a_request_without_room_for_its_adapter_is_not_passed_for_ever():
    scheduler = scheduler_of(rows=2)
    scheduler.add(sequence(0, owner="large"))
    passed = 0
    for number in range(1, 50):
        scheduler.add(sequence(number, owner=number))
        found = admitted(scheduler, Adapters(large="full"))
        passed += len(found)
        finish(scheduler, 2)
        if not found:
            break
    assert 0 < passed <= 4


def test_a_request_whose_adapter_cannot_be_loaded_is_refused_and_the_others_enter():
    scheduler = scheduler_of(rows=2)
    for number in range(4):
        scheduler.add(sequence(number, owner=str(number)))
    plan = scheduler.plan(Adapters(**{"0": "no such file", "2": "too large"}))
    assert [(one.number, why) for one, why in plan.refused] == [
        (0, "no such file"),
        (2, "too large"),
    ]
    assert numbers(plan.admitted) == [1, 3]
    finish(scheduler, 2)
    assert not scheduler.has_work
    assert not scheduler._share


def test_one_adapter_is_written_in_an_iteration_while_others_decode():
    scheduler = scheduler_of(rows=4, steps=8)
    adapters = Adapters()
    scheduler.add(sequence(0, owner="0", budget=40))
    scheduler.plan(adapters)
    for number in range(1, 4):
        scheduler.add(sequence(number, owner=str(number)))
    for number in range(1, 4):
        plan = scheduler.plan(adapters)
        assert numbers(plan.admitted) == [number]
        assert plan.decode.steps == 1
    assert scheduler.plan(adapters).decode.steps == 8


def test_chunks_keep_to_the_budget_and_one_dispatch_has_one_form():
    form = {0: "a", 1: "b", 2: "a", 3: "a"}
    scheduler = scheduler_of(
        4, 1000, form_of=lambda one: form[one.number],
        chunk=8, long_chunk=32, chunks=3, budget=66,
    )  # fmt: skip
    for number, prompt in enumerate((50, 8, 12, 8)):
        scheduler.add(sequence(number, owner=number, prompt=prompt))

    # A long chunk of the oldest, then short ones of its form; 20 tokens are left for another form.
    first = scheduler.plan(READY)
    assert cut(first) == [
        [(0, 0, 32)],
        [(0, 32, 8), (0, 40, 8), (0, 48, 2)],
        [(1, 0, 8)],
        [(2, 0, 8)],
    ]
    assert [c.last for d in first.chunks for c in d] == [False, False, False, True, True, False]
    assert numbers(first.decode.sequences) == [0, 1]
    second = scheduler.plan(READY)
    assert cut(second) == [[(2, 8, 4), (3, 0, 8)]]
    assert numbers(second.decode.sequences) == [0, 1, 2, 3]


def test_the_youngest_is_preempted_when_the_cache_is_full_and_comes_back_first():
    scheduler = scheduler_of(rows=3, blocks=6, steps=4, steps_while_waiting=1)
    for number in range(3):
        scheduler.add(sequence(number, owner=number, prompt=4, budget=12))
    while not (plan := scheduler.plan(READY)).swapped_out:
        assert not plan.unread
        land(scheduler, plan)
    ((preempted, blocks),) = plan.swapped_out
    assert preempted.number == 2
    assert len(blocks) == -(-preempted.cached // 4)
    assert numbers(plan.decode.sequences) == [0, 1]
    land(scheduler, plan)
    scheduler.add(sequence(3, owner=3))
    assert admitted(scheduler) == []
    preempted = numbers(scheduler.swapped)
    assert preempted[-1] == 2
    finish(scheduler, 3)
    plan = scheduler.plan(READY)
    assert numbers(plan.swapped_in)[0] == preempted[0]
    assert plan.admitted == []


def test_nobody_is_preempted_while_tokens_are_in_flight():
    scheduler = scheduler_of(rows=2, blocks=5, steps=4)
    for number in range(2):
        scheduler.add(sequence(number, owner=number, prompt=4, budget=16))
    flying = []
    while not (plan := scheduler.plan(READY)).unread:
        assert not plan.swapped_out
        flying.append(plan)
    assert plan.decode is None
    for one in flying:
        land(scheduler, one)
    plan = scheduler.plan(READY)
    assert numbers(one for one, _ in plan.swapped_out) == [1]
    assert numbers(plan.decode.sequences) == [0]


def test_who_enters_and_is_preempted_in_one_plan_has_nothing_dispatched():
    """Neither chunks nor a copy of its blocks: it begins anew when it comes back."""
    scheduler = scheduler_of(rows=2, blocks=3, steps=1)
    scheduler.add(sequence(0, owner=0, prompt=4, budget=8))
    land(scheduler, scheduler.plan(READY))
    (old,) = scheduler.running
    while old.cached < 8:
        land(scheduler, scheduler.plan(READY))
    scheduler.add(sequence(1, owner=1, prompt=3, budget=4))
    plan = scheduler.plan(READY)
    assert numbers(plan.admitted) == [1]
    (young,) = scheduler.swapped
    assert (young.blocks, young.prefilled, young.drawn) == ([], 0, 0)
    assert (plan.chunks, plan.swapped_out) == ([], [])
    assert numbers(plan.decode.sequences) == [0]
    finish(scheduler)
    plan = scheduler.plan(READY)
    assert [(c.sequence.number, c.start, c.length) for d in plan.chunks for c in d] == [(1, 0, 3)]
    assert plan.swapped_in == []


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_no_block_has_two_owners_and_none_is_lost(seed, ahead):
    """With plans made before the last one's tokens are read, and without."""
    rng = random.Random(seed)
    scheduler = scheduler_of(4, 12, 3, chunk=4, chunks=2, budget=10, steps=6)
    flying, number, preemptions = [], 0, 0
    for _ in range(300):
        if rng.random() < 0.4:
            scheduler.add(
                sequence(number, rng.randrange(3), rng.randint(1, 12), rng.randint(1, 20))
            )
            number += 1
        if scheduler.swapped:
            while flying:
                land(scheduler, flying.pop(0))
        before = {one: one.stage for one in [*scheduler.running, *scheduler.swapped]}
        states = {str(owner): rng.choice(["ready", "ready", "loading"]) for owner in range(3)}
        adapters = Adapters()
        adapters.states = {int(owner): state for owner, state in states.items()}
        most = rng.choice((None, 1, 3))
        plan = scheduler.plan(adapters, most)
        assert plan.decode is None or plan.decode.steps <= (most or 6)
        dispatched = {c.sequence for d in plan.chunks for c in d}
        rows = [] if plan.decode is None else plan.decode.sequences
        for one in [*rows, *dispatched, *plan.swapped_in]:
            assert one in scheduler.running
        for one, most in zip(rows, plan.decode.most if rows else ()):
            assert len(one.blocks) * 3 >= one.reach
            assert one.reach <= plan.decode.longest
            assert 1 <= most <= plan.decode.steps
        for one, blocks in plan.swapped_out:
            assert before[one] == "decode"
            assert one.in_flight == 0
            assert len(blocks) == -(-one.cached // 3)
        preemptions += len(plan.swapped_out)
        flying.append(plan)
        while len(flying) > (0 if plan.unread else ahead):
            land(scheduler, flying.pop(0))
        for one in [*scheduler.running]:
            if one.stage == "decode" and (one.drawn >= one.budget or rng.random() < 0.05):
                scheduler.remove(one)
        owned = [block for running in scheduler.running for block in running.blocks]
        assert len(set(owned)) == len(owned)
        assert scheduler.blocks.available == 12 - len(owned)
        assert len({s.row for s in scheduler.running} | set(scheduler.free_rows)) == 4
        assert len(scheduler.running) + len(scheduler.free_rows) == 4
    assert preemptions > 3


def cut(plan):
    return [[(c.sequence.number, c.start, c.length) for c in d] for d in plan.chunks]


def test_samples_of_a_prompt_wait_an_iteration_and_prefill_only_its_end():
    scheduler = scheduler_of(rows=4, chunk=8, long_chunk=8, chunks=4, steps=8)
    keys = [b"0", b"1", b"2"]
    for number in range(3):
        scheduler.add(sequence(number, prompt=14, budget=40, keys=keys))
    scheduler.add(sequence(3, owner="other", prompt=14, keys=[b"3"]))
    plan = scheduler.plan(READY)
    assert numbers(plan.admitted) == [0, 3]
    assert plan.decode.steps == 1  # Somebody could go on in the next iteration.
    plan = scheduler.plan(READY)
    assert numbers(plan.admitted) == [1, 2]
    assert cut(plan) == [[(1, 12, 2), (2, 12, 2)]]
    first, second, third = (s for s in scheduler.running if s.number != 3)
    assert first.blocks[:3] == second.blocks[:3] == third.blocks[:3]
    assert len({*first.blocks[3:], *second.blocks[3:], *third.blocks[3:]}) == 3
    assert (scheduler.prefixes.queries, scheduler.prefixes.hits) == (4 * 14, 2 * 12)


@pytest.mark.parametrize("prompt", [3, 4, 14])
def test_samples_of_a_whole_prompt_wait_an_iteration_and_prefill_nothing(prompt):
    scheduler = scheduler_of(rows=4, chunk=8, long_chunk=8, chunks=4)
    keys = [bytes([n]) for n in range(prompt // 4)]
    for number in range(3):
        scheduler.add(sequence(number, prompt=prompt, budget=40, keys=keys, whole=b"all"))
    scheduler.plan(READY)
    plan = scheduler.plan(READY)
    assert numbers(plan.admitted) == [1, 2]
    assert plan.chunks == []
    first, *others = scheduler.running
    last = first.blocks[prompt // 4] if prompt % 4 else None
    for one, start in zip(others, plan.started, strict=True):
        own = one.blocks[prompt // 4] if prompt % 4 else None
        assert start == (one, b"all", last, own)
        assert own is None or own != last
        assert one.blocks[: prompt // 4] == first.blocks[: prompt // 4]
    assert numbers(plan.decode.sequences) == [0, 1, 2]
    assert scheduler.prefixes.hits == 2 * prompt
    finish(scheduler, 3)
    # Kept while there are blocks for others, then forgotten from its end.
    scheduler.add(sequence(3, prompt=prompt, keys=keys, whole=b"all"))
    assert len(scheduler.plan(READY).started) == 1
    finish(scheduler)
    assert scheduler.blocks.take(scheduler.blocks.available)
    assert b"all" in scheduler.blocks.take_forgotten()


def test_who_starts_with_a_whole_prompt_and_is_preempted_at_once_starts_again():
    scheduler = scheduler_of(rows=2, blocks=4, steps=1)
    scheduler.add(sequence(0, owner=0, prompt=3, budget=13, whole=b"all"))
    land(scheduler, scheduler.plan(READY))
    (old,) = scheduler.running
    while old.cached < 12:
        land(scheduler, scheduler.plan(READY))
    scheduler.add(sequence(1, owner=1, prompt=3, budget=9, whole=b"all"))
    plan = scheduler.plan(READY)
    assert numbers(plan.admitted) == [1]
    (young,) = scheduler.swapped
    assert (plan.started, plan.swapped_out, plan.chunks) == ([], [], [])
    assert (young.prefilled, young.drawn, young.keys.whole) == (0, 0, b"all")
    finish(scheduler)
    assert numbers(s.sequence for s in scheduler.plan(READY).started) == [1]


def test_the_last_token_is_always_prefilled_and_whoever_may_not_share_prefills_all():
    scheduler = scheduler_of(rows=4)
    keys = [b"0", b"1"]
    scheduler.add(sequence(0, prompt=8, keys=keys))
    scheduler.plan(READY)
    finish(scheduler)
    scheduler.add(sequence(1, prompt=8, keys=keys))
    assert cut(scheduler.plan(READY)) == [[(1, 4, 4)]]
    finish(scheduler)
    scheduler.add(sequence(2, prompt=8, keys=keys, may_share=False))
    assert cut(scheduler.plan(READY)) == [[(2, 0, 8)]]
    finish(scheduler)
    assert scheduler.blocks.available == 100


def test_beginnings_are_shared_in_multiples_of_the_stride():
    scheduler = scheduler_of(rows=4, chunk=8, long_chunk=8, shared_stride=8)
    keys = [b"0", b"1", b"2", b"3"]
    scheduler.add(sequence(0, prompt=17, keys=keys))
    scheduler.plan(READY)
    scheduler.add(sequence(1, prompt=15, keys=keys[:3]))
    assert cut(scheduler.plan(READY)) == [[(1, 8, 7)]]


def test_what_was_planned_and_preempted_at_once_cannot_be_found():
    """Its blocks were never filled."""
    scheduler = scheduler_of(rows=3, blocks=3, steps=1)
    scheduler.add(sequence(0, owner=0, prompt=4, budget=8))
    land(scheduler, scheduler.plan(READY))
    (old,) = scheduler.running
    while old.cached < 8:
        land(scheduler, scheduler.plan(READY))
    scheduler.add(sequence(1, owner=1, prompt=3, budget=4, keys=[b"0"]))
    scheduler.plan(READY)
    (young,) = scheduler.swapped
    assert not scheduler.blocks.is_known(b"0")
    assert young.published == 0


def test_samples_go_on_where_the_one_that_fills_their_beginning_is_taken_out():
    scheduler = scheduler_of(rows=2, chunk=4, long_chunk=4, chunks=1, budget=4)
    keys = [b"0", b"1", b"2"]
    for number in range(2):
        scheduler.add(sequence(number, prompt=12, keys=keys))
    assert cut(scheduler.plan(READY)) == [[(0, 0, 4)]]
    assert admitted(scheduler) == []
    finish(scheduler)
    plan = scheduler.plan(READY)
    assert numbers(plan.admitted) == [1]
    assert cut(plan) == [[(1, 8, 4)]]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_shared_blocks_hold_what_their_readers_think(seed, ahead):
    """A simulated cache: what is dispatched writes, and who begins to decode finds its own prompt."""
    rng = random.Random(seed)
    scheduler = scheduler_of(4, 14, 3, chunk=4, long_chunk=8, chunks=2, budget=10, steps=6)
    cache, saved, flying, number, hits = {}, {}, [], 0, 0
    prompts = [[rng.randrange(9) for _ in range(12)] for _ in range(3)]
    texts, started = {}, 0
    for _ in range(300):
        if rng.random() < 0.5:
            owner = rng.randrange(2)
            text = prompts[rng.randrange(3)][: rng.choice((2, 5, 9, 11, 12))]
            keys = prompt_keys(bytes([owner]), text, 3)
            new = sequence(number, owner, len(text), rng.randint(1, 20), *keys)
            texts[new], number = (owner, text), number + 1
            scheduler.add(new)
        if scheduler.swapped:
            while flying:
                land(scheduler, flying.pop(0))
        if rng.random() < 0.1 and scheduler.running:
            scheduler.remove(rng.choice(scheduler.running))
        plan = scheduler.plan(READY)
        copies = {own: dict(cache[source]) for _, _, source, own in plan.started if own is not None}
        cache |= copies
        for one in plan.swapped_in:
            for place, block in enumerate(one.blocks[: len(saved[one])]):
                cache[block] = dict(saved[one][place])
        for chunks in plan.chunks:
            for one, start, length in chunks:
                owner, text = texts[one]
                for place in range(start, start + length):
                    cache.setdefault(one.blocks[place // 3], {})[place % 3] = (owner, text[place])
                for place in range(start + length):
                    found = cache[one.blocks[place // 3]][place % 3]
                    assert found == (owner, text[place])
        for one, blocks in plan.swapped_out:
            saved[one] = [dict(cache.get(block, {})) for block in blocks]
        for one in [] if plan.decode is None else plan.decode.sequences:
            owner, text = texts[one]
            for place, token in enumerate(text):
                assert cache[one.blocks[place // 3]][place % 3] == (owner, token)
            for place in range(one.prompt, one.reach):  # What it draws is written.
                cache.setdefault(one.blocks[place // 3], {})[place % 3] = (one.number, place)
        started += len(plan.started)
        flying.append(plan)
        while len(flying) > (0 if plan.unread else ahead):
            land(scheduler, flying.pop(0))
        for one in [*scheduler.running]:
            if one.stage == "decode" and one.drawn >= one.budget:
                scheduler.remove(one)
        hits = scheduler.prefixes.hits
    assert hits > 30
    assert started > 3
    while scheduler.running or scheduler.swapped:
        for one in [*scheduler.running, *scheduler.swapped]:
            scheduler.remove(one)
    assert scheduler.blocks.available == 14
