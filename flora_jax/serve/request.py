"""Requests and completions: one validation, the same for Python and for lines of JSON.

A :class:`SamplingParams` and a :class:`Request` are checked when they are made. What depends on the model
(context, vocabulary, tokenizer) is checked by :meth:`Limits.check`. Without JAX.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flora_jax.errors import InputError
from flora_jax.jsonl import Line, kind_of

if TYPE_CHECKING:
    from flora_jax.checkpoints.chat import Chat

RequestId = int | str
FinishReason = Literal["stop", "length", "abort", "error"]
# Ids that end a row: those that a request may name, and with the model's own end tokens.
MAX_STOP_TOKENS, MAX_STOPS = 8, 16

# Characters of a text that take the tokenizer long enough for others to notice.
_LONG_TEXT = 10_000
_LARGEST_INT32 = 2**31 - 1
_LARGEST_SEED = 2**32 - 1
_LARGEST_FLOAT32 = 3.4028234663852886e38
# As in vLLM: a temperature below draws the largest logit. Logits over it would overflow.
_LEAST_TEMPERATURE = 1e-5


class RequestError(InputError):
    """A request that cannot be served; the message says what was found and what was expected."""


class TokenLogprob(NamedTuple):
    """The natural logarithm of a token's probability, and the likeliest tokens at its place with theirs,
    the likeliest first: of the model's own distribution, before temperature, top-k and top-p.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "token_id": self.token_id,
            "logprob": self.logprob,
            "top": [[token, logprob] for token, logprob in self.top],
        }


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued; the names and meanings are vLLM's.

    Args:
        max_tokens: tokens to generate at most, from 1. Fewer where the model's context ends.
        temperature: 0 (and anything below 1e-5, as in vLLM) takes the likeliest token.
        top_k: samples among so many likeliest tokens; 0 or -1 is off.
        top_p: samples among the likeliest tokens that reach this probability together; 1 is off.
        seed: of this request's random numbers, 0 to 2^32 - 1; ``None`` takes the engine's seed, folded
            with the request's ``fold_in``.
        stop: one string or several; the text ends before the first that appears.
        stop_token_ids: tokens that end it, beside the model's end tokens; up to 8 different ones.
        ignore_eos: goes on after the model's end tokens.
        logprobs: gives the log probability of each drawn token, and those of so many likeliest tokens
            in its place; 0 is the drawn token's alone. An engine serves up to its ``max_logprobs``.
        prompt_logprobs: the same for the prompt's tokens; the first has none.

    Raises:
        RequestError: a value of the wrong type or out of range. A bool is no number, and a number has to
            be finite in float32.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    # A string is a sequence of strings: both are accepted, and a tuple of whole strings is stored.
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        temperature = _real("temperature", self.temperature, 0.0, _LARGEST_FLOAT32)
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        ids = _token_ids("stop_token_ids", ids)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}, expected true or false")
        _store(
            self,
            max_tokens=_integer("max_tokens", self.max_tokens, 1, _LARGEST_INT32),
            temperature=temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
            top_k=max(0, _integer("top_k", self.top_k, -1, _LARGEST_INT32)),
            top_p=_real("top_p", self.top_p, 0.0, 1.0, above=True),
            seed=None if self.seed is None else _integer("seed", self.seed, 0, _LARGEST_SEED),
            stop=_strings(self.stop),
            stop_token_ids=tuple(dict.fromkeys(ids)),
            logprobs=_logprobs("logprobs", self.logprobs),
            prompt_logprobs=_logprobs("prompt_logprobs", self.prompt_logprobs),
        )
        _check_stop_count(self.stop_token_ids)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, and how and under which adapter to continue it.

    Args:
        prompt_token_ids: the prompt, from one token.
        sampling_params: see there.
        adapter: the name of an adapter; ``None`` is the base model.
        request_id: how the caller knows it, a string or an integer; ``None`` leaves it to the engine.
        fold_in: what the engine's seed is folded with where ``sampling_params`` has no seed, 0 to
            2^32 - 1: requests with the same number draw alike. ``None`` takes how many requests the
            engine had before.

    Raises:
        RequestError: a field of the wrong type or out of range, or an empty prompt.
    """

    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    adapter: str | None = None
    request_id: RequestId | None = None
    fold_in: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling_params, SamplingParams):
            found = type(self.sampling_params).__name__
            raise RequestError(f"sampling_params is {found}, expected SamplingParams")
        if self.adapter is not None and not (isinstance(self.adapter, str) and self.adapter):
            raise RequestError(f"adapter is {self.adapter!r}, expected a name")
        if not (self.request_id is None or is_request_id(self.request_id)):
            raise RequestError(
                f"request_id is {self.request_id!r}, expected a string or an integer"
            )
        ids = _token_ids("prompt_token_ids", self.prompt_token_ids)
        if not ids:
            raise RequestError("the prompt is empty")
        fold_in = self.fold_in
        if fold_in is not None:
            fold_in = _integer("fold_in", fold_in, 0, _LARGEST_SEED)
        _store(self, prompt_token_ids=ids, fold_in=fold_in)

    @property
    def reach(self) -> int:
        """Tokens of prompt and output at most."""
        return len(self.prompt_token_ids) + self.sampling_params.max_tokens

    @property
    def label(self) -> str:
        """The request as messages name it."""
        return "request" if self.request_id is None else f"request {self.request_id}"


def is_request_id(value: Any) -> bool:
    return isinstance(value, str | numbers.Integral) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model can serve.

    Args:
        context: positions of the longest sequence, prompt and output together.
        vocab_size: token ids lie below it.
        tokenizer: a ``tokenizers.Tokenizer``, or ``None``: then there is no text.
        chat: the model's chat template; without it there are no conversations.
        max_logprobs: likeliest tokens that a request may ask for; 0: no log probabilities at all.
        shortened_by: the option that makes the context shorter than it was asked for, as messages name
            it.
    """

    context: int
    vocab_size: int
    tokenizer: Any | None = None
    chat: Chat | None = None
    max_logprobs: int = 0
    shortened_by: str | None = None

    def check(self, request: Request) -> None:
        """Whether the model can serve a request.

        Raises:
            RequestError: the prompt is longer than the context, a token is outside the vocabulary, stop
                strings where there is no text, or too many stop tokens or log probabilities. It does not
                name the request.
        """
        params, ids = request.sampling_params, request.prompt_token_ids
        if len(ids) > self.context:
            why = "" if self.shortened_by is None else f" by {self.shortened_by}"
            raise RequestError(f"the prompt has {len(ids)} tokens, the context {self.context}{why}")
        self._known("prompt_token_ids", ids)
        self._known("stop_token_ids", params.stop_token_ids)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the checkpoint has none")
        _check_stop_count(self.stop_ids(params))
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and (wanted > self.max_logprobs or not self.max_logprobs):
                most = self.max_logprobs or "none"
                raise RequestError(f"{name} is {wanted}, max_logprobs of this engine is {most}")

    def _known(self, name: str, ids: Sequence[int]) -> None:
        if ids and max(ids) >= self.vocab_size:
            token = next(token for token in ids if token >= self.vocab_size)
            raise RequestError(
                f"{name} holds {token}, the vocabulary has 0 to {self.vocab_size - 1}"
            )

    def stop_ids(self, params: SamplingParams, eos: Collection[int] = ()) -> frozenset[int]:
        """The tokens that end a request, with the model's end tokens ``eos`` unless it ignores them.

        A stop string that is the text of a special token is among them: the text of special tokens is
        no part of a completion, so only the token itself can be found.
        """
        special = _special_tokens(self.tokenizer) if params.stop else {}
        named = (special[text] for text in params.stop if text in special)
        return frozenset([*params.stop_token_ids, *named, *(() if params.ignore_eos else eos)])

    def encode(self, text: Any, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The tokens of a prompt's text.

        Args:
            text: of the prompt.
            add_special_tokens: those that the tokenizer puts around a text, such as a first token.

        Raises:
            RequestError: it is no valid text, or there is no tokenizer.
        """
        if not isinstance(text, str):
            raise RequestError(f"prompt is {type(text).__name__}, expected a string")
        return self._encode("prompt", text, add_special_tokens)

    def encode_messages(self, messages: Any, add_generation_prompt: bool = True) -> tuple[int, ...]:
        """The tokens of a conversation, as the model's chat template writes it.

        Args:
            messages: a list of objects with a ``role`` and a ``content``, both strings.
            add_generation_prompt: ends with the head of the assistant's next message.

        Raises:
            RequestError: they are no such list, the template refuses them, or there is no template or no
                tokenizer.
        """
        messages = _messages(messages)
        if self.chat is None:
            raise RequestError("messages need a chat template, and there is none here")
        try:
            text = self.chat.render(messages, add_generation_prompt)
        except InputError as error:
            raise RequestError(str(error)) from None
        # The template has written them all.
        return self._encode("messages", text, add_special_tokens=False)

    def _encode(self, field: str, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise RequestError(
                f"the checkpoint has no tokenizer.json: give prompt_token_ids in place of {field}"
            )
        try:
            if len(text) < _LONG_TEXT:
                found = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            else:  # The binding lets other threads run during a batch alone.
                (found,) = self.tokenizer.encode_batch(
                    [text], add_special_tokens=add_special_tokens
                )
            return tuple(found.ids)
        except TypeError:  # What the binding makes of a lone surrogate such as \ud800.
            raise RequestError("the prompt is not valid Unicode") from None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a request ended with.

    ``token_ids`` has every generated token, the stop token or the end of a stop string included;
    ``text`` is cut before either, and ``None`` without a tokenizer. ``logprobs`` has one for each of
    ``token_ids``, ``prompt_logprobs`` one for each of the prompt's, the first ``None``; both are ``None``
    where they were not asked for.
    """

    request_id: RequestId | None
    adapter: str | None
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the request id, as JSON has it, with ``completion_tokens``; log probabilities only
        where there are some.
        """
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "request_id"
        } | {"token_ids": [*self.token_ids]}
        for name in ("logprobs", "prompt_logprobs"):
            given = fields.pop(name)
            if given is not None:
                fields[name] = [None if one is None else one.to_json() for one in given]
        return fields | {"completion_tokens": len(self.token_ids)}


_SETTINGS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_FIELDS = _SETTINGS | {*_PROMPTS, "adapter"}


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes requests from JSON.

    Args:
        limits: the model's.
        adapters: the names that a request may use.
        defaults: for fields that are absent or null.
        keep_last: cuts a prompt from the left to so many tokens that its ``max_tokens`` fit the context
            behind it; otherwise a prompt longer than the context is refused.
    """

    limits: Limits
    adapters: Collection[str] = frozenset()
    defaults: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    keep_last: bool = False

    def lines(self, lines: Iterable[Line]) -> Iterator[Request | RequestError]:
        """The request of each line, or why it is none, which begins with file and line. Their
        ``request_id`` and ``fold_in`` are 0, 1, 2 ...

        Args:
            lines: of :func:`flora_jax.jsonl.read_lines` or :func:`~flora_jax.jsonl.parse_lines`.
        """
        for index, line in enumerate(lines):
            if line.problem is not None:
                yield RequestError(f"{line.where}: {line.problem}")
                continue
            try:
                yield self.request(line.value, index)
            except RequestError as error:
                yield RequestError(f"{line.where}: {error}")

    def request(self, raw: Any, index: int = 0) -> Request:
        """One request from its JSON value, with ``index`` as its id and ``fold_in``.

        Raises:
            RequestError: without the file and line.
        """
        if not isinstance(raw, Mapping):
            raise RequestError(f"found {kind_of(raw)}, expected an object")
        if unknown := sorted(set(raw) - _FIELDS):
            raise RequestError(
                f"unknown field {unknown[0]!r}, expected some of {', '.join(sorted(_FIELDS))}"
            )
        adapter = raw.get("adapter")
        if adapter is not None and not (isinstance(adapter, str) and adapter in self.adapters):
            given = ", ".join(sorted(self.adapters)) or "none"
            raise RequestError(f"unknown adapter {adapter!r}, given: {given}")
        given_settings = {n: raw[n] for n in _SETTINGS if raw.get(n) is not None}
        params = dataclasses.replace(self.defaults, **given_settings)
        ids = self._prompt({name: raw[name] for name in _PROMPTS if raw.get(name) is not None})
        if self.keep_last:
            ids = ids[-max(1, self.limits.context - params.max_tokens) :]
        request = Request(ids, params, adapter, request_id=index, fold_in=index)
        self.limits.check(request)
        return request

    def _prompt(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """The tokens of whichever of the three is given."""
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise RequestError(f"expected one of {', '.join(map(repr, _PROMPTS))}, found {names}")
        ((name, value),) = given.items()
        if name == "prompt":
            return self.limits.encode(value)
        if name == "messages":
            return self.limits.encode_messages(value)
        return _token_ids(name, value)


def _store(target: Any, **values: Any) -> None:
    """Sets fields of a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(target, name, value)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    if tokenizer is None:
        return {}
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _check_stop_count(ids: Collection[int]) -> None:
    if len(ids) > MAX_STOP_TOKENS:
        raise RequestError(f"{len(ids)} stop_token_ids, at most {MAX_STOP_TOKENS} are served")


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if hasattr(value, "tolist"):  # An array's.
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError(f"{name} is {type(value).__name__}, expected a list of integers")
    if any(type(token) is not int for token in value):
        for token in value:
            if not isinstance(token, numbers.Integral) or isinstance(token, bool):
                raise RequestError(f"{name} holds {token!r}, expected integers")
        value = [int(token) for token in value]
    if value and min(value) < 0:
        raise RequestError(f"{name} holds {min(value)}, expected integers from 0")
    return tuple(value)


def _messages(value: Any) -> list[Mapping[str, str]]:
    """A conversation, checked."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError(f"messages is {type(value).__name__}, expected a list of objects")
    if not value:
        raise RequestError("messages is empty, expected at least one message")
    for index, message in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            found = type(message).__name__
            raise RequestError(f"{name} is {found}, expected an object with role and content")
        if unknown := [key for key in message if key not in ("role", "content")]:
            raise RequestError(f"{name} has {unknown[0]!r}, expected role and content")
        for field in ("role", "content"):
            text = message.get(field)
            if not isinstance(text, str):
                shown = "missing" if field not in message else _short(repr(text))
                raise RequestError(f"{name}: {field} is {shown}, expected a string")
        if not message["role"]:
            raise RequestError(f"{name}: role is empty, expected user, assistant or system")
    return list(value)


def _strings(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else [] if value is None else value
    whole = isinstance(values, list | tuple) and all(isinstance(v, str) and v for v in values)
    if not whole:
        shown = list(value) if isinstance(value, tuple) else value
        raise RequestError(f"stop is {shown!r}, expected a non-empty string or a list of them")
    return tuple(dict.fromkeys(values))


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}, expected an integer")
    if not least <= int(value) <= most:
        raise RequestError(
            f"{name} is {_short(value)}, expected at least {least} and at most {most}"
        )
    return int(value)


def _logprobs(name: str, value: Any) -> int | None:
    return None if value is None else _integer(name, value, 0, _LARGEST_INT32)


def _real(name: str, value: Any, least: float, most: float, *, above: bool = False) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}, expected a number")
    number: Any = value  # Compared as it is: float() of a large integer overflows.
    if not ((least < number if above else least <= number) and number <= most):
        bound = "finite in float32" if most == _LARGEST_FLOAT32 else f"at most {most}"
        side = "above" if above else "at least"
        raise RequestError(f"{name} is {_short(value)}, expected {side} {least} and {bound}")
    return float(value)


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python writes no such number out.
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}... ({len(text)} digits)"
