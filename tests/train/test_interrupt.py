"""A signal ends a run between two steps, wherever Python is when it comes; a second one at once."""

import gc
import os
import signal
import subprocess
import sys

import pytest

from flora_jax.train.interrupt import Interrupt, InterruptedRun, on_signals
from tests.helpers.training_home import ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_handlers_come_back(number, capfd):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with on_signals() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(InterruptedRun, match=f"stopped by {number.name} at step 3") as stopped:
            interrupt.check("at step 3")
    assert stopped.value.number == number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert (
        capfd.readouterr().err == "stopping after this step; the same signal again ends at once\n"
    )


def test_a_signal_inside_a_callback_of_the_garbage_collector_is_not_lost():
    """Where an exception of the handler would be dropped."""

    def callback(phase, _):
        if phase == "start" and not sent:
            sent.append(phase)
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # The handler runs here.
                pass

    sent = []
    with on_signals() as interrupt:
        gc.callbacks.append(callback)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(callback)
        assert sent
        assert interrupt.requested


def test_a_second_signal_ends_the_process_at_once():
    code = """
import os, signal, time
from flora_jax.train.interrupt import on_signals
with on_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "first\n")


def test_nothing_is_raised_before_a_request():
    interrupt = Interrupt()
    interrupt.check()
    assert not interrupt.requested
