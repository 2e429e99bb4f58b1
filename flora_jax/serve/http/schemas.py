"""The JSON of requests and answers, as OpenAI's and vLLM's clients write and read it.

Requests are strict: a number is no string, nothing is unknown, nothing is infinite. Fields of OpenAI's
that are not served here are taken at the value that changes nothing, and refused at any other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

LARGEST_INT32 = 2**31 - 1
LARGEST_SEED = 2**32 - 1
MOST_CHOICES = 128
MOST_STOPS = 16
MOST_PROMPTS = 2048

TokenIds = list[Annotated[int, Field(ge=0, le=LARGEST_INT32)]]
Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    | Annotated[TokenIds, Field(min_length=1)]
    | Annotated[
        list[Annotated[TokenIds, Field(min_length=1)]],
        Field(min_length=1, max_length=MOST_PROMPTS),
    ]
)
Stop = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]


def _is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token) is int and 0 <= token <= LARGEST_INT32 for token in value)
    )


def _check_prompt(value: Any) -> Any:
    """By hand: what a union of four lists says of a wrong one is no message for people."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) > MOST_PROMPTS and not _is_token_ids(value):
        raise ValueError(f"expected at most {MOST_PROMPTS} prompts")
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value) or _is_token_ids(value):
            return value
        if all(_is_token_ids(one) for one in value):
            return value
    raise ValueError("expected a string, a list of strings, token ids, or a list of lists of them")


def _check_stop(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value
    whole = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
    if not whole or len(value) > MOST_STOPS:
        raise ValueError(f"expected a non-empty string or a list of up to {MOST_STOPS} of them")
    return value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _only(*values: Any) -> Any:
    """A field that changes nothing at these values and is not served at any other."""

    def check(value: Any) -> Any:
        # True equals 1 in Python, not in JSON.
        same = [own for own in values if own == value and _is_bool(own) == _is_bool(value)]
        if not same:
            expected = " or ".join("null" if own is None else str(own).lower() for own in values)
            raise ValueError(f"only {expected} is served")
        return same[0]

    return PlainValidator(check, json_schema_input_type=Literal[values])


def _check_nothing(value: Any) -> Any:
    if value not in (None, {}, []) or isinstance(value, bool):
        raise ValueError("not served: leave it out")
    return value


Nothing = Annotated[
    Any,
    PlainValidator(
        _check_nothing,
        json_schema_input_type=None
        | Annotated[dict[str, Any], Field(max_length=0)]
        | Annotated[list[Any], Field(max_length=0)],
    ),
]


class Strict(BaseModel):
    """What a request is made of."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What comes along with a stream."""

    include_usage: bool = Field(False, description="A last chunk with the tokens of all choices.")


class Sampling(Strict):
    """What completions and chats have in common."""

    model: str = Field(description="The base, an adapter, or BASE:ADAPTER.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy. Default 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(None, ge=-1, le=LARGEST_INT32, description="0 and -1 are off.")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Choices of each prompt.")
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="Choice i of a prompt has seed + i."
    )
    stop: Annotated[
        Stop | None, PlainValidator(_check_stop, json_schema_input_type=Stop | None)
    ] = Field(None, description="The text ends before the first of them.")
    stop_token_ids: Annotated[TokenIds, Field(max_length=8)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(
        None, description="Choices carry token_ids, and in their first part prompt_token_ids."
    )
    user: str | None = Field(None, description="Taken and not used.")
    metadata: Any = Field(None, description="Taken and not used.")
    # Taken where they change nothing.
    presence_penalty: Annotated[Any, _only(0, None)] = None
    frequency_penalty: Annotated[Any, _only(0, None)] = None
    repetition_penalty: Annotated[Any, _only(1, None)] = None
    min_p: Annotated[Any, _only(0, None)] = None
    min_tokens: Annotated[Any, _only(0, None)] = None
    logit_bias: Nothing = None
    skip_special_tokens: Annotated[Any, _only(True, None)] = None
    use_beam_search: Annotated[Any, _only(False, None)] = None


class CompletionRequest(Sampling):
    """A request of /v1/completions."""

    prompt: Annotated[Any, PlainValidator(_check_prompt, json_schema_input_type=Prompt)] = Field(
        description="Texts or token ids, one or several."
    )
    suffix: str | None = Field(None, description="What comes after the text to fill in.")
    max_tokens: int | None = Field(
        None, ge=0, le=LARGEST_INT32, description="Default 16; 0 with echo alone."
    )
    logprobs: int | None = Field(None, ge=0, le=LARGEST_INT32)
    echo: bool | None = Field(None, description="The text begins with the prompt.")
    best_of: int | None = Field(None, description="Only n itself is served.")
    add_special_tokens: bool = Field(True, description="Of the tokenizer, in front of a text.")


class ContentPart(Strict):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart]
    name: Annotated[Any, _only(None)] = None


class ResponseFormat(Strict):
    """Only plain text is served."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, le=LARGEST_INT32)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=LARGEST_INT32, description="Default: what the context leaves."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LARGEST_INT32)
    add_generation_prompt: bool = True
    response_format: ResponseFormat | None = None
    tools: Nothing = None
    tool_choice: Annotated[Any, _only("none", None)] = None
    parallel_tool_calls: bool | None = None
    store: Annotated[Any, _only(False, None)] = None


class TokenizeRequest(Strict):
    """A request of /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """A request of /detokenize."""

    model: str | None = None
    tokens: TokenIds


class LoadRequest(Strict):
    """A request of /v1/load_lora_adapter."""

    lora_name: str = Field(description="What requests call it.")
    lora_path: str = Field(description="Its folder, below the adapters' root.")
    load_inplace: bool = Field(
        False, description="Replace the adapter of this name, if there is one."
    )


class UnloadRequest(Strict):
    """A request of /v1/unload_lora_adapter."""

    lora_name: str


class Usage(BaseModel):
    """Tokens: each prompt counts once, whatever its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """By token; the first of an echoed prompt has none. ``text_offset`` counts characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """What every kind of choice has."""

    index: int
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """The answer of /v1/completions, and with ``stream`` each of its chunks."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A name that ``model`` may have: the base's, whose parent is null, or an adapter's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "flora_jax"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


class LoadResponse(BaseModel):
    """``state`` says where the adapter lies: "resident" on the device, else it waits for room there."""

    lora_name: str
    state: Literal["resident", "host", "disk"]
    seconds: float


class UnloadResponse(BaseModel):
    lora_name: str


class Health(BaseModel):
    status: Literal["ok", "failed"]
    error: str | None = None


class Readiness(BaseModel):
    """``done`` of ``total`` programs are compiled, ``name`` the last of them."""

    status: Literal["starting", "ready", "draining", "failed", "stopped"]
    name: str | None = None
    done: int | None = None
    total: int | None = None
