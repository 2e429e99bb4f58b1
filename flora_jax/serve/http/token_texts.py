"""What single tokens stand for, as text and as bytes: logprobs name tokens so."""

from __future__ import annotations

import functools
from typing import Any

_BYTE_TOKEN = "<0x"
# JSON has no infinity: as in vLLM.
_LEAST_LOGPROB = -9999.0


def clamped(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return max(float(logprob), _LEAST_LOGPROB)


class TokenTexts:
    """Of one tokenizer.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``; without one a token's text is its number.
    """

    def __init__(self, tokenizer: Any | None):
        self.tokenizer = tokenizer
        self._added: dict[int, str] = {}
        self._bytes_as_symbols = False
        self._anchor: list[int] = []
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self._added = {number: token.content for number, token in added.items()}
            self._bytes_as_symbols = type(tokenizer.decoder).__name__ == "ByteLevel"
            # A first token may lose its leading space, so texts are taken from behind another one.
            self._anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)

    def byte_list(self, token: int) -> list[int] | None:
        """The token's bytes, which may be a part of a character; ``None`` where it has no text."""
        found = self._bytes_of(token)
        return None if found is None else [*found]

    def _text(self, token: int) -> str:
        """The token's text; one that is no whole characters is "bytes:" and its bytes, as OpenAI has it,
        so that different tokens have different texts.
        """
        found = self._bytes_of(token)
        if found is None:
            return f"token_id:{token}"
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _bytes_of(self, token: int) -> bytes | None:
        if self.tokenizer is None:
            return None
        if token in self._added:
            return self._added[token].encode()
        symbols = self.tokenizer.id_to_token(token)
        if symbols is None:
            return None
        if self._bytes_as_symbols and all(symbol in _byte_of_symbol() for symbol in symbols):
            return bytes(_byte_of_symbol()[symbol] for symbol in symbols)
        if symbols.startswith(_BYTE_TOKEN) and len(symbols) == 6:
            return bytes([int(symbols[3:5], 16)])
        before = self._decode(self._anchor)
        text = self._decode([*self._anchor, token])
        return text.removeprefix(before).encode()

    def _decode(self, tokens: list[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """Byte-level tokenizers write printable bytes as themselves, and the others in order from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }
