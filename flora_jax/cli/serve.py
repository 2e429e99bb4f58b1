"""``flora-jax serve``: OpenAI's API over HTTP, with an adapter per request."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from flora_jax.cli.common import MODEL_HELP, dtype_of, named_adapters, prepare_jax
from flora_jax.cli.options import takes
from flora_jax.errors import InputError
from flora_jax.terminal import progress, say

if TYPE_CHECKING:
    from fastapi import FastAPI

    from flora_jax.checkpoints import Opened
    from flora_jax.serve.engine import Engine
    from flora_jax.serve.http.served import Served
    from flora_jax.serve.http.settings import Settings
    from flora_jax.serve.options import EngineOptions
    from flora_jax.serve.request import Limits


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The options of ``flora-jax serve``; those that vLLM has as well are spelt as there."""

    model: Annotated[str, typer.Argument(help=MODEL_HELP)]
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=DIR", help="Further adapters: vLLM's option takes several."),
    ] = None
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "--lora-modules", metavar="NAME=DIR",
            help="An adapter, or a shipped one; may be repeated. Also as vLLM's JSON.",
        ),
    ] = None  # fmt: skip
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What requests call the base; may be repeated. Default MODEL."),
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="FLORA_JAX_API_KEY", help="Guards /v1 and /tokenize; may be repeated."),
    ] = None  # fmt: skip
    admin_key: Annotated[
        list[str] | None,
        typer.Option(envvar="FLORA_JAX_ADMIN_KEY", help="Loads and unloads adapters."),
    ] = None  # fmt: skip
    adapter_root: Annotated[
        Path | None, typer.Option(help="Adapters that are loaded over HTTP lie below it.")
    ] = None
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 16
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an iteration. Default: by the platform.")
    ] = None
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Prompt and output together. Default: the context.")
    ] = None
    max_loras: Annotated[
        int | None,
        typer.Option(min=1, help="On the device at once. Default: those given."),
    ] = None  # fmt: skip
    max_lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Room for every kind up to it on every target."),
    ] = None  # fmt: skip
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Devices that share the model.")
    ] = 1
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Default: float32 on a CPU, else the checkpoint's own."),
    ] = None
    quantization: Annotated[
        Literal["int8", "int4"] | None, typer.Option(help="The base in 8 or 4 bits.")
    ] = None
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of the key/value cache; no context is longer. Default: MAX_NUM_SEQS whole ones.",
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Prompts that begin alike share that beginning.")
    ] = True
    max_logprobs: Annotated[
        int,
        typer.Option(min=0, help="Likeliest tokens that a request may ask for; 0: no logprobs."),
    ] = 20
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file in place of the model's own.")
    ] = None
    batch_invariant: Annotated[
        bool, typer.Option(help="A request's bits do not depend on its neighbours; slower.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of requests without one.")] = 0
    max_queue: Annotated[
        int | None,
        typer.Option(min=0, help="Requests that may wait. Default 4 x rows + 256."),
    ] = None  # fmt: skip
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 4 << 20
    request_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds from a request's arrival to its last token.")
    ] = 600.0
    stalled_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds that a client may take nothing of a stream.")
    ] = 30.0
    step_timeout: Annotated[
        float,
        typer.Option(min=0.001, help="Seconds after which a step of the engine is a failure."),
    ] = 300.0
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests may run on after SIGTERM.")
    ] = 30.0
    metric_adapters: Annotated[
        int, typer.Option(min=0, help="Adapters with metrics of their own; others share one name.")
    ] = 32
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="N|LEAST:MOST",
            help="Engines behind one entrance by Ray Serve (extra 'ray'), as many as the load asks for.",
        ),
    ] = None
    access_log: Annotated[bool, typer.Option(help="A line for every request.")] = False


