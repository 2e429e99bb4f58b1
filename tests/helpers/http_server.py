"""A server in a thread of this process, over an engine that the test makes."""

import contextlib
import json
import threading
import urllib.request

import uvicorn

from flora_jax.serve.http.app import make_app
from flora_jax.serve.http.page import page_router
from flora_jax.serve.http.runner import Runner
from flora_jax.serve.http.served import Served
from flora_jax.serve.http.server import Server, listen
from flora_jax.serve.http.settings import Settings
from flora_jax.serve.request import Limits


class Running:
    """Where it listens, and how to ask it."""

    def __init__(self, url, runner, key=None):
        self.url, self.runner, self.key = url, runner, key

    def ask(self, path, body=None):
        """The JSON of an answer."""
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def running(engine, name="base", api_key=None):
    """Serves an engine that is warmed up, with the page, until the end; closes it."""
    limits = Limits(engine.max_model_len, engine.config.vocab_size, engine.tokenizer)
    runner = Runner(lambda report: engine, engine.options.max_num_seqs, 16)
    settings = Settings(api_keys=(api_key,) if api_key else ())
    served = Served((name,), name, limits)
    app = make_app(runner, served, settings, [page_router(runner, name)])
    ready = threading.Event()
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none")
    server = Server(config, runner, 5.0, ready.set)
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(60)
            yield Running(f"http://127.0.0.1:{port}", runner, api_key)
        finally:
            server.should_exit = True
            thread.join()
