"""HTTP servers for tests: over a small real engine, or over one that does what it is told."""

import contextlib
import dataclasses
import threading
import time

import httpx

from flora_jax.checkpoints.chat import Chat
from flora_jax.errors import InputError
from flora_jax.models.model import init_model
from flora_jax.models.starcoder.config import StarCoderConfig
from flora_jax.serve.engine import Engine
from flora_jax.serve.http.app import make_app
from flora_jax.serve.http.runner import Runner
from flora_jax.serve.http.served import Served
from flora_jax.serve.http.server import Server, listen, serve
from flora_jax.serve.http.settings import Settings
from flora_jax.serve.options import EngineOptions
from flora_jax.serve.registry import Registry
from flora_jax.serve.request import Completion, Limits
from flora_jax.serve.updates import Stats, Update
from tests.helpers.byte_tokenizer import (
    CHAT_TEMPLATE,
    END,
    TURN,
    TURN_END,
    byte_tokenizer,
)
from tests.helpers.random_adapters import random_adapter

FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
CONFIG = StarCoderConfig(
    vocab_size=264, n_positions=96, n_embd=16, n_layer=2, n_head=2, n_inner=32,
    eos_token_ids=(0,), initializer_range=0.4,
)  # fmt: skip
TARGETS = ("attn.c_attn", "mlp.c_proj")
KINDS = ("lora", "flora", "ia3", "hira", "dora")
MAX_LOGPROBS = 3
RANK = 2
OPTIONS = EngineOptions(
    max_num_seqs=4, max_num_batched_tokens=40, chunk=8, prefill_chunks=2, block_size=4,
    decode_steps=4, resident_adapters=4, max_components=RANK + 1, targets=TARGETS,
    batch_invariant=True, max_logprobs=MAX_LOGPROBS,
)  # fmt: skip


def tokenizer():
    """One piece a byte, tokens for chats and for filling in."""
    made = byte_tokenizer()
    made.add_special_tokens([TURN, TURN_END, *FIM])
    return made


def adapters():
    """One of every kind, by its kind."""
    return {
        kind: random_adapter(kind, 3, CONFIG.projections(), 2, rank=RANK, targets=TARGETS)
        for kind in KINDS
    }


def small_engine():
    """A tiny random model with an adapter of every kind."""
    return Engine(init_model(CONFIG, 5), adapters(), tokenizer=tokenizer(), options=OPTIONS)


def small_served(**changes):
    """That model as the API shows it, with a chat template."""
    chat = Chat("tiny", CHAT_TEMPLATE, "tiny", {"bos_token": END, "eos_token": TURN_END})
    limits = Limits(
        CONFIG.n_positions, CONFIG.vocab_size, tokenizer(), chat, max_logprobs=MAX_LOGPROBS
    )
    return Served(("tiny", "alias"), "models/tiny", dataclasses.replace(limits, **changes))


class ScriptedEngine:
    """An engine that gives every request one token a step while ``going`` is set.

    Its tokens are those of ``script``, over and over, their text ``repeat`` times a letter. ``error``,
    once set, is raised by the next step.
    """

    def __init__(self, rows=4, script=b"abcd", steps_per_s=None, repeat=1):
        self.repeat = repeat
        self.going = threading.Event()
        self.going.set()
        self.error = None
        self.rows, self.script, self.pause_s = rows, script, 1 / steps_per_s if steps_per_s else 0.0
        self.registry = Registry()
        self.resident = set()
        self.closed = False
        self.config = CONFIG
        self.open = {}
        self.cancelled = []
        self._lock = threading.Condition()
        self.compilations = type("Compilations", (), {"count": 0})()

    @property
    def adapters(self):
        return {
            version.name: "resident" if version.name in self.resident else "disk"
            for version in self.registry.versions()
        }

    @property
    def stats(self):
        with self._lock:
            running = min(self.rows, len(self.open))
            return Stats(running, len(self.open) - running, 1, 2, 3, 0.25, 10, 4)

    def add(self, request):
        if len(request.prompt_token_ids) > CONFIG.n_positions:
            raise InputError("the prompt is too long")
        with self._lock:
            self.open[request.request_id] = [request, []]
            self._lock.notify_all()
        return request.request_id

    def cancel(self, request_id):
        with self._lock:
            self.cancelled.append(request_id)
            self.open.pop(request_id, None)

    def script_of(self, request):
        return self.script

    def register(self, name, source):
        self.registry.register(name, source)

    def unregister(self, name):
        try:
            self.registry.unregister(name)
        except KeyError:
            raise InputError(f"unknown adapter {name!r}") from None

    def try_preload(self, name):
        if name == "unfit":
            raise InputError("adapter 'unfit': does not fit")
        self.resident.add(name)
        return True

    def wait(self, timeout=None):
        with self._lock:
            self._lock.wait_for(lambda: self.open or self.error, timeout)
            ready = bool(self.open or self.error)
        if self.error is None and not self.going.wait(timeout):
            return False
        return ready

    def step(self):
        if self.error is not None:
            raise self.error
        time.sleep(self.pause_s)
        updates = []
        with self._lock:
            for request_id, (request, tokens) in [*self.open.items()][: self.rows]:
                script = self.script_of(request)
                token = script[len(tokens) % len(script)] + 1 - 33
                tokens.append(token)
                completion = None
                text = chr(script[(len(tokens) - 1) % len(script)]) * self.repeat
                if len(tokens) == request.sampling_params.max_tokens:
                    completion = Completion(
                        request_id, request.adapter, "", tuple(tokens), "length",
                        len(request.prompt_token_ids),
                    )  # fmt: skip
                    del self.open[request_id]
                queued = 0.5 if len(tokens) == 1 else None
                updates.append(
                    Update(request_id, (token,), text, completion=completion, queued_s=queued)
                )
        return updates

    def close(self):
        self.closed = True


@dataclasses.dataclass
class Running:
    """A server that runs in a thread of this process."""

    url: str
    runner: Runner
    app: object
    thread: threading.Thread
    server: Server
    raised: list

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def signal(self):
        """What SIGTERM does."""
        self.server.handle_exit(15, None)

    def stop(self):
        self.signal()
        self.signal()
        self.thread.join(30)
        assert not self.thread.is_alive()


def until(condition, seconds=20.0):
    """Waits for something to become true."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not become true in time"
        time.sleep(0.005)


@contextlib.contextmanager
def running(make, served=None, settings=None, *, rows=4, max_queue=64, wait=True, **options):
    """A server over the engine that ``make`` makes, on a free port."""
    served = served or small_served()
    runner = Runner(make, rows, max_queue)
    app = make_app(runner, served, settings or Settings())
    listener = listen("127.0.0.1", 0)
    started, raised = [], []

    def run():
        try:
            serve(app, listener, on_start=started.append, **options)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until(lambda: started and started[0].started)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    found = Running(url, runner, app, thread, started[0], raised)
    try:
        if wait:
            until(lambda: runner.state != "starting", 120)
            assert runner.state == "ready", runner.error
        yield found
    finally:
        found.stop()


def in_background(function, *arguments, **options):
    """Calls it in a thread; the list gets what it returned."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(function(*arguments, **options)), daemon=True
    )
    thread.start()
    return thread, found
