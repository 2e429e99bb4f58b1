"""The page at ``/``: what the server does now, and one prompt for several adapters side by side.

One file without outside resources; its script and style are named by their digests in the policy that
is sent with it, so that nothing else runs in it. What it shows comes from ``/v1/status``, which the API
key guards as all of ``/v1``.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import re
import time
from collections.abc import Callable
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from flora_jax.serve.http.errors import responses
from flora_jax.serve.http.runner import Outcome, Runner, State, Timing
from pydantic import BaseModel, Field

from flora_jax.serve.request import Request

# Requests that are listed, and seconds whose tokens are.
RECENT, HISTORY_S = 12, 60
# Seconds that the present rate is the mean of.
_RATE_S = 5


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


class Activity:
    """What requests did lately: an observer of the runner's.

    Args:
        model: the base's name.
        now: a clock, in seconds.
    """

    def __init__(self, model: str, now: Callable[[], float] = time.monotonic) -> None:
        self.model, self._now = model, now
        self._seconds: collections.deque[list[int]] = collections.deque(maxlen=HISTORY_S + 1)
        self._ended: collections.deque[tuple[Ended, float]] = collections.deque(maxlen=RECENT)

    def arrived(self, timing: Timing) -> None:
        """Nothing that the page shows."""

    def refused(self, request: Request) -> None:
        """Nothing that the page shows."""

    def began(self, timing: Timing) -> None:
        """Nothing that the page shows."""

    def progressed(self, timing: Timing, tokens: int, gap_s: float) -> None:
        second = int(self._now())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0])
        self._seconds[-1][1] += tokens

    def ended(self, timing: Timing, outcome: Outcome, seconds: float) -> None:
        one = Ended(
            model=timing.request.adapter or self.model,
            prompt_tokens=len(timing.request.prompt_token_ids),
            tokens=timing.tokens,
            queued_s=timing.queued_s,
            ttft_s=timing.time_to_first_token_s,
            tpot_s=timing.time_per_output_token_s,
            e2e_s=seconds,
            outcome=outcome,
            ago_s=0.0,
        )
        self._ended.appendleft((one, self._now()))

    def history(self) -> list[int]:
        """Output tokens of each of the last whole seconds, ``HISTORY_S`` of them, the oldest first."""
        now, counts = int(self._now()), dict(map(tuple, self._seconds))
        return [counts.get(second, 0) for second in range(now - HISTORY_S, now)]

    def recent(self) -> list[Ended]:
        """The last requests that ended, the last one first."""
        now = self._now()
        return [one.model_copy(update={"ago_s": now - at}) for one, at in self._ended]


def read_status(runner: Runner, activity: Activity) -> Status:
    """What the page shows now."""
    history = activity.history()
    status = Status(
        model=activity.model,
        state=runner.state,
        warm_up=Warming(**runner.warm_up._asdict()),
        rows=runner.rows,
        tokens_per_s=sum(history[-_RATE_S:]) / _RATE_S,
        history=history,
        recent=activity.recent(),
    )
    if runner.state not in ("ready", "draining"):
        return status
    engine = runner.engine
    stats = engine.stats
    places = [AdapterPlace(name=name, state=state) for name, state in engine.adapters.items()]
    queries = stats.prefix_queries
    return status.model_copy(
        update={
            "running": stats.running,
            "waiting": stats.waiting,
            "cache_usage": stats.cache_usage,
            "prefix_hit_rate": stats.prefix_hits / queries if queries else None,
            "adapters": places,
        }
    )


def page_router(runner: Runner, model: str) -> APIRouter:
    """The page and its status; observes the runner from now on. ``model`` is the base's name."""
    activity = Activity(model)
    runner.observers.append(activity)
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
        return read_status(runner, activity)

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
