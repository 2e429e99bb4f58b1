"""The application: every path, and what it answers.

``make_app(runner, served, settings)`` makes it. It holds nothing of its own but ``app.state``:
``runner``, ``served``, ``settings`` and ``recent``.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from starlette.requests import Request as HttpRequest

from flora_jax import __version__
from flora_jax.serve.http import errors
from flora_jax.serve.http.adapters import adapter_paths
from flora_jax.serve.http.chat import chat_job
from flora_jax.serve.http.completions import completion_job
from flora_jax.serve.http.encoding import Json
from flora_jax.serve.http.errors import responses
from flora_jax.serve.http.jobs import answer
from flora_jax.serve.http.metrics import EngineMetrics, Metrics, metrics_path
from flora_jax.serve.http.page import page_paths
from flora_jax.serve.http.recent import Recent
from flora_jax.serve.http.runner import Runner
from flora_jax.serve.http.schemas import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    TokenizeRequest,
    TokenizeResponse,
)
from flora_jax.serve.http.security import ADMIN_PATHS, Gate, Keys, is_guarded
from flora_jax.serve.http.served import Served
from flora_jax.serve.http.settings import Settings

_ASKED = (400, 401, 404, 408, 413, 500, 503)
_GENERATED = (*_ASKED, 429, 504)
# Each event's data is a chunk, or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}}
}


def make_app(
    runner: Runner, served: Served, settings: Settings, routers: Sequence[APIRouter] = ()
) -> FastAPI:
    """The application over an engine.

    Args:
        runner: the engine's; it is started and closed with the application.
        served: the model as clients see it.
        settings: what the server allows.
        routers: further paths.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner.start()
        yield
        await runner.close()

    app = FastAPI(
        title="flora_jax", version=__version__, docs_url=None, redoc_url=None,
        redirect_slashes=False, lifespan=lifespan,
    )  # fmt: skip
    app.state.runner, app.state.served, app.state.settings = runner, served, settings
    metrics = Metrics(served.names[0], served.limits.context, settings.metric_adapters)
    metrics.registry.register(EngineMetrics(runner, served.names[0]))
    recent = app.state.recent = Recent()
    runner.observers += [metrics, recent]
    keys = Keys(settings.api_keys, settings.admin_keys)
    app.add_middleware(
        Gate, keys=keys, most_bytes=settings.max_body_bytes, timeout_s=settings.request_timeout_s
    )
    errors.install(app)
    paths = [_model_paths(runner, served), _state_paths(runner), metrics_path(metrics)]
    paths.append(page_paths(runner, recent, served.names[0]))
    if settings.adapter_root is not None:
        paths.append(
            adapter_paths(runner, served, settings.adapter_root, settings.max_adapter_rank)
        )
    for router in (*paths, *routers):
        app.include_router(router)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _model_paths(runner: Runner, served: Served) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", responses=responses(401, 500, 503))
    async def models() -> ModelList:
        """The base and its adapters."""
        return ModelList(data=served.cards(runner.engine.registry.versions()))

    @router.get("/v1/models/{model:path}", responses=responses(401, 404, 500, 503))
    async def model_card(model: str) -> ModelCard:
        """One of them."""
        name = served.adapter_of(model, runner.engine) or model
        cards = served.cards(runner.engine.registry.versions())
        return next(card for card in cards if card.id == name)

    @router.post(
        "/v1/completions", response_model=Completion, responses=responses(*_GENERATED) | _STREAM
    )
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continues prompts."""
        job = await completion_job(body, runner, served)
        return await answer(job, runner, http, bool(body.stream))

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=responses(*_GENERATED) | _STREAM,
    )
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        """Continues a conversation."""
        job = await chat_job(body, runner, served)
        return await answer(job, runner, http, bool(body.stream))

    @router.post("/tokenize", responses=responses(*_ASKED))
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a text, or of a conversation."""
        if (body.prompt is None) == (body.messages is None):
            raise errors.invalid("expected one of prompt and messages", "prompt")
        if body.prompt is not None:
            ids = await served.encode(body.prompt, body.add_special_tokens)
        else:
            assert body.messages is not None
            ids = await served.encode_messages(body.messages, body.add_generation_prompt)
        return TokenizeResponse(
            count=len(ids),
            max_model_len=served.limits.context,
            tokens=list(ids),
            token_strs=[served.texts.text(token) for token in ids]
            if body.return_token_strs
            else None,
        )

    @router.post("/detokenize", responses=responses(*_ASKED))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of tokens."""
        if served.limits.tokenizer is None:
            raise errors.invalid("the checkpoint has no tokenizer.json, so tokens have no text")
        size = served.limits.vocab_size
        unknown = [token for token in body.tokens if token >= size]
        if unknown:
            raise errors.invalid(f"tokens has {unknown[0]}, expected below {size}", "tokens")
        return DetokenizeResponse(prompt=served.decode(body.tokens, with_special=True))

    return router


def _state_paths(runner: Runner) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether the engine works; also while it starts."""
        if runner.state != "failed":
            return Json(Health(status="ok").model_dump())
        found = Health(status="failed", error=type(runner.error).__name__)
        return Json(found.model_dump(), 503)

    @router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
    async def ready() -> Response:
        """Whether requests are taken, and how far the start is."""
        found = Readiness(status=runner.state)
        if runner.state == "starting":
            name, done, total = runner.warm_up
            found = Readiness(status=runner.state, name=name, done=done, total=total)
        return Json(found.model_dump(), 200 if runner.state == "ready" else 503)

    return router


def _described(app: FastAPI) -> dict[str, Any]:
    """The description, with keys, and without the framework's own errors, which are never answered."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    settings: Settings = app.state.settings
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in ADMIN_PATHS or (settings.api_keys and is_guarded(path)):
                operation["security"] = [{"key": []}]
    for name, example in _examples(app.state.served.names[0]).items():
        schemas[name]["examples"] = [example]
        for field, value in example.items():
            schemas[name]["properties"][field]["examples"] = [value]
    app.openapi_schema = found
    return found


def _examples(model: str) -> dict[str, dict[str, Any]]:
    """Requests that this server answers, by the names of their schemas."""
    message = {"role": "user", "content": "Hello"}
    return {
        "CompletionRequest": {"model": model, "prompt": "def f(", "max_tokens": 4},
        "ChatRequest": {"model": model, "messages": [message], "max_tokens": 4},
        "TokenizeRequest": {"prompt": "def f("},
        "DetokenizeRequest": {"tokens": [1, 2]},
    }
