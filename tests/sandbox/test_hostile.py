"""Programs that try to do harm, run by the command as any other: none of them does."""

import hashlib
import json
import os
import platform
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flora_jax.errors import InputError
from flora_jax.sandbox import sandbox as sandbox_module
from flora_jax.sandbox import supervise
from flora_jax.sandbox.sandbox import Limits, Sandbox
from tests.helpers import toolchains

MARK = f"hostile-{os.getpid()}"
# Numbers of system calls, which differ.
MMAP, READ = (222, 63) if platform.machine() == "aarch64" else (9, 0)
# Each exits with 0 where it did its harm, and says "held" where it tried and could not.
PROGRAMS = {
    "reads_a_file": 'open(my $f, "<", "SECRET") or die "held: $!"; print <$f>;',
    "reads_homes": 'my @found = (glob("/root/* /root/.* /home/* /etc/passwd /etc/shadow /var/*"));'
    ' @found = grep { -e } @found; print @found; die "held" unless @found;',
    "reads_the_environment": 'my @all = map { local $/; open(my $f, "<", $_) ? <$f> : "" }'
    ' glob("/proc/*/environ"); my $all = join("", @all, %ENV);'
    ' die "held" unless $all =~ /FLORA_SECRET/;',
    "opens_a_socket": "use IO::Socket::INET; IO::Socket::INET->new(PeerAddr => '127.0.0.1',"
    ' PeerPort => PORT, Timeout => 3) or die "held: $@";',
    "counts_forks": 'for (1..10000) { my $p = fork; die "held: $!" unless defined $p;'
    " if (!$p) { sleep 100; exit } }",
    "bombs_with_forks": "while (1) { fork }",
    "fills_the_disk": 'my $n = 0; my $block = "x" x (1 << 20); while ($n < 4096) {'
    ' open(my $f, ">", "/tmp/fill$n") or die "held: $!";'
    ' for (1..16) { print $f $block or die "held: $!" } close($f) or die "held: $!"; $n += 16 }',
    "writes_a_large_file": "$SIG{XFSZ} = 'IGNORE'; open(my $f, '>', '/tmp/large');"
    ' my $block = "x" x (1 << 20); for (1..200) { print $f $block or die "held: $!" }'
    ' close($f) or die "held: $!";',
    "prints_100_megabytes": 'print "x" x 1000000 for 1..100;',
    "opens_a_socket_to_the_host": 'socket(my $s, 40, 1, 0) or die "held: $!";',
    "fills_socket_buffers": 'socketpair(my $a, my $b, 1, 1, 0) or die "held: $!";',
    # What is shared belongs to no process alone.
    "eats_shared_memory": f"my $at = syscall({MMAP}, 0, 3 << 30, 3, 0x21, -1, 0);"
    ' die "held: $!" if $at == -1; open(my $zero, "<", "/dev/zero");'
    f" syscall({READ}, fileno($zero), $at + ($_ << 26), 1 << 26) for 0..47; sleep 100;",
    "eats_memory": 'my @all; push @all, "x" x (1 << 26) for 1..200;',
    "ignores_sigterm": "$SIG{$_} = 'IGNORE' for qw(TERM INT HUP ALRM); sleep 1 while 1;",
    "leaves_a_daemon": "use POSIX; if (!fork) { POSIX::setsid(); if (!fork) {"
    " open($_, '+<', '/dev/null') for *STDIN, *STDOUT, *STDERR; sleep 600; }"
    " exit } sleep 1;",
    "writes_to_the_toolchain": 'my $n = 0; for my $p ("/usr/bin/perl", "/usr/bin/env", "/usr/new",'
    ' "/etc/new", "/lib/new", "/new", "/dev/new") { open(my $f, ">>", $p) and $n++; }'
    ' unlink("/usr/bin/perl") and $n++; chmod(0777, "/usr/bin/perl") and $n++;'
    ' die "held" unless $n;',
}
STATUSES = {
    "prints_100_megabytes": "OutputLimit",
    "eats_shared_memory": "MemoryLimit",
    "eats_memory": "MemoryLimit",
    "ignores_sigterm": "Timeout",
    "bombs_with_forks": "Timeout",
    "leaves_a_daemon": "OK",
}


def processes(mark):
    """Processes whose command line has ``mark``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def contents(*paths):
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


@pytest.mark.toolchains
def test_hostile_programs_harm_nothing(tmp_path):
    toolchains.need("pl")
    (tmp_path / "secret").write_text("secret")
    tmp_path.chmod(0o755)
    before = contents("/usr/bin/perl", "/usr/bin/env"), sorted(Path("/usr").iterdir())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        lines = [
            {
                # The name by which processes are found.
                "name": name, "language": "pl", "prompt": f"$0 = '{MARK}';\n", "tests": "",
                "completions": [
                    code.replace('"SECRET"', f'"{tmp_path}/secret"').replace("PORT,", f"{port},")
                ],
            }
            for name, code in PROGRAMS.items()
        ]  # fmt: skip
        file = tmp_path / "hostile.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        started = time.monotonic()
        with ThreadPoolExecutor(1) as executor:
            running = executor.submit(
                toolchains.evaluate, file, tmp_path / "out", "--workers", "1",
                FLORA_SECRET="FLORA_SECRET",
            )  # fmt: skip
            seen = set()
            while not running.done():
                seen.update(processes(MARK))
                time.sleep(0.2)
        found = running.result()
        with pytest.raises(BlockingIOError):
            server.accept()
    # Two of them last for 15 s of their own, on a busy machine 60 s by the clock at most.
    assert time.monotonic() - started < 180
    assert free - os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize < 1 << 30
    assert {name: status for (_, name), (status,) in found.items()} == {
        name: STATUSES.get(name, "Exception") for name in PROGRAMS
    }
    outcomes = (tmp_path / "out/executions.jsonl").read_text().splitlines()
    held = [o for o in map(json.loads, outcomes) if o["status"] == "Exception"]
    assert len(held) == len(PROGRAMS) - len(STATUSES)
    assert [o["stderr"] for o in held if "held" not in o["stderr"]] == []
    assert len(seen) > 10
    assert processes(MARK) == []
    assert (contents("/usr/bin/perl", "/usr/bin/env"), sorted(Path("/usr").iterdir())) == before


@pytest.mark.toolchains
def test_a_sandbox_s_processes_are_not_counted_with_others(tmp_path):
    """A limit of the whole user would make one program fail for what another does."""
    toolchains.need("pl")
    sleepers = (
        "for (1..40) { my $p = fork; die 'refused' unless defined $p; if (!$p) { sleep 3; exit } }"
    )
    lines = [
        {"name": f"p{i}", "language": "pl", "prompt": f"# {i}\n{sleepers}", "tests": "",
         "completions": [""]}
        for i in range(4)
    ]  # fmt: skip
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = toolchains.evaluate(file, tmp_path / "out", "--workers", "4")
    assert set(map(tuple, found.values())) == {("OK",)}


def test_without_a_sandbox_too_nothing_of_a_program_is_left():
    mark = f"987{os.getpid()}"
    ran, _ = Sandbox(unsafe=True).run(["sh", "-c", f"sleep {mark} & exit 0"], {}, 10)
    assert (ran.ending, ran.exit_code) == ("exited", 0)
    until = time.monotonic() + 5  # It was sent the signal, and dies on its own time.
    while processes(mark) and time.monotonic() < until:
        time.sleep(0.01)
    assert processes(mark) == []


def python(code):
    """A command that runs ``code``, wherever Python lies."""
    return [sys.executable, "-S", "-E", "-c", code]


def test_time_that_a_program_waits_for_a_core_is_not_its_own():
    sandbox = Sandbox(unsafe=True, limits=Limits(wall=100.0))
    command = python("import time\nwhile time.process_time() < 0.6: pass")
    many = 6 * len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(many) as executor:
        ran = [*executor.map(lambda _: sandbox.run(command, {}, 1.5)[0], range(many))]
    assert max(one.seconds for one in ran) > 1.5
    assert {(one.ending, one.exit_code) for one in ran} == {("exited", 0)}


@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import time; time.sleep(60)",
     "import os\nos.fork(); os.fork()\nwhile True: pass",
     "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()"],
)  # fmt: skip
def test_a_program_that_computes_or_sleeps_too_long_is_ended(code):
    started = time.monotonic()
    ran, _ = Sandbox(unsafe=True, limits=Limits(wall=100.0)).run(python(code), {}, 0.5)
    assert (ran.ending, ran.exit_code) == ("timeout", -1)
    assert time.monotonic() - started < 20


def test_the_clock_ends_what_waits_for_ever():
    ran, _ = Sandbox(unsafe=True, limits=Limits(wall=0.5)).run(["sleep", "60"], {}, 1.0)
    assert ran.ending == "starved"
    assert ran.seconds < 0.9


def test_a_program_that_is_stopped_is_not_tried_again():
    mark = f"986{os.getpid()}"
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(Sandbox(unsafe=True).run, ["sleep", mark], {}, 60)
        while not processes(mark):
            time.sleep(0.01)
        supervise.kill_running()
        with pytest.raises(supervise.Stopped):
            running.result(timeout=10)
    assert processes(mark) == []
    assert Sandbox(unsafe=True).run(["true"], {}, 10)[0].exit_code == 0


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"no sandbox: .*bwrap.* not found; .*--unsafe"):
        Sandbox().check()
