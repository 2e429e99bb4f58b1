"""What single tokens stand for, as text and as bytes: logprobs name tokens so."""

from __future__ import annotations

import functools
from typing import Any

from flora_jax.checkpoints.token_bytes import TokenBytes

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
        self._bytes = None if tokenizer is None else TokenBytes(tokenizer)
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
        return None if self._bytes is None else self._bytes.of(token)
