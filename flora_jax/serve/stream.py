"""The tokens of one row as they come from the device, their text, and where they end.

Text comes out as soon as it is certain. What a row's text is and where it ends depends on its tokens
alone, never on how many of them come at once. Knows nothing of JAX, batches or other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

from flora_jax.serve.request import Completion, FinishReason, Request, TokenLogprob

# So many tokens without certain text are no character: what is certain of them comes out.
_MOST_HELD = 16


class Stream:
    """Collects a request's tokens and text until it ends.

    Args:
        request: whose tokens these are.
        stops: ids that end it.
        room: the most tokens it may have.
        tokenizer: a ``tokenizers.Tokenizer``; without one there is no text.
    """

    def __init__(
        self, request: Request, stops: Collection[int], room: int, tokenizer: Any | None = None
    ):
        self.request = request
        self.stops = frozenset(stops)
        self.room = room
        self.token_ids: list[int] = []
        params = request.sampling_params
        # What was asked for, else None; the first token of a prompt has nothing to follow from.
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self.stopped = False
        prompt = request.prompt_token_ids
        self._decoder = None if tokenizer is None else TextDecoder(tokenizer, prompt)
        self._search = StopSearch(request.sampling_params.stop if tokenizer is not None else ())
        self._released: list[str] = []
        self._taken = 0

    @property
    def running(self) -> bool:
        return not self.stopped and len(self.token_ids) < self.room

    def add(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Takes tokens in order, with theirs where asked for; those after the end are left."""
        before = len(self.token_ids)
        for token in tokens:
            if not self.running:
                break
            self._add(token)
        if self.logprobs is not None:
            self.logprobs += logprobs[: len(self.token_ids) - before]

    def add_prompt(self, start: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Takes those of the prompt's tokens behind position ``start``; a prompt may start over."""
        assert self.prompt_logprobs is not None
        del self.prompt_logprobs[start + 1 :]
        room = len(self.request.prompt_token_ids) - len(self.prompt_logprobs)
        self.prompt_logprobs += logprobs[:room]

    def _add(self, token: int) -> None:
        self.token_ids.append(token)
        self.stopped = token in self.stops
        if self._decoder is None:
            return
        if not self.stopped:
            self._release(self._decoder.add(token))
        if not self.running and not self._search.found:
            self._release(self._decoder.rest())
            self._keep(self._search.rest())

    def _release(self, text: str) -> None:
        self._keep(self._search.add(text))
        self.stopped = self.stopped or self._search.found

    def _keep(self, text: str) -> None:
        if text:
            self._released.append(text)

    def take_text(self) -> str | None:
        """The text that has become certain since this was last asked; ``None`` without a tokenizer."""
        if self._decoder is None:
            return None
        new = "".join(self._released[self._taken :])
        self._taken = len(self._released)
        return new

    def text(self) -> str | None:
        """The certain text before the stop token or stop string: all of it once the row has ended."""
        return None if self._decoder is None else "".join(self._released)

    def completion(self, finish_reason: FinishReason | None = None) -> Completion:
        """What the row has; ``finish_reason`` is "stop" or "length" where none is given."""
        return Completion(
            request_id=self.request.request_id,
            adapter=self.request.adapter,
            text=self.text(),
            token_ids=tuple(self.token_ids),
            finish_reason=finish_reason or ("stop" if self.stopped else "length"),
            prompt_tokens=len(self.request.prompt_token_ids),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )


class TextDecoder:
    """Turns tokens into text one by one, in time linear in their number.

    A character whose bytes lie in several tokens comes out with the last. Bytes that are no character
    come out as U+FFFD once a later token shows it. All texts together are what the tokens add to the text
    of those before, special ones left out.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        before: what the tokens follow, such as a prompt; its own text does not come out. Many tokenizers
            take a leading space from a whole text, so the first token of a completion keeps its own.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer)
        self._restart(before, [])

    def _restart(self, before: Sequence[int], held: list[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)
        # The tokens whose text has come out last, which that of the next may depend on; those whose text
        # has not come out.
        self._before = self._last_text(before)
        self._held = held
        for token in (*self._before, *held):
            self._stream.step(self._tokenizer, token)

    def _last_text(self, token_ids: Sequence[int]) -> list[int]:
        """The last token that is whole characters, else the last one of no characters, if any."""
        blank: list[int] = []
        for token in reversed(token_ids):
            if self._has_no_text(token):
                continue
            text = self._decode([token])
            if text and not text.endswith("\ufffd"):
                return [token]
            if not text and not blank:
                blank = [token]
        return blank

    def _has_no_text(self, token: int) -> bool:
        return token in self._special or self._tokenizer.id_to_token(token) is None

    def add(self, token: int) -> str:
        """The text that has become certain by this token."""
        if self._has_no_text(token):
            return ""  # The library would keep them, and look at all of them again each time.
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except (
            Exception
        ):  # The binding's own, where the text before changes: bytes that are no UTF-8.
            text = self.rest()
            self._restart([*self._before, *self._held], [])
            return text
        if text is not None:
            self._before, self._held = self._held, []
            return text
        return self._settle() if len(self._held) >= _MOST_HELD else ""

    def rest(self) -> str:
        """The text of the tokens that are held, taken as the last ones."""
        before = self._decode(self._before)
        text = self._decode([*self._before, *self._held])
        return text[len(before) :] if text.startswith(before) else self._decode(self._held)

    def _settle(self) -> str:
        """Lets go of the held tokens but for the last ones, which may be the start of a character."""
        whole = self._decode(self._held)
        if not whole:
            self._restart(self._before, [])
            return ""
        for count in range(len(self._held) - 1, len(self._held) - 5, -1):
            first, last = self._held[:count], self._held[count:]
            if self._decode(first) + self._decode(last) == whole and self._decode(last):
                self._held = first
                text = self.rest()
                self._restart([*self._before, *first], last)
                return text
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True) if token_ids else ""


class StopSearch:
    """Finds the first of some strings in a text that comes in parts.

    What may be the beginning of one is held back. Time is linear in the text (Knuth, Morris and Pratt).

    Args:
        stops: the strings, none empty.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The part of the text so far that is new and before any stop string, of which as many as appear
        in this part are looked at.
        """
        if not self._stops or self.found:
            return "" if self.found else text
        text = self._held + text
        first = len(text)
        for number, (stop, borders) in enumerate(self._stops):
            matched = self._matched[number]
            for place in range(len(self._held), len(text)):
                while matched and stop[matched] != text[place]:
                    matched = borders[matched - 1]
                matched += stop[matched] == text[place]
                if matched == len(stop):
                    self.found = True
                    first = min(first, place + 1 - matched)
                    break
            self._matched[number] = matched
        if not self.found:
            first = len(text) - max(self._matched)
        self._held = text[first:]
        return text[:first]

    def rest(self) -> str:
        """What was held back and is no stop string, as nothing follows."""
        return "" if self.found else self._held


def _borders(stop: str) -> list[int]:
    """By length, from 1, the longest proper beginning of that much of the string that also ends it."""
    borders = [0]
    for character in stop[1:]:
        matched = borders[-1]
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        borders.append(matched + (stop[matched] == character))
    return borders


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(number for number, token in added.items() if token.special)
