"""Calls with deadlines: one that hangs fails alone, and nothing waits for it."""

import subprocess
import sys
import threading
import time

import pytest

from flora_jax.serve.readers import Readers


def ended(readers, readings):
    """Waits until all are done, as an engine does."""
    for _ in range(2000):
        if all(reading.done for reading in readings):
            return True
        time.sleep(0.005)
        readers.expire()
    return False


def test_calls_that_hang_fail_by_their_deadline_and_others_are_made():
    """More of them than there are threads."""
    there = threading.Event()
    readers = Readers(threads=2, timeout_s=0.1)
    hanging = [readers.submit(there.wait) for _ in range(5)]
    others = [readers.submit(lambda n=n: n) for n in range(5)]
    try:
        assert ended(readers, [*hanging, *others])
        assert [reading.result() for reading in others] == [*range(5)]
        for reading in hanging:
            assert reading.hung
            with pytest.raises(TimeoutError, match=r"not read within 0\.1 s"):
                reading.result()
    finally:
        there.set()
    for _ in range(1000):
        if not any(reading.hung for reading in hanging):
            break
        time.sleep(0.005)
    assert not any(reading.hung for reading in hanging)
    assert readers.submit(lambda: 7).done or ended(readers, [readers.submit(lambda: 7)])


def test_an_error_is_the_calls_and_the_end_is_told():
    told = threading.Event()
    readers = Readers(1, 60.0, told.set)

    def fail():
        raise OSError("no such mount")

    reading = readers.submit(fail)
    assert told.wait(10)
    assert reading.done
    with pytest.raises(OSError, match="no such mount"):
        reading.result()


def test_only_a_call_that_has_not_begun_can_be_cancelled():
    there, begun = threading.Event(), threading.Event()
    readers = Readers(1, 60.0)
    first = readers.submit(lambda: begun.set() or there.wait(10))
    made = []
    second = readers.submit(lambda: made.append(2))
    assert begun.wait(10)
    assert not readers.cancel(first)
    assert readers.cancel(second)
    there.set()
    assert ended(readers, [first, readers.submit(lambda: made.append(3))])
    assert made == [3]


def test_a_process_ends_although_a_call_hangs():
    program = (
        "import time\nfrom flora_jax.serve.readers import Readers\n"
        "r = Readers(2, 60.0)\nr.submit(lambda: time.sleep(600))\ntime.sleep(0.2)\nr.close()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
