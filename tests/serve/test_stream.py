"""Where a row ends, and the text that it has then."""

import itertools
import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models

from flora_jax.serve.stream import Stream, TextDecoder
from tests.helpers.byte_tokenizer import END, byte_tokenizer
from tests.helpers.requests import make_request
from tests.helpers.space_tokenizer import SPECIAL, WORDS, space_tokenizer

TOKENIZER = byte_tokenizer()
END_ID = TOKENIZER.token_to_id(END)
SPACES = space_tokenizer()


def ids(text):
    """One token a byte, never the merged pieces."""
    return [token for character in text for token in TOKENIZER.encode(character).ids]


def stream(stop=(), stops=(END_ID,), room=100, tokenizer=TOKENIZER):
    request = make_request(2, (1, 2, 3), "own", request_id="it", stop=stop)
    return Stream(request, stops, room, tokenizer)


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
    assert (done.request_id, done.adapter, done.prompt_tokens) == ("it", "own", 3)


# The bytes that are told apart by UTF-8: plain, starts of two, three and four, what follows, neither.
BYTES = b"aE\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xef\xbf\xbd\xff"


def byte_ids(data):
    """Tokens of any bytes, whether they are text or not."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [TOKENIZER.token_to_id(names[byte]) for byte in data]


def whole(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def deltas(row, tokens, sizes):
    """The text that comes out after each part of the tokens."""
    found = []
    for part in pieces(tokens, sizes):
        row.add(part)
        found.append(row.take_text())
    return found


@pytest.mark.parametrize("seed", range(40))
def test_text_comes_in_parts_that_make_up_the_text_of_all_tokens(seed):
    draw = random.Random(seed)
    data = bytes(draw.choices(BYTES, k=draw.randint(1, 60)))
    tokens = byte_ids(data)
    for _ in range(draw.randint(0, 5)):
        tokens.insert(draw.randrange(len(tokens)), draw.choice([END_ID, 257, 258, 1000]))
    for sizes in [(1,), (2,), (3, 1, 2), (1000,)]:
        row = stream(stops=(), room=len(tokens))
        parts = deltas(row, tokens, sizes)
        assert "".join(parts) == row.completion().text == whole(tokens)
        assert row.take_text() == ""


@pytest.mark.parametrize("seed", range(20))
def test_where_a_row_ends_does_not_depend_on_how_its_tokens_are_cut(seed):
    """Also where a stop string holds U+FFFD, which a part of a character looks like for a moment."""
    draw = random.Random(seed)
    tokens = byte_ids(bytes(draw.choices(BYTES, k=7)))
    stop = draw.choice([["\ufffd"], ["\ufffda"], ["a\ufffd", "é"], ["€"], ["Ea", "aE"], ["😀"]])
    found = set()
    for cut in itertools.product([False, True], repeat=len(tokens) - 1):
        row, part = stream(stop, room=len(tokens)), []
        texts = []
        for token, ends in zip(tokens, [*cut, True], strict=True):
            part.append(token)
            if ends:
                row.add(part)
                texts.append(row.take_text())
                part = []
        done = row.completion()
        assert "".join(texts) == done.text
        found.add(done)
    (done,) = found
    places = [whole(tokens).find(one) for one in stop if one in whole(tokens)]
    assert done.finish_reason == ("stop" if places else "length")
    assert done.text == whole(tokens)[: min(places, default=None)]


def test_what_may_begin_a_stop_string_waits_and_a_character_is_never_cut():
    row = stream(["</s>"])
    parts = deltas(row, ids("a</b</s>"), (1,))
    assert parts == ["a", "", "", "</b", "", "", "", ""]
    assert row.completion().text == "a</b"
    row = stream(["</s>"], room=3)
    assert deltas(row, ids("a</"), (1,)) == ["a", "", "</"]
    assert deltas(stream(), byte_ids("é€😀".encode()), (1,)) == [
        "", "é", "", "", "€", "", "", "", "😀",
    ]  # fmt: skip


def test_bytes_that_are_no_text_come_out_before_the_end():
    row = stream(room=200)
    parts = deltas(row, byte_ids(b"\xff" * 100), (1,))
    assert len("".join(parts)) >= 100 - 20


@pytest.mark.parametrize("byte", [b"a", b"\xff", b"\xf0", None], ids=str)
def test_the_time_for_text_is_linear_in_the_tokens(byte):
    """A quadratic one would take hundreds of times as long for the sixteenfold."""

    def seconds(count):
        tokens = [END_ID] * count if byte is None else byte_ids(byte) * count
        row = stream(["stop here", "a" * 50 + "b"], stops=(), room=count)
        began = time.process_time()
        deltas(row, tokens, (1,))
        return time.process_time() - began

    short = min(seconds(400) for _ in range(3))
    assert seconds(6400) < 4 * 16 * short


def test_a_decoder_that_takes_back_what_it_said_ends_no_row():
    """Pieces of one byte are text together only where all of them are: the next one may undo it."""
    vocabulary = {"x": 0, "▁y": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    decoder = TextDecoder(tokenizer)
    tokens = [2 + 0xC3, 2 + 0xA9, 2 + 0xFF, 0, 1, 2 + 0xE2, 2 + 0x82, 2 + 0xAC, 2 + 0xFF]
    assert "".join(map(decoder.add, tokens)) + decoder.rest() == "é\ufffdx y€\ufffd"


def pieces_of(*names):
    return [SPACES.token_to_id(name) for name in names]


def random_pieces(draw, count):
    """Words, characters of several bytes, bytes that are none and special tokens. No bytes that are none
    stand beside others: these make one another no text, which nobody can know before.
    """
    characters = [[f"<0x{byte:02X}>" for byte in c.encode()] for c in "\né€😀"]
    others = [[word] for word in WORDS] + [["<s>"], ["<0xFF>", "a"], ["<0xE2>", "<0x82>", "▁is"]]
    found = ["▁The"]
    for _ in range(count):
        found += draw.choice([*characters, *others] if found[-1] in WORDS else others[: len(WORDS)])
    return pieces_of(*found)


@pytest.mark.parametrize("seed", range(60))
def test_a_completion_is_what_its_tokens_add_to_the_text_of_the_prompt(seed):
    draw = random.Random(seed)
    prompt = random_pieces(draw, draw.randint(1, 4)) + pieces_of(*["</s>"] * draw.randint(0, 1))
    tokens = random_pieces(draw, draw.randint(1, 30))[draw.randint(0, 1) :]
    tokens = [*pieces_of(draw.choice(WORDS)), *tokens]
    before = SPACES.decode(prompt)
    for sizes in [(1,), (3, 1, 2), (1000,)]:
        request = make_request(0, prompt)
        row = Stream(request, (), len(tokens), SPACES)
        parts = deltas(row, tokens, sizes)
        assert before + "".join(parts) == SPACES.decode([*prompt, *tokens])
        assert row.completion().text == "".join(parts)


@pytest.mark.parametrize(
    "prompt", [["▁capital", "▁is"], ["<s>", "▁is", "<0x0A>"], ["▁"], ["▁▁", "▁"]]
)
def test_the_first_token_keeps_its_space_and_a_stop_string_finds_it(prompt):
    prompt, tokens = pieces_of(*prompt), pieces_of("▁Paris", "▁is", "<0xFF>", "▁a", "▁a")
    row = Stream(make_request(0, prompt, stop=[" a a"]), (), 9, SPACES)
    assert deltas(row, tokens, (1,)) == [" Paris", " is", "", "\ufffd", ""]
    assert row.completion().finish_reason == "stop"
    row = Stream(make_request(0, prompt, stop=[" Paris"]), (), 9, SPACES)
    row.add(tokens)
    assert (row.completion().text, row.token_ids) == ("", tokens[:1])


def test_many_bytes_that_are_no_text_take_no_space_from_what_follows():
    for bytes_ in range(1, 40):
        tokens = pieces_of(*["<0xFF>"] * bytes_, "▁a", "▁is")
        row = Stream(make_request(0, pieces_of("▁The")), (), len(tokens), SPACES)
        assert "".join(deltas(row, tokens, (1,))) == "\ufffd" * bytes_ + " a is"


def test_a_prompt_without_text_leaves_a_completion_as_a_text_of_its_own():
    for prompt in ([0], [*range(len(SPECIAL))], [10_000]):
        row = Stream(make_request(0, prompt), (), 9, SPACES)
        assert deltas(row, pieces_of("▁Paris", "▁is"), (1,)) == ["Paris", " is"]


@pytest.mark.parametrize("seed", range(20))
def test_bytes_as_symbols_have_the_same_text_behind_any_prompt(seed):
    """Also where it ends within a character."""
    draw = random.Random(seed)
    prompt, data = (bytes(draw.choices(BYTES, k=draw.randint(1, 30))) for _ in range(2))
    tokens = byte_ids(data)
    row = Stream(make_request(0, [*byte_ids(prompt), END_ID]), (), len(tokens), TOKENIZER)
    alone = Stream(make_request(0, [END_ID]), (), len(tokens), TOKENIZER)
    assert deltas(row, tokens, (1,)) == deltas(alone, tokens, (1,))
    assert row.completion().text == whole(tokens)
