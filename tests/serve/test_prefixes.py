"""Keys of prompts: equal where what prefill leaves is equal, and nowhere else. Without JAX."""

from flora_jax.serve.prefixes import block_keys, prompt_keys


def test_keys_stand_for_all_tokens_before_them():
    one = block_keys(b"a", [1, 2, 3, 4, 5, 6, 7], 2)
    assert len(one) == 3
    assert block_keys(b"a", [1, 2, 3, 4, 9, 9], 2)[:2] == one[:2]
    assert block_keys(b"a", [1, 2, 3, 4, 9, 9], 2)[2] != one[2]
    assert block_keys(b"a", [9, 2, 3, 4, 5, 6], 2)[2] != one[2]
    assert not {*block_keys(b"b", [1, 2, 3, 4, 5, 6], 2)} & {*one}
    # The rest of a sequence goes on from the last key.
    assert block_keys(one[0], [3, 4, 5, 6], 2) == one[1:]


def test_a_whole_prompt_has_a_key_of_its_own():
    """Neither a longer prompt's nor a full block's."""
    prompts = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [2], [1, 3]]
    found = [prompt_keys(root, prompt, 2) for root in (b"a", b"b") for prompt in prompts]
    keys = {one.whole for one in found} | {key for one in found for key in one.blocks}
    blocks = {tuple(one.blocks) for one in found if one.blocks}
    assert len({one.whole for one in found}) == 12
    assert len(keys) == 12 + len({key for chain in blocks for key in chain})
