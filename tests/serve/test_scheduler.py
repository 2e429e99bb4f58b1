"""Rows, pages and queues: who runs next, who is set aside, and that nothing leaks."""

import random

import pytest

from flora_jax.serve.scheduler import Scheduler, Sequence


def ready(_):
    return "ready"


def sequence(ticket, owner=None, prompt=4, room=8):
    return Sequence(ticket, owner, prompt, room)


def admitted(scheduler, admission=ready):
    return [s.ticket for s in scheduler.admit(admission)]


def finish(scheduler, count=1):
    for done in scheduler.running[:count]:
        scheduler.remove(done)


def test_different_owners_are_served_in_the_order_of_arrival():
    scheduler = Scheduler(rows=3, pages=100, page=4)
    for ticket in range(7):
        scheduler.add(sequence(ticket, owner=f"adapter {ticket}"))
    assert admitted(scheduler) == [0, 1, 2]
    finish(scheduler)
    assert admitted(scheduler) == [3]


@pytest.mark.parametrize("flood", [10, 1000])
def test_an_owners_flood_does_not_keep_others_out(flood):
    scheduler = Scheduler(rows=4, pages=100, page=4)
    for ticket in range(flood):
        scheduler.add(sequence(ticket, owner="loud"))
    assert admitted(scheduler) == [0, 1, 2, 3]
    scheduler.add(sequence(flood, owner="quiet"))
    finish(scheduler)
    assert admitted(scheduler) == [flood]


def test_a_flooded_owner_is_served_although_others_keep_coming():
    scheduler = Scheduler(rows=2, pages=100, page=4)
    scheduler.add(sequence(0, owner="first"))
    scheduler.add(sequence(1, owner="first"))
    found = admitted(scheduler)
    for ticket in range(2, 12):
        scheduler.add(sequence(ticket, owner=f"other {ticket}"))
        finish(scheduler, 2)
        found += admitted(scheduler)
        if 1 in found:
            break
    assert 1 in found


def test_a_request_whose_adapter_is_loading_blocks_nobody():
    scheduler = Scheduler(rows=2, pages=100, page=4)
    for ticket in range(4):
        scheduler.add(sequence(ticket, owner=ticket))
    assert admitted(scheduler, lambda s: "loading" if s.ticket == 0 else "ready") == [1, 2]


def test_requests_behind_any_number_of_loading_ones_run_if_they_need_no_load():
    scheduler = Scheduler(rows=2, pages=100, page=4)
    for ticket in range(40):
        scheduler.add(sequence(ticket, owner=ticket))
    asked = []

    def admission(one):
        asked.append(one.ticket)
        return "ready" if one.ticket in (20, 30) else "loading"

    found = scheduler.admit(admission, lambda one: one.ticket in (20, 30))
    assert [one.ticket for one in found] == [20, 30]
    assert set(asked) == {*range(8), 20, 30}  # Of the others no adapter is asked for yet.


def test_a_request_without_room_for_its_adapter_is_not_passed_for_ever():
    scheduler = Scheduler(rows=2, pages=100, page=4)
    scheduler.add(sequence(0, owner="large"))
    passed = 0
    for ticket in range(1, 50):
        scheduler.add(sequence(ticket, owner=ticket))
        found = admitted(scheduler, lambda s: "full" if s.ticket == 0 else "ready")
        passed += len(found)
        finish(scheduler, 2)
        if not found:
            break
    assert 0 < passed <= 4


def test_the_youngest_is_set_aside_when_the_cache_is_full_and_comes_back_first():
    scheduler = Scheduler(rows=3, pages=6, page=4)
    for ticket in range(3):
        scheduler.add(sequence(ticket, owner=ticket, prompt=4, room=12))
    admitted(scheduler)
    for running in scheduler.running:
        running.stage, running.drawn = "decode", 5
    rows, steps, aside = scheduler.grow(4)
    assert [s.ticket for s, _ in aside] == [2]
    assert [s.ticket for s in rows] == [0, 1]
    assert steps == 4
    scheduler.add(sequence(3, owner=3))
    assert admitted(scheduler) == []
    finish(scheduler, 2)
    assert [s.ticket for s in scheduler.resume()] == [2]


@pytest.mark.parametrize("seed", range(20))
def test_no_page_has_two_owners_and_none_is_lost(seed):
    rng = random.Random(seed)
    scheduler = Scheduler(rows=4, pages=12, page=3)
    ticket = 0
    for _ in range(300):
        if rng.random() < 0.4:
            scheduler.add(
                sequence(ticket, rng.randrange(3), rng.randint(1, 12), rng.randint(1, 20))
            )
            ticket += 1
        scheduler.resume()
        admitted(scheduler, lambda s: rng.choice(["ready", "ready", "loading"]))
        for running in scheduler.running:
            if running.stage == "prefill" and rng.random() < 0.7:
                running.prefilled, running.stage, running.drawn = running.prompt, "decode", 1
        rows, steps, _ = scheduler.grow(rng.randint(1, 6))
        for running in rows:
            assert len(running.pages) * 3 >= running.cached + min(steps, running.left)
            running.drawn = min(running.room, running.drawn + steps)
            if running.left == 0 or rng.random() < 0.05:
                scheduler.remove(running)
        owned = [page for running in scheduler.running for page in running.pages]
        assert sorted(owned + scheduler.free_pages) == list(range(12))
        assert len({s.row for s in scheduler.running} | set(scheduler.free_rows)) == 4
        assert len(scheduler.running) + len(scheduler.free_rows) == 4
