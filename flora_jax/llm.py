"""The library in five lines: a model with adapters by name, and prompts to completions.

``flora_jax.LLM("mini", adapters={"perl": "flora/perl"}).generate(["sub f {"], adapters="perl")``
"""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import jax

from flora_jax.adapters import model_adapter
from flora_jax.adapters.model_adapter import ModelAdapter
from flora_jax.adapters.projections import match_targets
from flora_jax.checkpoints import checkpoint
from flora_jax.checkpoints.checkpoint import open_checkpoint
from flora_jax.errors import InputError, RunError
from flora_jax.models.family import ModelConfig
from flora_jax.models.model import Model
from flora_jax.models.splits import tensor_mesh
from flora_jax.peft import read
from flora_jax.serve.engine import Engine
from flora_jax.serve.generate import run
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.registry import named_sources
from flora_jax.serve.request import Completion, Request, RequestError, SamplingParams
from flora_jax.serve.updates import Update
from flora_jax.shipped import adapter_source

# Messages, each with a "role" and a "content".
Conversation = Sequence[Mapping[str, str]]
# A text, its token ids, or a mapping with one of "prompt" and "prompt_token_ids" as in vLLM.
Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A model with its tokenizer and adapters, ready to complete prompts.

    Args:
        model: a Hugging Face directory, a converted directory, a hub id, or "mini", which is shipped.
        adapters: by the names that ``generate`` uses: PEFT folders, adapters in memory, or shipped ones
            such as "flora/perl". An existing path wins over a shipped name.
        options: the engine's sizes, its seed, and whether it is batch-invariant.
        dtype: of the weights: "float32", "bfloat16" or "float16"; ``None`` is the checkpoint's own, and
            float32 on a CPU.
        quantize: "int8" or "int4" holds the projections' weights in 8 or 4 bits.
        tensor_parallel_size: so many devices hold and compute the model together.

    Raises:
        InputError: no such model or adapter, or one that does not fit the other; or devices that are not
            there or cannot share the model.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path | ModelAdapter] | None = None,
        *,
        options: EngineOptions | None = None,
        dtype: str | None = None,
        quantize: Literal["int8", "int4"] | None = None,
        tensor_parallel_size: int = 1,
    ):
        sources = {
            name: source if isinstance(source, ModelAdapter) else adapter_source(source)
            for name, source in named_sources(adapters).items()
        }
        opened = open_checkpoint(model)
        mesh = tensor_mesh(opened.config, tensor_parallel_size, quantize)
        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"  # A CPU computes 16 bits slower than 32.
        loaded = opened.load(dtype, quantize=quantize, mesh=mesh)
        # The engine under it: for requests that come one by one.
        self.engine = Engine(loaded, sources, tokenizer=opened.tokenizer, options=options)
        self._limits = dataclasses.replace(self.engine.limits, chat=opened.chat)
        self._streams = 0
        self._closed = False

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: str | Sequence[str | None] | None = None,
        stream: Literal[False] = False,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: str | Sequence[str | None] | None = None,
        stream: Literal[True],
    ) -> Iterator[Update]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: str | Sequence[str | None] | None = None,
        stream: bool = False,
    ) -> list[Completion] | Iterator[Update]:
        """Completes prompts, all in one batch, each under its own adapter.

        Args:
            prompts: texts, or lists of token ids where there is no tokenizer; one alone is accepted.
            sampling_params: one for all prompts or one for each. A prompt without a seed takes the
                engine's, folded with its index.
            adapters: names, one for each prompt; ``None`` is the base model, and one name or ``None``
                serves all prompts.
            stream: yields an update for whatever comes next, with the ``index`` of its prompt and the
                new ``text``; a prompt that fails has one with ``error``. Otherwise the completions are
                returned in the order of the prompts.

        Raises:
            InputError: a prompt, a parameter or an adapter that cannot be served; nothing has run then.
            RunError: a prompt failed while it ran; another stream is still open; or the LLM is closed.
        """
        self._check_open()
        requests = self._requests(
            _listed(prompts), self._token_ids, sampling_params, adapters, "prompt"
        )
        return self._answer(requests, stream, "prompt")

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: str | Sequence[str | None] | None = None,
        add_generation_prompt: bool = True,
        stream: Literal[False] = False,
    ) -> list[Completion]: ...

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: str | Sequence[str | None] | None = None,
        add_generation_prompt: bool = True,
        stream: Literal[True],
    ) -> Iterator[Update]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: str | Sequence[str | None] | None = None,
        add_generation_prompt: bool = True,
        stream: bool = False,
    ) -> list[Completion] | Iterator[Update]:
        """Answers conversations, all in one batch, as the model's chat template writes them.

        Args:
            messages: a conversation or a list of them: messages with a ``role`` ("system", "user",
                "assistant") and a ``content``.
            sampling_params: as in :meth:`generate`.
            adapters: as in :meth:`generate`.
            add_generation_prompt: has the model begin an answer; else it goes on after the last message.
            stream: as in :meth:`generate`.

        Raises:
            InputError: as in :meth:`generate`; a malformed message; or the model has no chat template.
            RunError: as in :meth:`generate`.
        """
        self._check_open()
        encode = self._limits.encode_messages
        requests = self._requests(
            _conversations(messages), lambda one: encode(one, add_generation_prompt),
            sampling_params, adapters, "conversation",
        )  # fmt: skip
        return self._answer(requests, stream, "conversation")

    def _check_open(self) -> None:
        if self._closed:
            raise RunError("this LLM is closed")

    def _answer(
        self, requests: list[Request], stream: bool, title: str
    ) -> list[Completion] | Iterator[Update]:
        """Runs them; ``title`` is what messages call one."""
        updates = self._run(requests)
        if stream:
            return updates
        completions: dict[int, Completion] = {}
        with contextlib.closing(updates):
            for update in updates:
                assert update.index is not None
                if update.error is not None:
                    raise RunError(f"{title} {update.index}: {update.error}")
                if update.completion is not None:
                    completions[update.index] = update.completion
        return [completions[index] for index in range(len(requests))]

    def _run(self, requests: list[Request]) -> Any:
        if self._streams:
            raise RunError("a stream of this LLM has not ended: read it to its end or close it")

        def updates() -> Iterator[Update]:
            # It counts from the first update: a stream that nobody reads holds up nothing.
            if self._streams:
                raise RunError("a stream of this LLM has not ended: read it to its end or close it")
            self._streams += 1
            try:
                yield from run(self.engine, requests, 4 * self.engine.options.max_num_seqs)
            finally:
                self._streams -= 1

        return updates()

    def _requests(
        self,
        prompts: Sequence[Any],
        encode: Callable[[Any], Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: str | Sequence[str | None] | None,
        title: str,
    ) -> list[Request]:
        """A request of each prompt, whose tokens ``encode`` gives; messages call it by ``title``."""
        count = len(prompts)
        params = _each("sampling_params", sampling_params, SamplingParams, count)
        names = _each("adapters", adapters, str, count)
        known = self.engine.adapters
        found = []
        for index, (prompt, own, name) in enumerate(zip(prompts, params, names)):
            try:
                if name is not None and name not in known:
                    given = ", ".join(sorted(known)) or "none"
                    raise RequestError(f"unknown adapter {name!r}, given: {given}")
                request = Request(encode(prompt), own or SamplingParams(), name, fold_in=index)
                self._limits.check(request)
            except RequestError as error:
                raise RequestError(f"{title} {index}: {error}") from None
            found.append(request)
        return found

    def _token_ids(self, prompt: Prompt) -> Any:
        if isinstance(prompt, Mapping):
            if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
                fields = ", ".join(map(str, prompt)) or "nothing"
                raise RequestError(f"found {fields}, expected 'prompt' or 'prompt_token_ids'")
            ((field, value),) = prompt.items()
            return self._limits.encode(value) if field == "prompt" else value
        return self._limits.encode(prompt) if isinstance(prompt, str) else prompt

    def close(self) -> None:
        """Lets go of the engine; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def _listed(prompts: Any) -> Sequence[Prompt]:
    """The prompts as a list; a text, a mapping or a list of integers is one."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InputError(f"prompts is {type(prompts).__name__}, expected a string or a list")
    if prompts and isinstance(prompts[0], numbers.Integral):
        return [prompts]
    return prompts


def _conversations(messages: Any) -> Sequence[Any]:
    """The conversations as a list; messages alone are one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(
            f"messages is {type(messages).__name__}, expected a list of messages or of conversations"
        )
    return [messages] if messages and isinstance(messages[0], Mapping) else messages


def _each(name: str, given: Any, kind: type, count: int) -> list[Any]:
    """One for every prompt, where one for all or a sequence is given."""
    if given is None or isinstance(given, kind):
        return [given] * count
    if not isinstance(given, Sequence):
        raise InputError(f"{name} is {type(given).__name__}, expected {kind.__name__} or a list")
    if len(given) != count:
        raise InputError(
            f"{name} has {len(given)} entries, expected one for each of {count} prompts"
        )
    for index, one in enumerate(given):
        if not (one is None or isinstance(one, kind)):
            raise InputError(f"{name}[{index}] is {one!r}, expected {kind.__name__} or None")
    return list(given)


def load_model(source: str | Path, dtype: Any = None, **options: Any) -> Model:
    """The model of a checkpoint; "mini" is shipped. For the rest see
    :func:`flora_jax.checkpoints.checkpoint.load_model`.
    """
    return checkpoint.load_model(source, dtype, **options)


def read_adapter(folder: str | Path, model: Model | ModelConfig) -> ModelAdapter:
    """The adapter of a PEFT folder, or a shipped one such as "flora/perl", for a model.

    Raises:
        InputError: it is damaged, or does not fit the model.
    """
    config = _config(model)
    return read.read_adapter(adapter_source(folder), config.projections(), config.n_layer)


def init_adapter(
    model: Model | ModelConfig,
    kind: str,
    *,
    rank: int = 1,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> ModelAdapter:
    """A fresh adapter for a model: the identity, ready to be trained, changed or written.

    Args:
        model: the model, or its config.
        kind: "flora", "lora", "hira" or "ia3".
        rank: components of every target; IA3 has one.
        targets: ends of the projections' paths, as in PEFT, whose targets for LoRA are the default.
        seed: of the factors that start at random.
        options: what the kind's ``init`` takes, such as ``reduction`` of FLoRA or ``alpha`` of LoRA.

    Raises:
        InputError: a target that no projection ends in.
    """
    config = _config(model)
    projections = config.projections()
    return model_adapter.init_adapter(
        jax.random.key(seed), kind, projections, config.n_layer, rank=rank,
        targets=None if targets is None else match_targets(targets, projections), **options,
    )  # fmt: skip


def _config(model: Model | ModelConfig) -> ModelConfig:
    return model.config if isinstance(model, Model) else model
