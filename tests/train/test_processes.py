"""``flora-jax train`` in processes of their own: killed at any moment, and on a mesh of devices."""

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from flora_jax.checkpoints.checkpoint import load_model
from tests.helpers.training_home import (
    LENGTH,
    NAMES,
    ROOT,
    data_of,
    fill,
    lines_of,
    read_for,
    snapshot,
)

# A server forks them after the imports, which take longer than a run.
SERVER = """
import json, os, sys
import jax
import flora_jax.cli, flora_jax.train.run, matplotlib.figure
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    if "ended" in order:
        kinds = os.WEXITED | os.WNOHANG | os.WNOWAIT
        print(int(os.waitid(os.P_PID, order["ended"], kinds) is not None), flush=True)
        continue
    if child := os.fork():
        print(child, flush=True)
        continue
    os.environ.update(order["environment"])
    if order["quick"]:
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_log_compiles", True)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = ["flora-jax", *order["arguments"]]
    flora_jax.cli.main()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    fill(home)
    return home


class Processes:
    """Starts the program in ``home`` and waits for it."""

    def __init__(self, home, server):
        self.home, self.server = home, server

    def _ask(self, **order):
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *arguments, quick=False, log="log", **environment):
        return self._ask(
            arguments=["train", *map(str, arguments)], environment=environment, quick=quick,
            log=str(self.home / log),
        )  # fmt: skip

    def wait_until(self, done, process, patience):
        """Until something is done or the process has ended; at most ``patience`` seconds."""
        end = time.monotonic() + patience
        while not done() and not self._ask(ended=process):
            assert time.monotonic() < end, (self.home / "log").read_text()
            time.sleep(0.005)

    def wait(self, process, log="log"):
        return self._ask(wait=process), (self.home / log).read_text()

    def run(self, *arguments, **options):
        code, log = self.wait(self.start(*arguments, **options))
        assert code == 0, log
        return log


@pytest.fixture(scope="module")
def processes(home):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(home / "xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, cwd=home, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as server:  # fmt: skip
        yield Processes(home, server)
        server.stdin.close()


LONG = [
    "flat", *data_of(*NAMES), *data_of("perl", option="validation"), "--kind", "lora", "--dropout",
    "0.2", "--accumulate", "2", "--steps", "30", "--batch-size", "8", "--seq-len", LENGTH,
    "--eval-every", "10", "--save-every", "2", "--learning-rate", "0.01",
]  # fmt: skip


def newest(output):
    """The step of the last whole checkpoint."""
    folder = output / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(kills, home, processes):
    # Without XLA's optimisations a process starts faster; the long test has them.
    chance, quick = random.Random(kills), kills < 10
    output, uninterrupted = home / f"killed-{kills}", home / f"whole-{kills}"
    began = time.monotonic()
    processes.run(*LONG, "--output", uninterrupted, quick=quick)
    # A busy machine may be several times slower a moment later.
    patience = 60 + 10 * (time.monotonic() - began)
    arguments, reached = [*LONG, "--output", output, "--resume"], []
    for number in range(kills):
        process = processes.start(*arguments, quick=quick)
        wait = functools.partial(processes.wait_until, process=process, patience=patience)
        if number:
            # Some checkpoints after the one before, one perhaps half written.
            wait((output / "metrics.jsonl").exists)
            goal = min(20, newest(output) + 2 * chance.randint(0, 12 // kills))
            wait(lambda goal=goal: newest(output) >= goal)
            time.sleep(chance.uniform(0, 0.2))
        else:
            # At any moment of the first seconds, but not after the end, however quick the machine is.
            moment = time.monotonic() + chance.uniform(0, 3)
            wait(lambda moment=moment: time.monotonic() >= moment or newest(output) >= 8)
        os.kill(process, signal.SIGKILL)
        code, log = processes.wait(process)
        assert code in (0, -signal.SIGKILL), log
        reached.append(newest(output))
    processes.run(*arguments, quick=quick)
    assert any(0 < step < 30 for step in reached), reached
    for name in NAMES:
        assert snapshot(output / name) == snapshot(uninterrupted / name)
    assert lines_of(output) == lines_of(uninterrupted)
    for name in ("config.json", "data.json"):
        assert (output / name).read_text() == (uninterrupted / name).read_text()


MESHED = [
    "flat", *data_of(*NAMES), *data_of("ruby", option="validation"), "--kind", "flora", "--rank", "2",
    "--targets", "c_attn,mlp.c_proj", "--steps", "3", "--batch-size", "16", "--seq-len", LENGTH,
    "--warmup-steps", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def one_device(home, processes):
    processes.run(*MESHED, "--output", "one-device", quick=True)
    return home / "one-device"


@pytest.mark.parametrize(
    "mesh", ["data=2,tensor=4", pytest.param("data=8", marks=pytest.mark.slow)]
)
def test_a_mesh_of_devices_trains_the_same_adapters(mesh, home, processes, one_device):
    output, model = home / mesh, load_model(home / "flat")
    eight = "--xla_force_host_platform_device_count=8"
    log = processes.run(*MESHED, "--output", output, "--mesh", mesh, quick=True, XLA_FLAGS=eight)
    assert log.count("Finished XLA compilation of jit(step)") == 1
    assert log.count("Finished XLA compilation of jit(score)") == 1
    for found, expected in zip(lines_of(output), lines_of(one_device), strict=True):
        assert found["step"] == expected["step"]
        if "losses" in expected:
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        for name, measured in expected.get("validation", {}).items():
            assert found["validation"][name] == pytest.approx(measured, rel=1e-3)
    for name in NAMES:
        adapters = [read_for(model, run / name) for run in (output, one_device)]
        for a, b in zip(*(jax.tree.leaves(one.layers) for one in adapters), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


TOGETHER = [
    "flat", *data_of(*NAMES), *data_of("ruby", option="validation"), "--kind", "lora", "--rank", "2",
    "--targets", "c_attn,mlp.c_proj", "--steps", "20", "--batch-size", "8", "--seq-len", LENGTH,
    "--eval-every", "10", "--save-every", "2",
]  # fmt: skip


def start_both(processes, output, port, *more):
    """The two processes of one run."""
    meet = ["--coordinator", f"localhost:{port}", "--num-processes", 2]
    return [
        processes.start(
            *TOGETHER, "--output", output, *meet, "--process-id", number, *more,
            quick=True, log=f"log-{number}",
        )
        for number in range(2)
    ]  # fmt: skip


def free_port():
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return own.getsockname()[1]


def test_two_processes_train_as_one_and_go_on_after_one_was_killed(home, processes):
    alone, output = home / "by-one", home / "by-two"
    processes.run(*TOGETHER, "--output", alone, quick=True)
    both = start_both(processes, output, free_port())
    processes.wait_until(lambda: newest(output) >= 2, both[0], patience=120)
    os.kill(both[1], signal.SIGKILL)
    ended = [processes.wait(one, f"log-{number}") for number, one in enumerate(both)]
    # The other one ends by itself, and says so.
    assert ended[0][0] != 0, ended[0]
    reached = newest(output)
    assert 2 <= reached < 20
    for number, one in enumerate(start_both(processes, output, free_port(), "--resume")):
        code, log = processes.wait(one, f"log-{number}")
        assert code == 0, log
        # The first one alone speaks.
        assert ("documents" in log) == (number == 0)
    options = json.loads((output / "config.json").read_text())
    assert options["mesh"] == "data=2"
    for found, expected in zip(lines_of(output), lines_of(alone), strict=True):
        assert found["step"] == expected["step"]
        if "losses" in expected:
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, measured in expected.get("validation", {}).items():
            assert found["validation"][name]["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    model = load_model(home / "flat")
    for name in NAMES:
        adapters = [read_for(model, run / name) for run in (output, alone)]
        for a, b in zip(*(jax.tree.leaves(one.layers) for one in adapters), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--num-processes", 2, "--process-id", 0), "coordinator is missing"),
        (("--coordinator", "here", "--num-processes", 2, "--process-id", 0), "expected HOST:PORT"),
        (("--coordinator", "a:1", "--num-processes", 2, "--process-id", 2), "expected 0 to 1"),
    ],
)
def test_processes_that_cannot_meet_say_why(arguments, message, home, processes):
    code, log = processes.wait(processes.start(*MESHED, "--output", home / "never", *arguments))
    assert code == 2
    assert message in log
    assert not (home / "never").exists()
