"""Blocks of the cache: what is held is held, what is kept can be found, and nothing is lost."""

import random

import pytest

from flora_jax.serve.blocks import Blocks


def test_what_was_released_is_found_again_until_it_is_needed():
    blocks = Blocks(3)
    first = blocks.take(2)
    for block, key in zip(first, (b"x", b"y")):
        blocks.publish(block, key)
    blocks.release(first)
    assert (blocks.available, blocks.kept) == (3, 2)
    assert blocks.match([b"x", b"y", b"z"]) == first
    assert blocks.match([b"y"]) == first[1:]
    # The free one first, then the end of the beginning that was used least recently.
    blocks.take(2)
    assert blocks.match([b"x", b"y"]) == first[:1]
    with pytest.raises(IndexError, match="2 blocks wanted, 1 are available"):
        blocks.take(2)


def test_a_shared_block_is_not_given_out_while_anybody_holds_it():
    blocks = Blocks(2)
    (held,) = blocks.take(1)
    blocks.publish(held, b"x")
    blocks.share([held])
    blocks.release([held])
    assert blocks.available == 1
    assert not blocks.can_take([held], 2)
    assert blocks.take(1) != [held]
    blocks.release([held])
    assert blocks.can_take([], 1)
    assert not blocks.can_take([held], 1)


def test_a_key_that_is_known_keeps_its_block():
    blocks = Blocks(2)
    one, two = blocks.take(2)
    blocks.publish(one, b"x")
    blocks.publish(two, b"x")
    blocks.release([two])
    assert blocks.match([b"x"]) == [one]
    assert (blocks.available, blocks.kept) == (1, 0)


def test_a_block_can_have_two_keys_and_loses_both():
    blocks = Blocks(1)
    (held,) = blocks.take(1)
    blocks.publish(held, b"x")
    blocks.publish(held, b"y")
    assert blocks.match([b"x"]) == blocks.match([b"y"]) == [held]
    blocks.release([held])
    blocks.take(1)
    assert blocks.take_forgotten() == [b"x", b"y"]
    assert blocks.take_forgotten() == []
    # What can be found again by then is not told of.
    blocks.publish(held, b"x")
    blocks.release([held])
    blocks.take(1)
    blocks.publish(held, b"x")
    assert blocks.take_forgotten() == []


@pytest.mark.parametrize("seed", range(20))
def test_any_use_loses_no_block_and_finds_only_what_was_published(seed):
    rng = random.Random(seed)
    blocks, holders, content = Blocks(12), [], {}
    for _ in range(500):
        if rng.random() < 0.5:
            keys = [bytes([rng.randrange(3), n]) for n in range(rng.randint(1, 5))]
            shared = blocks.match(keys)
            assert [content[block] for block in shared] == keys[: len(shared)]
            more = len(keys) - len(shared)
            if not blocks.can_take(shared, more):
                continue
            blocks.share(shared)
            fresh = blocks.take(more)
            assert not {*fresh} & {block for own in holders for block in own}
            for block in fresh:
                content.pop(block, None)
            holders.append([*shared, *fresh])
            if rng.random() < 0.8:
                for block, key in zip(fresh, keys[len(shared) :]):
                    if not blocks.is_known(key):
                        content[block] = key
                    blocks.publish(block, key)
        elif holders:
            blocks.release(holders.pop(rng.randrange(len(holders))))
        held = {block for own in holders for block in own}
        assert blocks.available == 12 - len(held)
    for own in holders:
        blocks.release(own)
    assert blocks.available == 12
