"""Adapters that are loaded through one replica and used through another: no Ray is needed for that."""

import asyncio
import json

import pytest

from flora_jax.serve.http.calls import Call
from flora_jax.serve.http.changes import Changes, Replay

BASE = Call("POST", "/v1/completions", b"", [], b'{"model": "base"}')
LIST = Call("GET", "/v1/models", b"", [], b"")


class Application:
    """Knows adapters and where they come from; ``status`` is its answer to changes while it is set, and
    those of a name in ``slow`` wait.
    """

    def __init__(self):
        self.known, self.status, self.changes, self.slow = {}, None, [], {}

    async def __call__(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        self.changes.append((scope["path"].split("/")[2].split("_")[0], body["lora_name"]))
        if body["lora_name"] in self.slow:
            await self.slow[body["lora_name"]].wait()
        status = self.status or self.change(scope["path"], **body)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def change(self, path, lora_name, lora_path=None, load_inplace=False):
        if path == "/v1/unload_lora_adapter":
            return 200 if self.known.pop(lora_name, None) else 404
        if lora_name in self.known and not load_inplace:
            return 400
        self.known[lora_name] = lora_path
        return 200


def load(folder, name="x", **more):
    body = json.dumps({"lora_name": name, "lora_path": folder} | more).encode()
    headers = [(b"Content-Length", str(len(body)).encode()), (b"authorization", b"Bearer admin")]
    return Call("POST", "/v1/load_lora_adapter", b"", headers, body, changes=name)


def unload(name="x"):
    body = json.dumps({"lora_name": name}).encode()
    return Call("POST", "/v1/unload_lora_adapter", b"", [], body, changes=name)


def use(name="x"):
    return BASE._replace(body=json.dumps({"model": name}).encode(), adapter=name)


class Replicas:
    """An entrance and two replicas."""

    def __init__(self):
        self.entrance = Changes()
        self.apps = [Application(), Application()]
        self.replays = [Replay(app) for app in self.apps]

    async def change(self, place, call):
        """Through one of them; the answer's status."""

        async def ask(call):
            await self.replays[place].catch_up(call, self.entrance.last())
            head, *parts = await self.replays[place].change(call)
            return head, parts

        head, _ = await self.entrance.through(ask, call)
        return head.status

    async def ask(self, place, call):
        await self.replays[place].catch_up(call, self.entrance.last())


def run(test):
    """Calls a test with replicas, on a loop."""

    def made():
        async def within():
            await asyncio.wait_for(test(Replicas()), 20)

        asyncio.run(within())

    made.__name__, made.__doc__ = test.__name__, test.__doc__
    return made


@run
async def test_a_reload_of_the_same_name_and_folder_is_done_by_every_replica(replicas):
    again = load("folder", load_inplace=True)
    for number in (1, 2):
        assert await replicas.change(0, again) == 200
        await replicas.ask(1, use())
        await replicas.ask(1, use())
        assert len(replicas.apps[1].changes) == number
    await replicas.ask(0, use())
    assert len(replicas.apps[0].changes) == 2


@run
async def test_an_unload_and_a_load_without_a_request_between_replace_what_others_have(replicas):
    assert await replicas.change(0, load("first")) == 200
    await replicas.ask(1, use())
    assert replicas.apps[1].known == {"x": "first"}
    assert await replicas.change(0, unload()) == 200
    assert await replicas.change(0, load("second")) == 200
    await replicas.ask(1, use())
    assert replicas.apps[1].known == {"x": "second"}
    assert [name for name, _ in replicas.entrance.last()["x"].headers] == [b"authorization"]


@run
async def test_a_replica_that_could_not_load_tries_again(replicas):
    assert await replicas.change(0, load("folder")) == 200
    replicas.apps[1].status = 503
    await replicas.ask(1, use())
    assert not replicas.apps[1].known
    replicas.apps[1].status = None
    await replicas.ask(1, use())
    assert replicas.apps[1].known == {"x": "folder"}


@run
async def test_an_unload_of_what_a_replica_never_had_is_done(replicas):
    assert await replicas.change(0, load("folder")) == 200
    assert await replicas.change(0, unload()) == 200
    await replicas.ask(1, use())
    await replicas.ask(1, use())
    assert replicas.apps[1].changes == [("unload", "x")]


@run
async def test_only_who_asks_for_an_adapter_waits_for_its_load(replicas):
    assert await replicas.change(0, load("folder")) == 200
    assert await replicas.change(0, load("other", "y")) == 200
    slow = replicas.apps[1].slow["x"] = asyncio.Event()
    waiting = [asyncio.create_task(replicas.ask(1, call)) for call in (use(), LIST)]
    await asyncio.wait_for(replicas.ask(1, BASE), 1)
    await asyncio.wait_for(replicas.ask(1, use("y")), 1)
    assert replicas.apps[1].known == {"y": "other"}
    assert not any(task.done() for task in waiting)
    slow.set()
    await asyncio.gather(*waiting)
    assert replicas.apps[1].known == {"x": "folder", "y": "other"}
    assert sorted(replicas.apps[1].changes) == [("load", "x"), ("load", "y")]


@run
async def test_what_nobody_asks_for_is_done_beside_other_requests(replicas):
    assert await replicas.change(0, load("folder")) == 200
    await replicas.ask(1, BASE)
    while not replicas.apps[1].known:
        await asyncio.sleep(0)


@run
async def test_a_change_meets_what_was_changed_before_it(replicas):
    """Of two loads of one new name through two replicas at the same time, one is refused."""
    both = [replicas.change(place, load(str(place))) for place in (0, 1)]
    assert sorted(await asyncio.gather(*both)) == [200, 400]
    await replicas.ask(0, use())
    await replicas.ask(1, use())
    assert replicas.apps[0].known == replicas.apps[1].known
    assert await replicas.change(1, unload()) == 200
    await replicas.ask(0, use())
    assert not replicas.apps[0].known


@pytest.mark.parametrize("status", [400, 401, 503])
def test_a_change_that_is_refused_is_not_remembered(status):
    async def refused():
        replicas = Replicas()
        replicas.apps[0].status = status
        assert await replicas.change(0, load("folder")) == status
        assert not replicas.entrance.last()

    asyncio.run(refused())


@run
async def test_a_change_is_done_by_all_also_when_who_asked_for_it_goes_away(replicas):
    replicas.apps[0].slow["x"] = asyncio.Event()
    asked = asyncio.create_task(replicas.change(0, load("folder")))
    while not replicas.apps[0].changes:
        await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    replicas.apps[0].slow["x"].set()
    while not replicas.entrance.last():
        await asyncio.sleep(0)
    await replicas.ask(1, use())
    assert replicas.apps[0].known == replicas.apps[1].known == {"x": "folder"}


@run
async def test_replicas_do_what_a_new_entrance_says(replicas):
    for folder in ("first", "second"):
        assert await replicas.change(0, load(folder)) == 200
        await replicas.ask(1, use())
        assert replicas.apps[1].known == {"x": folder}
        assert await replicas.change(1, unload()) == 200
        await replicas.ask(0, use())
        replicas.entrance = Changes()