@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serves a model and its adapters by OpenAI's HTTP API until SIGTERM or Ctrl-C."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'flora-jax[serve]'") from None
    from flora_jax.serve.http.runner import EngineHung
    from flora_jax.serve.http.server import listen
    from flora_jax.serve.http.server import serve as run

    if options.replicas is not None:
        _serve_replicas(options)
        return
    app = application(options)
    listener = listen(options.host, options.port)
    started_s = time.monotonic()
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"listening on {address}, loading {options.model}")

    def ready() -> None:
        seconds, names = time.monotonic() - started_s, ", ".join(app.state.served.names)
        number = len([*(options.adapter or ()), *(options.more or ())])
        say(f"ready after {seconds:.1f} s: {names} and {number} adapters on {address}")

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        run(
            app,
            listener,
            drain_timeout_s=options.drain_timeout,
            access_log=options.access_log,
            on_ready=ready,
        )
    except EngineHung as error:
        say(f"flora-jax: {error}")
        os._exit(1)  # An orderly end would wait for the device.


class _Parts(NamedTuple):
    """What an application is made of; read and checked without JAX."""

    settings: Settings
    adapters: Mapping[str, Path]
    opened: Opened
    engine: EngineOptions
    served: Served


def _parts(options: ServeOptions) -> _Parts:
    from flora_jax.checkpoints import open_checkpoint
    from flora_jax.serve.http.served import Served

    settings, names = _settings(options), _names(options)
    adapters = _adapters([*(options.adapter or ()), *(options.more or ())], names)
    opened = open_checkpoint(options.model)
    engine = _engine_options(options, opened)
    engine.check(opened.config)
    limits = _limits(options, opened, engine.longest(opened.config.n_positions))
    served = Served(names, options.model, limits, created=int(time.time()))
    return _Parts(settings, adapters, opened, engine, served)


def application(options: ServeOptions) -> FastAPI:
    """The application over an engine, which is made when the application starts.

    Raises:
        InputError: options that do not fit each other or the model.
    """
    from flora_jax.models.splits import tensor_mesh
    from flora_jax.serve.engine import Engine
    from flora_jax.serve.http.app import make_app
    from flora_jax.serve.http.runner import Runner

    settings, adapters, opened, engine_options, served = _parts(options)
    prepare_jax()
    mesh = tensor_mesh(opened.config, options.tensor_parallel_size, options.quantization)

    def make(report: Callable[[str, int, int], None]) -> Engine:
        dtype = dtype_of(options.dtype)
        model = opened.load(dtype, quantize=options.quantization, mesh=mesh)
        engine = Engine(model, adapters, tokenizer=opened.tokenizer, options=engine_options)
        if engine.attention_note is not None:
            say(f"prompts: attention by {engine.attention_note}")
        _warm_up(engine, report)
        return engine

    runner = Runner(
        make, options.max_num_seqs, _max_queue(options), step_timeout_s=options.step_timeout
    )
    return make_app(runner, served, settings)


def _warm_up(engine: Engine, report: Callable[[str, int, int], None]) -> None:
    """Compiles the engine's programs, and shows besides where ``report`` goes how far that is: to whoever
    started the server, minutes without a sign of life look like one that hangs.
    """
    say(f"compiling {engine.programs} programs")
    with progress("compile", engine.programs) as bar:

        def tell(name: str, done: int, total: int) -> None:
            bar.show(done, total, name)
            report(name, done, total)

        engine.warm_up(tell)


def _names(options: ServeOptions) -> tuple[str, ...]:
    """What requests call the base."""
    return tuple(dict.fromkeys(options.served_model_name or [options.model]))


def _max_queue(options: ServeOptions) -> int:
    return 4 * options.max_num_seqs + 256 if options.max_queue is None else options.max_queue


