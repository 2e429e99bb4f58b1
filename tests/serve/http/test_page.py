"""The page at /: what it shows, and one prompt under two adapters at once, in a real browser.

The server's engine says what it is told to. ``FLORA_JAX_SCREENSHOT=docs/assets/page.png pytest
tests/serve/http/test_page.py -k side_by_side`` takes the embedded model, and keeps the picture.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from flora_jax.checkpoints import open_checkpoint
from flora_jax.serve.engine import Engine
from flora_jax.serve.http import page
from flora_jax.serve.http.recent import Recent
from flora_jax.serve.http.runner import Timing, WarmUp
from flora_jax.serve.http.served import Served
from flora_jax.serve.http.settings import Settings
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.updates import Stats
from flora_jax.shipped import ASSETS
from tests.helpers.http_server import ScriptedEngine, running, small_served, until
from tests.helpers.requests import make_request

CHROMIUM = Path("/usr/bin/chromium")
SCREENSHOT = os.environ.get("FLORA_JAX_SCREENSHOT")
HOSTILE = "<img src=x onerror=window.broken=1>"


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def test_tokens_are_counted_by_whole_seconds():
    clock = Clock()
    recent = Recent(window_s=60, now=clock)
    for now, tokens in ((1000.1, 3), (1000.9, 4), (1002.0, 5)):
        clock.now = now
        recent.progressed(None, tokens, 0.1)
    # The second that has not ended is left out.
    assert recent.history() == [0] * 58 + [7, 0]
    clock.now = 1003.5
    assert recent.history() == [0] * 57 + [7, 0, 5]
    assert recent.tokens_per_s(2) == 2.5
    clock.now = 1000.0 + 60
    assert recent.history()[:3] == [7, 0, 5]
    for second in range(1100, 1300):
        clock.now = second
        recent.progressed(None, 1, 0.1)
    clock.now += 1
    assert recent.history() == [1] * 60
    assert recent.tokens_per_s() == 1.0


def fake_runner(state="ready"):
    stats = Stats(2, 1, 0, 0, 0, 0.25, 100, 40)
    engine = SimpleNamespace(stats=stats, adapters={"b": "resident", "a": "disk"})
    return SimpleNamespace(rows=4, state=state, engine=engine, warm_up=WarmUp("decode", 3, 9))


@pytest.fixture
def client():
    def make(recent=None, **given):
        app = FastAPI()
        app.include_router(page.page_paths(fake_runner(**given), recent or Recent(), "base"))
        return TestClient(app)

    return make


def test_the_last_requests_come_first_and_no_more_than_fit(client):
    clock = Clock()
    recent = Recent(now=clock)
    for number in range(page.LISTED + 3):
        adapter = "x" if number % 2 else None
        timing = Timing(make_request(number, (1, 2), adapter), 0.0, 0.5, 1.5, 5, 0.25)
        clock.now += 1
        recent.ended(timing, "length", 2.0)
    clock.now += 3
    found = client(recent).get("/v1/status").json()["recent"]
    assert len(found) == page.LISTED
    assert [one["ago_s"] for one in found[:3]] == [3.0, 4.0, 5.0]
    assert [one["model"] for one in found[:2]] == ["base", "x"]
    assert found[0] == {
        "model": "base", "prompt_tokens": 2, "tokens": 5, "queued_s": 0.25, "ttft_s": 0.5,
        "tpot_s": 0.25, "e2e_s": 2.0, "outcome": "length", "ago_s": 3.0,
    }  # fmt: skip


def test_the_status_says_what_runs_and_where_adapters_lie(client):
    found = client().get("/v1/status").json()
    assert (found["running"], found["waiting"], found["rows"]) == (2, 1, 4)
    assert (found["cache_usage"], found["prefix_hit_rate"]) == (0.25, 0.4)
    assert found["adapters"] == [{"name": "b", "state": "resident"}, {"name": "a", "state": "disk"}]
    starting = client(state="starting").get("/v1/status").json()
    assert starting["warm_up"] == {"name": "decode", "done": 3, "total": 9}
    assert (starting["running"], starting["adapters"]) == (0, [])


def test_the_policy_lets_nothing_but_the_pages_own_script_and_style_run(client):
    answer = client().get("/")
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]+'", policy[kind])
    assert answer.headers["x-content-type-options"] == "nosniff"
    # Nothing comes from elsewhere, and nothing makes markup of text.
    assert "://" not in answer.text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in answer.text
    assert not re.search(r"<[^>]+ on\w+=", answer.text)


# In a browser.


class Speaker(ScriptedEngine):
    """Each adapter says something else, some of it markup."""

    def script_of(self, request):
        return f"<b>{request.adapter}</b> &amp;\n".encode()


def scripted():
    """Says what it is told to; one of its adapters has a name for browsers to trip over."""
    engine = Speaker(rows=4, steps_per_s=100)
    for name in ("perl", "ruby", HOSTILE):
        engine.register(name, ASSETS / "adapters/flora/perl")
    return engine, small_served(), 4


def embedded():
    """The embedded model, with its adapters, of which half are resident."""
    opened = open_checkpoint("mini")
    folders = {folder.name: folder for folder in sorted((ASSETS / "adapters/flora").iterdir())}
    options = EngineOptions(max_num_seqs=16, resident_adapters=4)
    model = opened.load("float32")
    engine = Engine(model, folders, tokenizer=opened.tokenizer, options=options)
    engine.warm_up()
    return engine, Served(("mini",), "mini", engine.limits), 16


@pytest.fixture(scope="module")
def server():
    engine, served, rows = embedded() if SCREENSHOT else scripted()
    settings = Settings(api_keys=("the key",))
    with running(lambda report: engine, served, settings, rows=rows) as server:
        server.base = served.names[0]
        with server.client(headers={"Authorization": "Bearer the key"}) as client:
            server.ask = lambda path, body: client.post(path, json=body).json()
            yield server


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is absent: the page is tested in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is absent")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, server):
    """The page, past the question for the key; what it complains of and asks for is written down."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, device_scale_factor=1)
    tab = context.new_page()
    tab.complaints, tab.asked = [], []
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(server.url)
    yield tab
    context.close()


