"""The model as the API shows it: its names, what it can serve, and its prompts' tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flora_jax.serve.engine import Engine
from flora_jax.serve.http.errors import ApiError, invalid, short
from flora_jax.serve.http.infill import Infill
from flora_jax.serve.http.schemas import Message, ModelCard
from flora_jax.serve.http.token_texts import TokenTexts
from flora_jax.serve.registry import Version
from flora_jax.serve.request import Limits, RequestError

Result = TypeVar("Result")

# Characters of texts whose tokens are counted beside the event loop.
_LONG_TEXT = 10_000
_MOST_NAMED = 20


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served.

    Args:
        names: of the base, from one; the first is its usual one.
        root: where the base comes from.
        limits: the model's, with its tokenizer and chat template.
        created: when the server started, in seconds since 1970.
    """

    names: tuple[str, ...]
    root: str
    limits: Limits
    created: int = 0
    texts: TokenTexts = dataclasses.field(init=False)
    infill: Infill | None = dataclasses.field(init=False)
    _most_characters: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        tokenizer = self.limits.tokenizer
        object.__setattr__(self, "texts", TokenTexts(tokenizer))
        object.__setattr__(self, "infill", Infill.of(tokenizer))
        most = self.limits.context * longest_token(tokenizer)
        object.__setattr__(self, "_most_characters", most)

    def adapter_of(self, model: str, engine: Engine) -> str | None:
        """The adapter that a request's ``model`` names; ``None`` is the base.

        Raises:
            ApiError: 404, nothing has this name.
        """
        if model in self.names:
            return None
        behind = (model[len(base) + 1 :] for base in self.names if model.startswith(f"{base}:"))
        for name in (model, *behind):
            if engine.registry.knows(name):
                return name
        known = [*self.names, *(version.name for version in engine.registry.versions())]
        more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
        message = f"unknown model {short(model)}, expected {', '.join(known[:_MOST_NAMED])}{more}"
        raise ApiError(404, message, code="model_not_found", param="model")

    def cards(self, versions: Iterable[Version]) -> list[ModelCard]:
        """Of the base by each of its names, and of every adapter."""
        context = self.limits.context
        base = [
            ModelCard(id=name, created=self.created, root=self.root, max_model_len=context)
            for name in self.names
        ]
        return base + [
            ModelCard(
                id=version.name, created=self.created, root=_root(version), parent=self.names[0],
                max_model_len=context,
            )
            for version in versions
        ]  # fmt: skip

    async def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The tokens of a text; see :meth:`encode_all`."""
        (found,) = await self.encode_all([text], add_special_tokens)
        return found

    async def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[tuple[int, ...]]:
        """The tokens of texts; what is long together is looked at beside the event loop.

        Raises:
            RequestError: see :meth:`flora_jax.serve.request.Limits.encode`; or no tokens of one of them
                can fit the context, whatever they are.
        """
        for text in texts:
            if len(text) > self._most_characters:
                raise RequestError(
                    f"the prompt has {len(text)} characters, the context of {self.limits.context} "
                    f"tokens holds at most {self._most_characters}"
                )

        return await _each(lambda text: self.limits.encode(text, add_special_tokens), texts)

    async def special_spans(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[dict[int, tuple[int, int]]]:
        """Where special tokens lie in texts that have been encoded: by their places among a text's tokens
        their first character and the one behind. Those that the tokenizer adds lie nowhere.
        """
        tokenizer = self.limits.tokenizer
        assert tokenizer is not None
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}

        def spans(text: str) -> dict[int, tuple[int, int]]:
            (found,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
            places = enumerate(zip(found.ids, found.offsets))
            return {
                place: span for place, (token, span) in places if token in special and any(span)
            }

        return await _each(spans, texts)

    def decode(self, token_ids: Sequence[int], with_special: bool = False) -> str:
        """The text of tokens, those outside the vocabulary left out, special ones unless asked."""
        tokenizer, size = self.limits.tokenizer, self.limits.vocab_size
        if tokenizer is None:
            return ""
        known = [token for token in token_ids if token < size]
        return tokenizer.decode(known, skip_special_tokens=not with_special)

    async def encode_messages(
        self, messages: list[Message], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        """The tokens of a conversation.

        Raises:
            RequestError: see :meth:`flora_jax.serve.request.Limits.encode_messages`.
        """
        plain = [_plain(message) for message in messages]
        if sum(len(message["content"]) for message in plain) < _LONG_TEXT:
            return self.limits.encode_messages(plain, add_generation_prompt)
        return await asyncio.to_thread(self.limits.encode_messages, plain, add_generation_prompt)

    async def encode_infills(self, prefixes: Sequence[str], suffix: str) -> list[tuple[int, ...]]:
        """The tokens of gaps to fill in, each behind its prefix, before the same suffix.

        Raises:
            ApiError: the tokenizer has no tokens for it.
        """
        if self.infill is None:
            raise invalid("the model has no fill-in-the-middle tokens, leave suffix out", "suffix")
        *before, after = await self.encode_all([*prefixes, suffix], add_special_tokens=False)
        return [self.infill.join(one, after) for one in before]


async def _each(function: Callable[[str], Result], texts: Sequence[str]) -> list[Result]:
    """Of every text; beside the event loop where they are long together."""
    if sum(map(len, texts)) < _LONG_TEXT:
        return [function(text) for text in texts]
    return await asyncio.to_thread(lambda: [function(text) for text in texts])


def longest_token(tokenizer: Any | None) -> float:
    """Characters that a token can stand for at most; infinite where the tokenizer takes some away."""
    if tokenizer is None or tokenizer.normalizer is not None:
        return math.inf
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return math.inf
    return max(map(len, tokenizer.get_vocab()), default=math.inf)


def _plain(message: Message) -> Mapping[str, str]:
    content = message.content
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    return {"role": message.role, "content": content}


def _root(version: Version) -> str:
    if not isinstance(version.source, str | Path):
        return "memory"
    return str(version.source).encode("utf-8", "replace").decode()  # A path may be no text.