def _serve_replicas(options: ServeOptions) -> None:
    """The same by Ray Serve; each replica makes an application of these options."""
    assert options.replicas is not None
    try:
        from flora_jax.serve.http import ray as replicas
    except ImportError as error:
        raise InputError(f"--replicas needs {error.name}: pip install 'flora-jax[ray]'") from None
    least, most = replicas.scale_of(options.replicas)
    _parts(options)  # What is wrong is said before any replica starts.

    def build(gpus: float) -> Any:
        resources = {"num_cpus": 1} | ({"num_gpus": options.tensor_parallel_size} if gpus else {})
        scale = replicas.Scale(
            least, most, _names(options), options.max_body_bytes, options.max_num_seqs,
            options.max_num_seqs + _max_queue(options), resources=resources,
        )  # fmt: skip
        return replicas.replicated(functools.partial(application, options), scale)

    say(f"starting {least} replicas of at most {most}, compiling")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with replicas.running(build, options.host, options.port):
        say(f"ready: {', '.join(_names(options))} on http://{options.host}:{options.port}")
        ended.wait()


def _settings(options: ServeOptions) -> Any:
    from flora_jax.serve.http.settings import Settings

    return Settings(
        api_keys=tuple(options.api_key or ()),
        admin_keys=tuple(options.admin_key or ()),
        adapter_root=options.adapter_root,
        max_adapter_rank=options.max_lora_rank or _DEFAULT_RANK,
        max_body_bytes=options.max_body_bytes,
        request_timeout_s=options.request_timeout,
        stalled_s=options.stalled_timeout,
        metric_adapters=options.metric_adapters,
    )


# Of a decode dispatch: half of it is what an arrival waits for on average.
DECODE_S = 0.05
# Of adapters that are loaded later, where the options name none; as in vLLM.
_DEFAULT_RANK = 16


def _adapters(values: list[str], names: tuple[str, ...]) -> Mapping[str, Path]:
    """The folders by name, none of them one of the base's names."""
    from flora_jax.peft.read import describe_adapter

    found = named_adapters([_plain(value) for value in values])
    if taken := found.keys() & {*names}:
        raise InputError(f"--adapter {min(taken)}: the base has this name, choose another")
    for folder in found.values():
        describe_adapter(folder)  # What is damaged is told before anything listens.
    return found


def _plain(value: str) -> str:
    """vLLM's JSON form of an adapter as NAME=DIR."""
    if not value.lstrip().startswith("{"):
        return value
    try:
        raw = json.loads(value)
        if raw.keys() - {"name", "path", "base_model_name"}:
            raise ValueError
        return f"{raw['name']}={raw['path']}"
    except (ValueError, KeyError, AttributeError):
        raise InputError(
            f'--lora-modules is {value!r}, expected NAME=DIR or {{"name": NAME, "path": DIR}}'
        ) from None


def _limits(options: ServeOptions, opened: Opened, context: int) -> Limits:
    from flora_jax.serve.request import Limits

    config, chat = opened.config, opened.chat
    if options.chat_template is not None:
        path = options.chat_template
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"--chat-template {path}: cannot be read: {error}") from None
        chat = dataclasses.replace(chat, template=text, where=str(path))
    return Limits(context, config.vocab_size, opened.tokenizer, chat, options.max_logprobs)


def _engine_options(options: ServeOptions, opened: Opened) -> EngineOptions:
    """The engine's sizes. Room for rank R on every target is R + 1 components: HiRA has one more."""
    from flora_jax.serve.options import EngineOptions

    rank = options.max_lora_rank
    if rank is None and options.adapter_root is not None:
        rank = _DEFAULT_RANK
    reserved: dict[str, Any] = {}
    if rank is not None:
        reserved = {"max_components": rank + 1, "targets": tuple(opened.config.projections())}
    return EngineOptions(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        resident_adapters=options.max_loras,
        cache_tokens=options.cache_tokens,
        prefix_caching=options.enable_prefix_caching,
        decode_seconds=DECODE_S,
        max_logprobs=options.max_logprobs,
        batch_invariant=options.batch_invariant,
        seed=options.seed,
        **reserved,
    )
