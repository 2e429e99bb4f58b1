"""Documents are read whole, closed by the end token, and cut into batches by the step alone."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from flora_jax.train.data import (
    PackedTokens,
    load_packed,
    read_documents,
    save_packed,
    take_bytes,
)

LENGTH = 5


def packed_of(windows, extra=0):
    """Tokens that tell their own place."""
    return PackedTokens(np.arange(windows * LENGTH + 1 + extra, dtype=np.uint16), 1000)


def starts(packed, steps, rows, seed):
    """The first token of each row of these batches, which is its place in the stream."""
    batches = [packed.batch(step, rows, LENGTH, seed) for step in steps]
    return np.concatenate(batches)[:, 0] // LENGTH


@pytest.mark.parametrize("windows, rows", [(12, 4), (12, 5), (7, 3), (3, 8), (1, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_epoch_visits_every_window_once(windows, rows, seed):
    packed = packed_of(windows, extra=LENGTH - 1)
    steps = -(-3 * windows // rows)
    order = starts(packed, range(steps), rows, seed)
    epochs = [order[e * windows : (e + 1) * windows] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(windows))
    if windows >= 7:
        assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_is_a_function_of_seed_and_step():
    packed = packed_of(12)
    straight = [packed.batch(step, 5, LENGTH, 3) for step in range(6)]
    resumed = [packed_of(12).batch(step, 5, LENGTH, 3) for step in (3, 4, 5)]
    np.testing.assert_array_equal(straight[3:], resumed)
    assert not np.array_equal(straight[0], packed.batch(0, 5, LENGTH, 4))


def test_rows_are_consecutive_tokens_with_one_to_predict():
    packed = packed_of(4)
    batch = packed.batch(0, 4, LENGTH, 0)
    assert (batch.dtype, batch.shape) == (np.int32, (4, LENGTH + 1))
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)
    assert batch.max() == packed.tokens[-1]


@pytest.mark.parametrize("tokens", [0, 1, LENGTH])
def test_a_stream_shorter_than_a_window_is_an_error(tokens):
    packed = PackedTokens(np.zeros(tokens, np.uint16), 1)
    with pytest.raises(ValueError, match=f"{tokens} tokens hold no window of {LENGTH + 1}"):
        packed.batch(0, 1, LENGTH, 0)


def test_documents_are_closed_by_the_end_token():
    path = Path(__file__).resolve().parents[1] / "experiments" / "pretrain_mini.py"
    spec = importlib.util.spec_from_file_location("pretrain_mini", path)
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    tokenizer = byte_tokenizer()
    texts = ["one", "", "dos é"]
    packed = pretrain.pack(tokenizer, texts)
    assert packed.text_bytes == len("onedos é".encode())
    ends = np.flatnonzero(packed.tokens == 0)
    assert len(ends) == len(texts)
    assert ends[-1] == len(packed.tokens) - 1
    assert [tokenizer.decode(part[part > 0]) for part in np.split(packed.tokens, ends)][:3] == texts


def test_a_saved_stream_comes_back_the_same(tmp_path):
    packed = PackedTokens(np.arange(50, dtype=np.uint16)[::-1].copy(), 123)
    save_packed(tmp_path / "train.npz", packed)
    again = load_packed(tmp_path / "train.npz")
    np.testing.assert_array_equal(again.tokens, packed.tokens)
    assert (again.tokens.dtype, again.text_bytes) == (np.uint16, 123)
    assert [file.name for file in tmp_path.iterdir()] == ["train.npz"]


RECORDS = [{"content": "aé\n", "path": "x"}, {"text": "b"}, {"content": "", "text": "unread"}]


def write_lines(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_documents_are_the_text_column_of_each_line(name, tmp_path):
    path = write_lines(tmp_path / name, RECORDS)
    assert list(read_documents(path)) == ["aé\n", "b", ""]


def test_documents_of_a_directory_come_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name, raw in [("b/1.py", b"two"), ("a.py", "é".encode()), ("c.rs", b"\xff3"), ("n", b"4")]:
        (tmp_path / name).write_bytes(raw)
    assert list(read_documents(tmp_path)) == ["é", "two", "\ufffd3", "4"]
    assert list(read_documents(tmp_path, (".py", ".rs"))) == ["é", "two", "\ufffd3"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize(
    "line",
    [b"{", b"", b"[]", b"3", b'"content"', {"path": "x"}, {"content": None}, {"text": 3}, b"\xff"],
    ids=str,
)
def test_a_bad_line_is_named(name, line, tmp_path):
    path = write_lines(tmp_path / name, [RECORDS[0], line])
    documents = read_documents(path)
    assert next(documents) == "aé\n"
    with pytest.raises(ValueError) as caught:
        next(documents)
    assert str(caught.value).startswith(f"{path}, line 2: expected a JSON object")


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_a_damaged_archive_is_named(damage, tmp_path):
    path = write_lines(tmp_path / "d.jsonl.gz", [{"content": str(n)} for n in range(2000)])
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    path.write_bytes({"truncated": raw[:-20], "not gzip": b"{}\n", "flipped": raw}[damage])
    with pytest.raises(ValueError) as caught:
        list(read_documents(path))
    assert str(path) in str(caught.value)
    assert "line" in str(caught.value)


@pytest.mark.parametrize("name", ["d.txt", "d.tar.gz", "d.json"])
def test_other_files_are_refused(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"expected \.jsonl, \.jsonl\.gz or a directory"):
        list(read_documents(tmp_path / name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        list(read_documents(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "limit, count", [(None, 4), (0, 0), (1, 1), (3, 1), (4, 2), (5, 3), (100, 4)]
)
def test_whole_documents_are_taken_until_they_make_the_limit(limit, count):
    texts = ["aé", "b", "cc", "d"]  # 3, 1, 2, 1 bytes
    assert list(take_bytes(iter(texts), limit)) == texts[:count]
