"""The text of completions beside their prompts' and their tokens'."""

import pytest

from flora_jax.serve.http.completions import CompletionForm, Prompt
from flora_jax.serve.http.jobs import Piece
from flora_jax.serve.http.token_texts import TokenTexts
from flora_jax.serve.request import TokenLogprob
from flora_jax.serve.stream import Stream
from tests.helpers.requests import make_request
from tests.helpers.space_tokenizer import space_tokenizer

TOKENIZER = space_tokenizer()


def scored(tokens):
    return [TokenLogprob(token, -1.0) for token in tokens]


@pytest.mark.parametrize("echo", [True, False])
def test_offsets_point_at_the_text_of_each_token(echo):
    """Token by token, with a tokenizer that takes the first space from a whole text."""
    prompt, tokens = [
        [TOKENIZER.token_to_id(piece) for piece in pieces.split()]
        for pieces in ("▁The ▁capital ▁is", "▁Paris ▁▁ b ▁is")
    ]
    row = Stream(make_request(0, prompt), (), len(tokens), TOKENIZER)
    given = Prompt(tuple(prompt), TOKENIZER.decode(prompt))
    form = CompletionForm(TokenTexts(TOKENIZER), [given], echo, True, True, False)
    text, told = "", {"tokens": [], "text_offset": []}
    for token in tokens:
        row.add([token])
        first = scored(prompt) if token == tokens[0] else ()
        choice = form.part(0, Piece(row.take_text(), [token], scored([token]), first))
        text += choice["text"]
        for name in told:
            told[name] += choice["logprobs"][name]
    assert text == TOKENIZER.decode([*prompt, *tokens])[0 if echo else len(given.text) :]
    for token, offset in [*zip(told["tokens"], told["text_offset"], strict=True)][echo:]:
        assert text[offset:].startswith(token)
