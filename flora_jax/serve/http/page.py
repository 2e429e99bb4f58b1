"""The page at ``/``: what the server does now, and one prompt for several adapters side by side.

One file without outside resources; its script and style are named by their digests in the policy that
is sent with it, so that nothing else runs in it. What it shows comes from ``/v1/status``, which the API
key guards as all of ``/v1``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from flora_jax.serve.http.errors import responses
from flora_jax.serve.http.recent import Recent
from flora_jax.serve.http.runner import Runner, State

# Requests that are listed.
LISTED = 12


class Warming(BaseModel):
    """``done`` of ``total`` programs are compiled, ``name`` the last of them."""

    name: str
    done: int
    total: int


class AdapterPlace(BaseModel):
    """An adapter, and where it lies."""

    name: str
    state: str = Field(description="resident (on the device), host or disk")


class Ended(BaseModel):
    """A request that has ended; ``model`` is its adapter or the base. Times are in seconds."""

    model: str
    prompt_tokens: int
    tokens: int
    queued_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    outcome: str
    ago_s: float


class Status(BaseModel):
    """What the page shows; ``history`` has the output tokens of each of the last whole seconds, and
    ``recent`` the last requests that ended, the last one first.
    """

    model: str
    state: State
    warm_up: Warming
    running: int = 0
    waiting: int = 0
    rows: int
    cache_usage: float | None = None
    prefix_hit_rate: float | None = None
    tokens_per_s: float
    history: list[int]
    adapters: list[AdapterPlace] = []
    recent: list[Ended]


def read_status(runner: Runner, recent: Recent, model: str) -> Status:
    """What the page shows now; ``model`` is the base's name."""
    now = recent.now()
    ended = [
        Ended(
            model=one.adapter or model,
            prompt_tokens=one.prompt_tokens,
            tokens=one.output_tokens,
            queued_s=one.queued_s,
            ttft_s=one.time_to_first_token_s,
            tpot_s=one.time_per_output_token_s,
            e2e_s=one.latency_s,
            outcome=one.outcome,
            ago_s=now - one.ended_s,
        )
        for one in [*recent.requests][: -LISTED - 1 : -1]
    ]
    status = Status(
        model=model,
        state=runner.state,
        warm_up=Warming(**runner.warm_up._asdict()),
        rows=runner.rows,
        tokens_per_s=recent.tokens_per_s(),
        history=recent.history(),
        recent=ended,
    )
    if runner.state not in ("ready", "draining"):
        return status
    engine = runner.engine
    stats = engine.stats
    status.running, status.waiting = stats.running, stats.waiting
    status.cache_usage = stats.cache_usage
    if stats.prefix_queries:
        status.prefix_hit_rate = stats.prefix_hits / stats.prefix_queries
    status.adapters = [
        AdapterPlace(name=name, state=state) for name, state in engine.adapters.items()
    ]
    return status


def page_paths(runner: Runner, recent: Recent, model: str) -> APIRouter:
    """The page and its status; ``model`` is the base's name."""
    page, policy = read_page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """A page for people."""
        return HTMLResponse(page, headers=headers)

    @router.get("/v1/status", responses=responses(401, 500))
    async def status() -> Status:
        """What the page shows."""
        return read_status(runner, recent, model)

    return router


def read_page() -> tuple[str, str]:
    """The page, and the policy that lets its own script and style run and nothing else."""
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    script, style = (_digest(page, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _digest(page: str, tag: str) -> str:
    (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
