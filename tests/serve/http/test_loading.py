"""Adapters that are loaded and unloaded at the same time."""

import asyncio
import time

import httpx
import pytest

from flora_jax.errors import InputError
from flora_jax.peft.write import write_adapter
from flora_jax.serve.http import adapters
from flora_jax.serve.http.settings import Settings
from tests.helpers.http_server import (
    CONFIG,
    RANK,
    TARGETS,
    ScriptedEngine,
    in_background,
    running,
    until,
)
from tests.helpers.random_adapters import random_adapter

ADMIN = {"Authorization": "Bearer admin"}


class FullEngine(ScriptedEngine):
    """One without room for ``full``, whose next placements fail so many times."""

    def __init__(self):
        super().__init__()
        self.full, self.failures = set(), 0

    def try_preload(self, name):
        if name in self.full:
            return False
        if self.failures:
            self.failures -= 1
            raise InputError(f"adapter {name!r}: does not fit")
        return super().try_preload(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for seed, folder in enumerate(("first", "second", "third")):
        adapter = random_adapter("lora", seed, CONFIG.projections(), 2, rank=RANK, targets=TARGETS)
        write_adapter(adapter, root / folder)
    return root


@pytest.fixture
def server(root):
    engine = FullEngine()
    settings = Settings(admin_keys=("admin",), adapter_root=root, max_adapter_rank=RANK)
    with running(lambda report: engine, settings=settings) as server:
        server.scripted = engine
        yield server


def admin(server, what, **body):
    with server.client(headers=ADMIN) as client:
        return client.post(f"/v1/{what}_lora_adapter", json=body)


def load(server, folder, name="x", **more):
    return admin(server, "load", lora_name=name, lora_path=folder, **more)


def folder_of(server, name="x"):
    known = {one.name: one.source.name for one in server.scripted.registry.versions()}
    return known.get(name)


def test_one_of_two_loads_of_a_new_name_is_refused(server, monkeypatch):
    check_folder = adapters.check_folder

    def slowly(*arguments):
        time.sleep(0.1)
        return check_folder(*arguments)

    monkeypatch.setattr(adapters, "check_folder", slowly)

    async def both():
        async with httpx.AsyncClient(base_url=server.url, timeout=60, headers=ADMIN) as client:
            bodies = [{"lora_name": "x", "lora_path": one} for one in ("first", "second")]
            posts = [client.post("/v1/load_lora_adapter", json=body) for body in bodies]
            return await asyncio.gather(*posts)

    found = asyncio.run(both())
    assert sorted(one.status_code for one in found) == [200, 400]
    loaded, refused = sorted(found, key=lambda one: one.status_code)
    assert refused.json()["error"]["code"] == "already_loaded"
    assert folder_of(server) == ("first", "second")[found.index(loaded)]


def failing_replacement(server):
    """The adapter x, and a replacement on its way that will not fit."""
    assert load(server, "first").status_code == 200
    server.scripted.full.add("x")
    server.scripted.failures = 1
    failing = in_background(load, server, "second", load_inplace=True)
    until(lambda: folder_of(server) == "second")
    return failing


def test_a_replacement_that_fails_leaves_a_later_one(server):
    first, failed = failing_replacement(server)
    second, replaced = in_background(load, server, "third", load_inplace=True)
    time.sleep(0.2)
    server.scripted.full.clear()
    first.join(20)
    second.join(20)
    assert (failed[0].status_code, replaced[0].status_code) == (400, 200)
    assert folder_of(server) == "third"


def test_a_replacement_that_fails_brings_back_nothing_that_was_unloaded(server):
    first, failed = failing_replacement(server)
    second, unloaded = in_background(admin, server, "unload", lora_name="x")
    time.sleep(0.2)
    server.scripted.full.clear()
    first.join(20)
    second.join(20)
    assert (failed[0].status_code, unloaded[0].status_code) == (400, 200)
    assert folder_of(server) is None


def test_other_names_do_not_wait_for_a_load(server):
    server.scripted.full.add("x")
    waiting, _ = in_background(load, server, "first")
    until(lambda: folder_of(server) == "first")
    assert load(server, "second", "y").status_code == 200
    assert admin(server, "unload", lora_name="y").status_code == 200
    assert waiting.is_alive()
    server.scripted.full.clear()
    waiting.join(20)
