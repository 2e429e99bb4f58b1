"""Packed documents become batches by the step alone: nothing lost, nothing across a boundary."""

import numpy as np
import pytest

from flora_jax.train.data.packing import PackedTokens, epoch_order

SEEDS = [0, 1, 2]


def packed_of(lengths):
    """Documents of these many tokens; every token is its own place in the stream, from 1."""
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    return PackedTokens(tokens, starts, tuple(f"d{n}" for n in range(len(lengths))), 1000)


def random_packed(seed, documents=20, longest=40):
    lengths = np.random.default_rng(seed).integers(1, longest, documents)
    return packed_of([int(n) for n in lengths]), [int(n) for n in lengths]


def oracle(lengths, length):
    """Every window, token by token: tokens, positions, segments, mask, and documents' numbers."""
    stream = [(doc, 1 + sum(lengths[:doc]) + i) for doc, n in enumerate(lengths) for i in range(n)]
    windows = []
    for first in range(0, len(stream) - 1, length):
        tokens, positions, segments, mask, documents = [], [], [], [], []
        for place in range(first, first + length):
            if place >= len(stream):
                tokens.append(0), positions.append(0), segments.append(0), mask.append(0.0)
                continue
            doc, token = stream[place]
            same = bool(documents) and documents[-1] == doc
            if not same:
                documents.append(doc)
            tokens.append(token)
            positions.append(positions[-1] + 1 if same else 0)
            segments.append(len(documents))
            mask.append(float(place + 1 < len(stream) and stream[place + 1][0] == doc))
        last = first + length
        tokens.append(stream[last][1] if last < len(stream) else 0)
        windows.append((tokens, positions, segments, mask, documents))
    return windows


def joined(batches):
    return [np.concatenate(arrays) for arrays in zip(*batches)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [1, 5, 16, 200, 2000])
@pytest.mark.parametrize("rows", [1, 3])
def test_windows_are_those_of_an_oracle_that_goes_token_by_token(length, rows, seed):
    packed, lengths = random_packed(seed)
    expected = oracle(lengths, length)
    batches = list(packed.evaluation(length, rows))
    assert {tuple(array.dtype.name for array in batch) for batch in batches} == {
        ("int32", "int32", "int32", "float32")
    }
    assert {batch.tokens.shape for batch in batches} == {(rows, length + 1)}
    found = joined(batches)
    assert packed.windows(length) == len(expected)
    for array, wanted in zip(found, zip(*expected)):
        np.testing.assert_array_equal(array[: len(expected)], wanted)
        assert not array[len(expected) :].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length, rows", [(5, 4), (16, 3), (16, 64), (2000, 2)])
def test_an_epoch_predicts_every_target_of_every_document_once(length, rows, seed):
    packed, lengths = random_packed(seed)
    count = packed.windows(length)
    batches = [packed.batch(step, rows, length, seed) for step in range(-(-3 * count // rows))]
    tokens, _, _, mask = joined(batches)
    starts = {1 + sum(lengths[:doc]) for doc in range(len(lengths))}
    targets = sorted(set(range(1, sum(lengths) + 1)) - starts)
    orders = []
    for epoch in range(3):
        rows_of = slice(epoch * count, (epoch + 1) * count)
        predicted = tokens[rows_of][:, 1:][mask[rows_of] == 1]
        assert sorted(predicted) == targets
        orders.append(tuple(tokens[rows_of, 0]))
    if count > 8:
        assert len(set(orders)) == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_resumed_in_mid_epoch_sees_the_rest_of_the_same_stream(seed):
    def batches(steps):
        packed, _ = random_packed(seed)
        return [packed.batch(step, 5, 16, seed) for step in steps]

    straight = batches(range(12))
    epoch_order.cache_clear()
    for expected, found in zip(straight[4:], batches(range(4, 12))):
        for one, other in zip(expected, found):
            np.testing.assert_array_equal(one, other)
    other_seed = random_packed(seed)[0].batch(0, 5, 16, seed + 1)
    assert not np.array_equal(straight[0].tokens, other_seed.tokens)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length, rows", [(5, 4), (16, 3), (2000, 2)])
def test_the_documents_of_a_batch_are_those_of_its_inputs(length, rows, seed):
    packed, lengths = random_packed(seed)
    windows = oracle(lengths, length)
    by_first = {tokens[0]: documents for tokens, *_, documents in windows}
    for step in range(2 * len(windows) // rows):
        firsts = packed.batch(step, rows, length, seed).tokens[:, 0]
        wanted = [f"d{doc}" for first in firsts for doc in by_first[int(first)]]
        found = packed.documents_of(step, rows, length, seed)
        assert found == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("most, count", [(0, 0), (1, 1), (4, 4), (5, 5), (None, 13), (99, 13)])
def test_evaluation_takes_all_windows_or_some_evenly_spread(most, count):
    packed = packed_of([130])
    batches = list(packed.evaluation(10, 4, most))
    assert len(batches) == -(-count // 4)
    firsts = [int(token) for batch in batches for token in batch.tokens[:, 0]]
    padding = -count % 4
    assert firsts == [1 + 10 * (13 * n // count) for n in range(count)] + [0] * padding
    if padding:
        assert not any(array[-padding:].any() for array in batches[-1])


def test_a_long_document_goes_on_as_if_it_began_in_each_window():
    (batch,) = packed_of([25]).evaluation(8, 4)
    np.testing.assert_array_equal(batch.positions[:3], [np.arange(8)] * 3)
    assert (batch.segments[:3] == 1).all()
    assert batch.mask.sum() == 24


def test_two_tokens_are_enough():
    batch = packed_of([2]).batch(7, 3, 100, 0)
    assert batch.mask.sum() == 3
    np.testing.assert_array_equal(batch.tokens[:, :3], [[1, 2, 0]] * 3)


@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1]])
def test_documents_with_nothing_to_predict_are_an_error(lengths):
    packed = packed_of(lengths)
    message = f"{sum(lengths)} tokens of {len(lengths)} documents hold nothing to predict"
    for use in [
        lambda: packed.batch(0, 1, 4, 0),
        lambda: packed.documents_of(0, 1, 4, 0),
        lambda: list(packed.evaluation(4, 1)),
    ]:
        with pytest.raises(ValueError, match=message):
            use()


def test_an_end_token_inside_a_document_is_no_boundary():
    packed = PackedTokens(np.array([5, 0, 6, 0, 7, 0], np.uint16), np.array([0, 4]), ("a", "b"), 9)
    (batch,) = packed.evaluation(8, 1)
    np.testing.assert_array_equal(batch.segments[0], [1, 1, 1, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(batch.mask[0], [1, 1, 1, 0, 1, 0, 0, 0])


def test_an_order_cannot_be_spoilt_by_who_gets_it():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 1
