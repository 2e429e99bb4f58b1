"""What single tokens of a tokenizer stand for, as bytes of text."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Of one tokenizer.

    The tokens of a text stand for all of its bytes, and a space more where the tokenizer puts one in
    front of a text, as SentencePiece's do.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}
        self._bytes_as_symbols = '"ByteLevel"' in json.dumps(
            json.loads(tokenizer.to_str())["decoder"]
        )
        # A first token may lose its leading space, so texts are taken from behind another one.
        self._anchor = [] if self._bytes_as_symbols else _any_tokens(tokenizer)
        self._before = self._decode(self._anchor)

    def of(self, token: int) -> bytes | None:
        """The token's bytes, which may be a part of a character; ``None`` for no token of it."""
        if token in self._added:
            return self._added[token].encode()
        symbols = self.tokenizer.id_to_token(token)
        if symbols is None:
            return None
        if self._bytes_as_symbols:
            if all(symbol in _byte_of_symbol() for symbol in symbols):
                return bytes(_byte_of_symbol()[symbol] for symbol in symbols)
            return symbols.encode()
        if found := _BYTE_TOKEN.fullmatch(symbols):
            return bytes([int(found[1], 16)])
        text = self._decode([*self._anchor, token])
        if not text.startswith(self._before):
            return self._decode([token]).encode()
        return text.removeprefix(self._before).encode()

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def _any_tokens(tokenizer: Any) -> list[int]:
    try:
        return tokenizer.encode("a", add_special_tokens=False).ids
    except Exception:  # The binding raises bare Exception, of a vocabulary without the letter.
        return []


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """Byte-level tokenizers write printable bytes as themselves, and the others in order from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }
