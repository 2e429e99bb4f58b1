"""Where a row ends, and the text that it has then."""

import pytest

from flora_jax.serve.request import Request
from flora_jax.serve.stream import Stream
from tests.helpers.byte_tokenizer import END, byte_tokenizer

TOKENIZER = byte_tokenizer()
END_ID = TOKENIZER.token_to_id(END)


def ids(text):
    """One token a byte, never the merged pieces."""
    return [token for character in text for token in TOKENIZER.encode(character).ids]


def stream(stop=(), stops=(END_ID,), room=100, tokenizer=TOKENIZER):
    return Stream(Request(2, (1, 2, 3), "own", stop=tuple(stop)), stops, room, tokenizer)


def pieces(tokens, sizes):
    """Cuts tokens the way dispatches would."""
    start = 0
    while start < len(tokens):
        for size in sizes:
            yield tokens[start : start + size]
            start += size


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 5), (1000,)])
@pytest.mark.parametrize(
    "text, stop, kept, taken",
    [
        ("one END two", ["END"], "one ", "one END"),
        ("one END two", ["ND t", "END"], "one ", "one END"),
        ("a\n\nb", ["\n\n"], "a", "a\n\n"),
        ("xéy", ["é"], "x", "xé"),
        ("xéy", ["y", "é"], "x", "xé"),
        ("END", ["END"], "", "END"),
        ("EEND", ["END"], "E", "EEND"),
        ("no such thing", ["END"], "no such thing", "no such thing"),
    ],
)
def test_a_stop_string_ends_the_row_across_token_borders(text, stop, kept, taken, sizes):
    row = stream(stop)
    for tokens in pieces(ids(text), sizes):
        row.add(tokens)
    done = row.completion()
    assert (done.text, done.token_ids) == (kept, tuple(ids(taken)))
    assert done.finish_reason == ("stop" if kept != text else "length")
    assert row.running == (kept == text)


@pytest.mark.parametrize("piece, stop, kept", [("abc", ["b"], "a"), ("abc", ["bc", "abc"], "")])
def test_a_stop_string_inside_one_token_cuts_the_text_at_its_first_place(piece, stop, kept):
    row = stream(stop)
    row.add([*ids("x"), TOKENIZER.token_to_id(piece), *ids("y")])
    assert row.text() == "x" + kept
    assert row.token_ids == [*ids("x"), TOKENIZER.token_to_id(piece)]


@pytest.mark.parametrize("stops", [(END_ID,), tuple(ids("!")), (END_ID, *ids("!"))])
def test_a_stop_token_is_kept_as_token_and_cut_from_the_text(stops):
    row = stream(stops=stops)
    row.add([*ids("hi"), stops[0], *ids("after")])
    done = row.completion()
    assert done.text == "hi"
    assert done.token_ids == (*ids("hi"), stops[0])
    assert done.finish_reason == "stop"


def test_an_end_token_that_does_not_stop_leaves_no_text():
    row = stream(stops=(), room=4)
    row.add([*ids("a"), END_ID, *ids("bc")])
    assert (row.text(), row.completion().finish_reason) == ("abc", "length")


def test_room_ends_the_row_and_later_tokens_are_left():
    row = stream(room=3)
    row.add(ids("ab"))
    assert row.running
    row.add(ids("cde"))
    row.add(ids("f"))
    done = row.completion()
    assert (done.text, done.token_ids, done.finish_reason) == ("abc", tuple(ids("abc")), "length")
    assert not row.running


@pytest.mark.parametrize("stop, stops, end", [((), ids("c"), "ab"), (("c",), (), "ab")])
def test_a_stop_at_the_last_token_of_the_room_is_a_stop(stop, stops, end):
    row = stream(stop=stop, stops=stops, room=3)
    row.add(ids("abc"))
    assert (row.text(), row.completion().finish_reason) == (end, "stop")


def test_a_row_without_room_has_no_tokens():
    row = stream(room=0)
    row.add(ids("a"))
    done = row.completion()
    assert (done.text, done.token_ids, done.finish_reason) == ("", (), "length")


def test_without_a_tokenizer_there_is_no_text():
    row = stream(tokenizer=None)
    row.add([5, 6, END_ID, 7])
    done = row.completion()
    assert (done.text, done.token_ids, done.finish_reason) == (None, (5, 6, END_ID), "stop")


def test_the_completion_carries_the_requests_own_facts():
    done = stream().completion()
    assert (done.index, done.adapter, done.prompt_tokens) == (2, "own", 3)
