"""The lock of a directory: one process at a time, whoever dies, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flora_jax.errors import InputError
from flora_jax.files import (
    LOCK,
    directory_lock,
    entries,
    require_file,
    require_new,
    whole_directory,
)

HOLD = (
    "import sys; from flora_jax.files import directory_lock\n"
    "with directory_lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
)


def holder(path):
    """A process that holds the lock until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), "some words"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def ended(process):
    process.communicate()
    return process.returncode


def test_the_second_process_is_told_who_holds_the_directory(tmp_path):
    path = tmp_path / "not/yet/there"
    process = holder(path)
    with pytest.raises(InputError) as told, directory_lock(path):
        pass
    assert str(told.value).startswith(f"{path}: in use by process {process.pid} on ")
    assert "'some words'" in str(told.value)
    assert "\n" not in str(told.value)
    assert ended(process) == 0
    with directory_lock(path):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    assert entries(tmp_path) == []
    assert require_new(tmp_path) == tmp_path
    with directory_lock(tmp_path):
        (tmp_path / "kept").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_lock_leaves_nothing_but_what_was_written_under_it(tmp_path):
    with directory_lock(tmp_path / "new/empty"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), directory_lock(tmp_path / "new/used") as path:
        (path / "kept").touch() or 1 / 0
    assert list((tmp_path / "new/used").iterdir()) == [tmp_path / "new/used/kept"]


def test_one_process_cannot_take_it_twice(tmp_path):
    with (
        directory_lock(tmp_path),
        pytest.raises(InputError, match=f"in use by process {os.getpid()} "),
        directory_lock(tmp_path),
    ):
        pass


def test_never_two_hold_it_while_it_is_taken_and_removed(tmp_path):
    inside, most, taken, refused = 0, 0, 0, set()

    def take(path):
        nonlocal inside, most, taken
        for _ in range(300):
            try:
                with directory_lock(path):
                    inside += 1
                    most, taken = max(most, inside), taken + 1
                    time.sleep(0)
                    inside -= 1
            except InputError as error:
                refused.add(str(error).partition(": ")[2][:9])

    threads = [threading.Thread(target=take, args=(tmp_path / "a/b",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused == {"in use by"}
    assert taken > 100


@pytest.mark.parametrize("place", ["/proc/absent", "/dev/null/x", "/proc/self"])
def test_a_directory_that_cannot_be_written_is_refused(place):
    with (
        pytest.raises(InputError, match=rf"^{place}: cannot be written to: \w"),
        directory_lock(place),
    ):
        pass


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="is a file, expected a dir"),
        directory_lock(tmp_path / "file"),
    ):
        pass


def test_what_replaces_an_output_replaces_its_own_names_only(tmp_path):
    target = tmp_path / "out"
    for content in ("old", "new"):
        with whole_directory(target, ["*.md"] if content == "new" else []) as part:
            (part / f"{content}.md").write_text(content)
    assert [path.name for path in target.iterdir()] == ["new.md"]
    with pytest.raises(InputError, match="out: exists already, and is not an empty directory"):
        require_new(target)
    with pytest.raises(ZeroDivisionError), whole_directory(target, ["*.md"]):
        raise ZeroDivisionError
    (target / "mine.txt").touch()
    with pytest.raises(InputError, match=r"out: holds mine.txt, which is not overwritten"):
        require_new(target, ["*.md"])
    assert sorted(path.name for path in target.iterdir()) == ["mine.txt", "new.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_is_tried_before_the_work_and_nothing_is_left(tmp_path):
    assert require_new(tmp_path / "a/b/c") == tmp_path / "a/b/c"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/out", tmp_path / "file/a/out", "/proc/none/out"):
        with pytest.raises(InputError, match=rf"^{place}: cannot be written to: \w"):
            require_new(place)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    target = tmp_path / "out.json"
    assert require_file(target, overwrite=False) == target
    assert list(tmp_path.iterdir()) == []
    target.touch()
    with pytest.raises(
        InputError, match=r"--plot is .*out.json, which exists already; --overwrite"
    ):
        require_file(target, overwrite=False, option="plot")
    assert require_file(target, overwrite=True) == target
    for place in (tmp_path, tmp_path / "absent/x"):
        with pytest.raises(InputError, match="expected a file in an existing directory"):
            require_file(place, overwrite=True)
    with pytest.raises(InputError, match="--output is /proc/x, which cannot be written: "):
        require_file("/proc/x", overwrite=False)
    with (
        pytest.raises(InputError, match="/proc/x/y: cannot be written to: "),
        whole_directory("/proc/x/y"),
    ):
        pass
