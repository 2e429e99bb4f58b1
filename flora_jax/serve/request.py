"""A generation request and its completion, as lines of JSON; checked on the host, without JAX."""

from __future__ import annotations

import dataclasses
import json
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from flora_jax.errors import InputError

FinishReason = Literal["stop", "length"]


class RequestError(InputError):
    """A request that cannot be served; the message says which line, what was found and expected."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request takes for the fields it does not have.

    Raises:
        RequestError: a value that no request may have.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _settings(dataclasses.asdict(self), self)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    ``seed`` is ``None`` where the row takes the command's, folded with ``index``. Generation ends
    after ``max_tokens``, at a stop token (the model's end tokens, unless ``ignore_eos``, and
    ``stop_token_ids``), or where one of the ``stop`` strings appears in the text.
    """

    index: int
    token_ids: tuple[int, ...]
    adapter: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def check(self, context: int, vocab_size: int, has_tokenizer: bool) -> None:
        """Whether such a model can serve it.

        Raises:
            RequestError: the prompt is not of 1 to ``context`` tokens of the vocabulary, a field that no
                request may have, or stop strings where there is no text.
        """
        ids = self.token_ids
        if not 1 <= len(ids) <= context:
            raise RequestError(f"request {self.index}: {len(ids)} tokens, expected 1 to {context}")
        try:
            _token_ids("token_ids", ids, vocab_size)
            _number({"index": self.index}, "index", 0, int, 0, _LARGEST_SEED)
            _settings({name: getattr(self, name) for name in _SETTINGS}, self)
            if self.seed is not None:
                _number({"seed": self.seed}, "seed", 0, int, 0, _LARGEST_SEED)
            _token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
            if len({*self.stop_token_ids}) > MAX_STOP_TOKENS:
                raise RequestError(_too_many(len(self.stop_token_ids)))
            _strings([*self.stop])
            if self.stop and not has_tokenizer:
                raise RequestError(_NO_TEXT)
        except RequestError as error:
            raise RequestError(f"request {self.index}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Completion:
    """``token_ids`` has every generated token, the stop token or the end of a stop string included;
    ``text`` is cut before either, and ``None`` without a tokenizer.
    """

    index: int
    adapter: str | None
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int

    def to_json(self) -> str:
        fields = dataclasses.asdict(self) | {"completion_tokens": len(self.token_ids)}
        return json.dumps(fields, ensure_ascii=False)


_FIELDS = frozenset(
    "prompt prompt_token_ids adapter max_tokens temperature top_k top_p seed stop stop_token_ids "
    "ignore_eos".split()
)
_SETTINGS = ("max_tokens", "temperature", "top_k", "top_p")
_LARGEST_SEED = 2**32 - 1
_NO_TEXT = "stop strings need a tokenizer, and the checkpoint has none"
MAX_STOP_TOKENS = 8


def _too_many(count: int) -> str:
    return f"{count} stop_token_ids, at most {MAX_STOP_TOKENS} are served"


def parse_requests(
    lines: Iterable[str],
    *,
    where: str,
    tokenizer: Any | None,
    adapters: Iterable[str],
    vocab_size: int,
    context: int,
    defaults: Defaults,
) -> list[Request]:
    """Reads one request a line; blank lines are passed over, but count as lines.

    Args:
        lines: JSON objects.
        where: the file's name for messages.
        tokenizer: a ``tokenizers.Tokenizer``, or ``None``: then only token ids are served.
        adapters: the names that a request may use.
        vocab_size: token ids lie below it.
        context: the longest prompt, in tokens.
        defaults: for absent fields.

    Raises:
        RequestError: on the first line that is not a valid request.
    """
    names = frozenset(adapters)
    requests: list[Request] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:  # Not only JSONDecodeError: huge integers.
            raise RequestError(f"{where}, line {number}: malformed JSON: {error}") from None
        try:
            requests.append(
                parse_request(raw, len(requests), tokenizer, names, vocab_size, context, defaults)
            )
        except RequestError as error:
            raise RequestError(f"{where}, line {number}: {error}") from None
    if not requests:
        raise RequestError(f"{where}: no requests")
    return requests


def parse_request(
    raw: Any,
    index: int,
    tokenizer: Any | None,
    adapters: frozenset[str],
    vocab_size: int,
    context: int,
    defaults: Defaults,
) -> Request:
    """One request from its JSON value; see :func:`parse_requests`.

    Raises:
        RequestError: without the file and line.
    """
    if not isinstance(raw, Mapping):
        raise RequestError(f"expected a JSON object, found {type(raw).__name__}")
    if unknown := sorted(set(raw) - _FIELDS):
        raise RequestError(
            f"unknown field {unknown[0]!r}, expected some of {', '.join(sorted(_FIELDS))}"
        )
    adapter = raw.get("adapter")
    if adapter is not None and not (isinstance(adapter, str) and adapter in adapters):
        given = ", ".join(sorted(adapters)) or "none"
        raise RequestError(f"unknown adapter {adapter!r}, given: {given}")
    ignore_eos = raw.get("ignore_eos")
    ignore_eos = False if ignore_eos is None else ignore_eos
    if not isinstance(ignore_eos, bool):
        raise RequestError(f"ignore_eos is {ignore_eos!r}, expected true or false")
    seed = raw.get("seed")
    stop = _strings(raw.get("stop"))
    if stop and tokenizer is None:
        raise RequestError(_NO_TEXT)
    stop_ids = raw.get("stop_token_ids")
    stop_ids = () if stop_ids is None else _token_ids("stop_token_ids", stop_ids, vocab_size)
    special = _special_tokens(tokenizer) if stop else {}
    # The text of a special token is not part of a completion: it can only stop one as a token.
    stop_ids += tuple(special[text] for text in stop if text in special)
    stop = tuple(text for text in stop if text not in special)
    if len(stop_ids) > MAX_STOP_TOKENS:
        raise RequestError(_too_many(len(stop_ids)))
    return Request(
        index=index,
        token_ids=_prompt(raw, tokenizer, vocab_size, context),
        adapter=adapter,
        **_settings(raw, defaults),
        seed=None if seed is None else _number(raw, "seed", 0, int, 0, _LARGEST_SEED),
        stop=stop,
        stop_token_ids=stop_ids,
        ignore_eos=ignore_eos,
    )


def _settings(raw: Mapping[str, Any], defaults: Defaults | Request) -> dict[str, Any]:
    return {
        "max_tokens": _number(raw, "max_tokens", defaults.max_tokens, int, 1),
        "temperature": _number(raw, "temperature", defaults.temperature, float, 0.0),
        "top_k": max(0, _number(raw, "top_k", defaults.top_k, int, -1, 2**31 - 1)),
        "top_p": _number(raw, "top_p", defaults.top_p, float, 0.0, 1.0, above=True),
    }


def _prompt(
    raw: Mapping[str, Any], tokenizer: Any | None, vocab_size: int, context: int
) -> tuple[int, ...]:
    text = raw.get("prompt")
    if (text is None) == (raw.get("prompt_token_ids") is None):
        raise RequestError("expected one of 'prompt' and 'prompt_token_ids'")
    if text is not None:
        if not isinstance(text, str):
            raise RequestError(f"prompt is {type(text).__name__}, expected a string")
        if tokenizer is None:
            raise RequestError(
                "the checkpoint has no tokenizer.json: give prompt_token_ids in place of prompt"
            )
        try:
            ids = tuple(tokenizer.encode(text).ids)
        except TypeError:  # What the binding makes of a lone surrogate such as \ud800.
            raise RequestError("the prompt is not valid Unicode") from None
    else:
        ids = _token_ids("prompt_token_ids", raw["prompt_token_ids"], vocab_size)
    if not ids:
        raise RequestError("the prompt is empty")
    if len(ids) > context:
        raise RequestError(f"the prompt has {len(ids)} tokens, the context {context}")
    return ids


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _token_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RequestError(f"{name} is {type(value).__name__}, expected a list of integers")
    for token in value:
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise RequestError(f"{name} holds {token!r}, expected integers")
        if not 0 <= int(token) < vocab_size:
            raise RequestError(f"{name} holds {token}, the vocabulary has 0 to {vocab_size - 1}")
    return tuple(value)


def _strings(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise RequestError(f"stop is {value!r}, expected a non-empty string or a list of them")
    return tuple(values)


def _number(
    raw: Mapping[str, Any],
    name: str,
    default: Any,
    kind: type,
    least: float,
    most: float = sys.float_info.max,
    *,
    above: bool = False,
) -> Any:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        wanted = "a number" if kind is float else "an integer"
        raise RequestError(f"{name} is {value!r}, expected {wanted}")
    in_range = least < value if above else least <= value
    if not in_range or not value <= most:
        bounds = f"{'above' if above else 'at least'} {least}"
        bounds += " and finite" if most == sys.float_info.max else f" and at most {most}"
        raise RequestError(f"{name} is {value}, expected {bounds}")
    return kind(value)