def give_key(tab, key="the key"):
    tab.get_by_label("API key").fill(key)
    tab.get_by_role("button", name="Use key").click()


def ready(tab):
    tab.locator("#state[data-state=ready]").wait_for()


def tick(tab, *names):
    for box in tab.locator("#adapters input").all():
        box.set_checked(box.get_attribute("value") in names)


def test_one_prompt_streams_under_two_adapters_side_by_side(tab, server, tmp_path):
    give_key(tab)
    ready(tab)
    prompt, tokens = ("read_file(", 96) if SCREENSHOT else ("sub", 24)
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.5, "seed": 1}
    if SCREENSHOT:  # Something has happened before.
        for name in ("lua", "perl", "racket", "ruby", "rust", server.base):
            server.ask("/v1/completions", {"model": name, **asked})
    names = ("perl", "ruby")
    tick(tab, *names)
    tab.get_by_label("One prompt, every ticked adapter").fill(prompt)
    for label, value in (("tokens", tokens), ("temperature", 0.5), ("seed", 1)):
        tab.get_by_label(label, exact=True).fill(str(value))
    tab.get_by_role("button", name="Send").click()
    for name in names:
        card = tab.locator(f".answer[data-model='{name}'][data-state=done]")
        card.wait_for()
        expected = server.ask("/v1/completions", {"model": name, **asked})
        assert card.locator("pre").text_content() == expected["choices"][0]["text"]
        told = card.locator("header span").text_content()
        assert f"{expected['usage']['completion_tokens']} tokens" in told
    assert tab.locator(".answer").count() == 2
    until(lambda: {*tab.locator("#recent tr td:first-child").all_text_contents()[:4]} == {*names})
    assert tab.locator("#rate").text_content() != "–"
    picture = Path(SCREENSHOT) if SCREENSHOT else tmp_path / "page.png"
    tab.screenshot(path=picture, full_page=True)
    assert 10_000 < picture.stat().st_size < 200_000
    # One refused question, for which the key was then asked; nothing else went wrong.
    assert [text for text in tab.complaints if "401" not in text] == []
    assert {url.split("/")[2] for url in tab.asked} == {server.url.split("/")[2]}


def test_a_key_is_asked_for_and_a_wrong_one_is_refused(tab, server):
    note = tab.get_by_text("The server refuses this key.")
    tab.get_by_label("API key").wait_for()
    assert not note.is_visible()
    give_key(tab, "another")
    note.wait_for()
    give_key(tab)
    ready(tab)
    assert not tab.get_by_label("API key").is_visible()
    # It is in no storage of the browser's: a new visit asks again.
    assert tab.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]
    tab.reload()
    tab.get_by_label("API key").wait_for()


@pytest.mark.skipif(SCREENSHOT is not None, reason="the embedded model has no such adapter")
def test_names_are_text_and_never_markup(tab):
    give_key(tab)
    ready(tab)
    assert tab.get_by_text(HOSTILE, exact=True).count() == 1
    tick(tab, HOSTILE)
    tab.get_by_label("tokens", exact=True).fill("3")
    tab.get_by_role("button", name="Send").click()
    tab.locator(".answer[data-state=done] h3").wait_for()
    assert tab.locator(".answer h3").text_content() == HOSTILE
    tab.get_by_role("cell", name=HOSTILE).first.wait_for()
    assert tab.locator("img").count() == 0
    assert tab.evaluate("window.broken") is None


def test_what_the_server_refuses_is_shown_where_the_answer_would_be(tab, server):
    give_key(tab)
    ready(tab)
    tick(tab, "perl")
    tab.get_by_label("One prompt, every ticked adapter").fill("x" * 5000)
    tab.get_by_role("button", name="Send").click()
    card = tab.locator(".answer[data-state=failed]")
    card.wait_for()
    refused = server.ask(
        "/v1/completions", {"model": "perl", "prompt": "x" * 5000, "max_tokens": 64}
    )
    assert card.locator("pre").text_content() == refused["error"]["message"]
    tick(tab)
    tab.get_by_role("button", name="Send").click()
    tab.get_by_text("Tick the base or an adapter.").wait_for()


def test_the_filter_hides_what_it_does_not_name(tab):
    give_key(tab)
    ready(tab)
    tab.get_by_label("Filter adapters by name").fill("PER")
    shown = [row.text_content() for row in tab.locator("#adapters li:visible").all()]
    assert len(shown) == 1
    assert shown[0].startswith("perl")


def test_light_and_dark_follow_the_reader(tab):
    grounds = []
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        ink = tab.evaluate("getComputedStyle(document.body).color")
        assert contrast(grounds[-1], ink) > 7
        soft = tab.evaluate("getComputedStyle(document.querySelector('h2')).color")
        panel = tab.evaluate("getComputedStyle(document.querySelector('.panel')).backgroundColor")
        assert contrast(panel, soft) > 4.5
    assert grounds[0] != grounds[1]


def contrast(first, second):
    """WCAG's contrast ratio of two colours as ``rgb(r, g, b)``."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    light, dark = sorted(map(luminance, (first, second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
