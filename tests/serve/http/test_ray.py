"""Two replicas on one machine by Ray Serve: where requests go, and what a killed replica costs."""

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import threading
import time
import warnings
from pathlib import Path

import httpx
import pytest

from flora_jax.checkpoints.checkpoint import save_hf
from flora_jax.errors import InputError
from flora_jax.models.model import init_model
from flora_jax.peft.write import write_adapter
from tests.helpers.http_server import CONFIG, adapters, tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, of what it stands on.
    ray = pytest.importorskip("ray")
    from ray import serve

    from flora_jax.cli.serve import ServeOptions, application
    from flora_jax.serve.http.ray import Call, Scale, answered, replicated, running, scale_of

pytestmark = pytest.mark.filterwarnings("ignore")
ADMIN = {"Authorization": "Bearer admin"}


def free_port():
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return own.getsockname()[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("ray")
    save_hf(init_model(CONFIG, 5), home / "model")
    tokenizer().save(str(home / "model" / "tokenizer.json"))
    for kind, adapter in adapters().items():
        write_adapter(adapter, home / "adapters" / kind)
    return home


@pytest.fixture(scope="module")
def address(home):
    options = ServeOptions(
        str(home / "model"), served_model_name=["base"], adapter=[f"lora={home}/adapters/lora"],
        admin_key=["admin"], adapter_root=home / "adapters", max_num_seqs=2, max_lora_rank=2,
        max_logprobs=0, max_model_len=64, batch_invariant=True,
    )  # fmt: skip
    scale = Scale(2, 2, ("base",), busy=2, resources={"num_cpus": 0})
    make, port = functools.partial(application, options), free_port()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with running(lambda gpus: replicated(make, scale), "127.0.0.1", port):
            yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()


def ask(address, model="base", seed=1, **more):
    body = {"model": model, "prompt": "ab", "max_tokens": 8, "seed": seed, "temperature": 1} | more
    return httpx.post(f"{address}/v1/completions", json=body, timeout=120)


def processes():
    """Of the engines' replicas, by the names that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # It ended meanwhile.
            if path.read_bytes().startswith(b"ray::ServeReplica:flora_jax:engine"):
                found.append(int(path.parent.name))
    return sorted(found)


def test_what_one_replica_would_answer_comes_back(address):
    assert httpx.get(f"{address}/ready").json()["status"] == "ready"
    answers = {ask(address, model).json()["choices"][0]["text"] for model in ("base", "base")}
    assert len(answers) == 1
    unknown = ask(address, "nothing")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    with httpx.stream(
        "POST", f"{address}/v1/completions", timeout=60,
        json={"model": "base:lora", "prompt": "ab", "max_tokens": 4, "stream": True},
    ) as answer:  # fmt: skip
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_what_is_loaded_over_http_is_known_to_every_replica(address):
    body = {"lora_name": "mine", "lora_path": "flora"}
    loaded = httpx.post(f"{address}/v1/load_lora_adapter", json=body, headers=ADMIN, timeout=60)
    assert loaded.status_code == 200, loaded.text
    # Many at once, so that both replicas have some.
    found = together([functools.partial(ask, address, "mine") for _ in range(8)])
    assert {answer.status_code for answer in found} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in found}) == 1


def together(calls):
    found = [None] * len(calls)

    def run(place, call):
        found[place] = call()

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_killed_replica_costs_nothing_but_its_running_requests(address):
    """Those are sent to the other one, or answered 503; later ones do not notice."""
    expected = ask(address, seed=7, max_tokens=40).json()["choices"][0]["text"]
    before = processes()
    assert len(before) == 2
    calls = [functools.partial(ask, address, seed=7, max_tokens=40) for _ in range(24)]
    killer = threading.Timer(0.1, os.kill, (before[0], signal.SIGKILL))
    killer.start()
    found = together(calls)
    assert {answer.status_code for answer in found} <= {200, 503}
    assert sum(answer.status_code == 200 for answer in found) >= 12
    for answer in found:
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected
        else:
            assert json.loads(answer.text)["error"]["code"] == "unavailable"
    assert ask(address, seed=7, max_tokens=40).json()["choices"][0]["text"] == expected
    end = time.monotonic() + 120
    while len(after := processes()) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)
    assert before[0] not in after


def test_numbers_of_replicas():
    assert scale_of("3") == (3, 3)
    assert scale_of("1:4") == (1, 4)
    for text in ("", "a", "1:", ":2", "-1", "1:2:3"):
        with pytest.raises(InputError, match="expected N or LEAST:MOST"):
            scale_of(text)
    with pytest.raises(InputError, match="most is 1, expected at least 2"):
        Scale(2, 1)


def test_what_waits_at_the_entrance_is_bounded(monkeypatch):
    made = {}

    def noted(*arguments, **options):
        made[options["name"]] = deployment(*arguments, **options)
        return made[options["name"]]

    deployment = serve.deployment
    monkeypatch.setattr(serve, "deployment", noted)
    replicated(lambda: None, Scale(1, 3, open_requests=20))
    engine, entrance = made["engine"], made["entrance"]
    assert (engine.max_ongoing_requests, engine.max_queued_requests) == (20, 60)
    # Else requests would wait without an end before it.
    assert entrance.max_ongoing_requests > 3 * 20 + 60


def test_a_models_name_says_which_adapter_is_meant():
    scale = Scale(names=("base", "other"))
    named = ("base", "other:mine", "mine", "base:a:b", None, 3)
    assert [scale.adapter_of(one) for one in named] == ["", "mine", "mine", "a:b", "", ""]


def test_a_client_that_goes_away_is_a_disconnect():
    seen = []

    async def app(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        seen.append((await receive())["type"])

    async def leave():
        parts = answered(app, Call("POST", "/", b"", [], b"body"))
        head = await anext(parts)
        assert head.status == 200
        assert await anext(parts) == b"a"
        await parts.aclose()
        await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert seen == [b"body", "http.disconnect"]
