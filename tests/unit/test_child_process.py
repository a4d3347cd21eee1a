"""Child processes: what they get, what they leave, and that nothing of them outlives what started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import is_alive, wait_until_gone

from tasks.titles.child_process import ChildProcess

# What a process calls itself in the log, so that a test can look for it; what it does comes behind.
HEAD = """
import os, signal, subprocess, sys, time
from tasks.titles.child_process import ChildProcess, end_with_stdin
def hello(name): os.write(1, f"here is {name} {os.getpid()}\\n".encode())  # in one piece: several write to one log
def start(code, **options): return subprocess.Popen([sys.executable, "-u", "-c", code], **options)
"""
IGNORE_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
WAIT = "time.sleep(600)\n"
STUBBORN = HEAD + IGNORE_SIGTERM + "hello('stubborn')\n" + WAIT
WATCHING = HEAD + "end_with_stdin(grace_s=0.2)\n" + IGNORE_SIGTERM + "hello('watching')\n" + WAIT
TIDY = (
    HEAD
    + "def tidy(*_): time.sleep(0.3); print('tidied', flush=True); sys.exit()\n"
    + "signal.signal(signal.SIGTERM, tidy)\nend_with_stdin()\nhello('tidy')\n"
    + WAIT
)


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def pid_of(name: str, log: Path) -> int:
    """Wait until the process of that name has said hello in `log`, and return its id."""
    for _ in range(600):
        if log.exists():
            for line in log.read_text().splitlines():
                if line.startswith(f"here is {name} "):
                    return int(line.split()[-1])
        time.sleep(0.05)
    raise AssertionError(f"no '{name}' within 30 s: {log.read_text()}")


def wait_for_end(child: ChildProcess) -> int:
    for _ in range(600):
        code = child.poll()
        if code is not None:
            return code
        time.sleep(0.05)
    raise AssertionError(f"process {child.pid} has not ended within 30 s")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """The log of a test's processes; those that said hello there and are left over are killed."""
    path = tmp_path / "logs" / "child.log"
    yield path
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("here is ") and is_alive(int(line.split()[-1])):
            os.kill(int(line.split()[-1]), signal.SIGKILL)


def test_a_command_gets_its_environment_and_descriptors_and_a_group_of_its_own(log: Path) -> None:
    reading, writing = os.pipe()
    code = f"import os; os.write({writing}, os.environ['WORD'].encode()); print(os.getpgid(0), os.getsid(0))"
    child = ChildProcess(python(code), log_path=log, environment={"WORD": "spoken"}, pass_fds=(writing,))
    os.close(writing)
    assert wait_for_end(child) == 0
    child.stop()
    assert os.read(reading, 100) == b"spoken"
    os.close(reading)
    assert log.read_text().split() == [str(child.pid)] * 2
    assert child.pid != os.getpgid(0)


def test_the_exit_code_and_the_end_of_the_log_are_there_after_the_end(log: Path) -> None:
    log.parent.mkdir()
    log.write_text("of an earlier process\n")
    code = "import sys; print('first'); print('wrong: \\udcff'.encode(errors='surrogateescape')); sys.exit('last')"
    child = ChildProcess(python(code), log_path=log)
    assert wait_for_end(child) == 1
    child.stop()
    assert log.read_text().startswith("of an earlier process\nfirst\n")
    assert child.log_end().splitlines() == ["", f"The end of {log}:", "first", r"b'wrong: \xff'", "last"]
    assert child.log_end(lines=1).splitlines()[2:] == ["last"]
    log.unlink()
    assert "cannot be read" in child.log_end()


def test_new_lines_come_whole_and_once_and_a_progress_bar_as_it_stands(log: Path) -> None:
    log.parent.mkdir()
    log.write_text("of an earlier child\n")
    said = r"'one\n\nbar  5%\rbar 100%\nhal'"
    child = ChildProcess(
        python(f"import sys; print({said}, end='', flush=True); sys.stdin.read(1); print('f\\nend', end='')"),
        log_path=log,
    )
    seen: list[str] = []
    while len(seen) < 2:
        seen += child.new_lines()
        assert child.poll() is None, log.read_text()
    assert seen == ["one", "bar 100%"], "a line that is being written waits for its end"
    child._socket.sendall(b"x")
    assert wait_for_end(child) == 0
    assert child.new_lines() == ["half", "end"]
    assert child.new_lines() == []
    child.stop()


def test_only_the_end_of_a_long_log_is_read(log: Path) -> None:
    child = ChildProcess(python("print('a' * 10_000_000 + 'b'); print('last')"), log_path=log)
    assert wait_for_end(child) == 0
    child.stop()
    assert child.log_end().endswith("ab\nlast")
    assert len(child.log_end()) < 100_000


def test_a_silent_process_is_called_silent(log: Path) -> None:
    child = ChildProcess(python("pass"), log_path=log)
    wait_for_end(child)
    child.stop()
    assert child.log_end() == f" It wrote nothing to {log}."


def test_a_program_that_is_not_there_is_told_at_once(log: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        ChildProcess(["no-such-program"], log_path=log)


def test_stop_ends_the_group_with_a_grandchild_that_ignores_sigterm(log: Path) -> None:
    child = ChildProcess(python(f"{HEAD}start({STUBBORN!r})\n{WAIT}"), log_path=log)
    grandchild = pid_of("stubborn", log)
    assert os.getpgid(grandchild) == child.pid
    child.stop()
    assert child.poll() == -signal.SIGTERM
    wait_until_gone(grandchild)
    child.stop()


def test_a_process_that_ignores_sigterm_is_killed_when_patience_ends(log: Path) -> None:
    child = ChildProcess(python(STUBBORN), log_path=log)
    pid_of("stubborn", log)
    child.stop(patience_s=0.2)
    assert child.poll() == -signal.SIGKILL


def test_what_a_process_leaves_of_its_group_is_killed(log: Path) -> None:
    child = ChildProcess(python(f"{HEAD}start({STUBBORN!r})\nsys.stdin.readline()"), log_path=log)
    grandchild = pid_of("stubborn", log)
    os.kill(child.pid, signal.SIGKILL)
    assert wait_for_end(child) == -signal.SIGKILL
    wait_until_gone(grandchild)
    child.stop()


def test_stop_waits_for_grandchildren_in_other_sessions(log: Path) -> None:
    child = ChildProcess(python(f"{HEAD}start({TIDY!r}, start_new_session=True)\n{WAIT}"), log_path=log)
    grandchild = pid_of("tidy", log)
    assert os.getpgid(grandchild) == grandchild
    child.stop()
    assert "tidied" in log.read_text()
    wait_until_gone(grandchild)


def test_an_end_of_stdin_that_sigterm_does_not_help_leaves_a_traceback(log: Path) -> None:
    child = ChildProcess(python(f"{HEAD}start({WATCHING!r}, start_new_session=True)\n{WAIT}"), log_path=log)
    grandchild = pid_of("watching", log)
    child.stop()
    wait_until_gone(grandchild)
    assert "Timeout" in log.read_text() and "most recent call first" in log.read_text()


@pytest.mark.parametrize(
    ("end", "watches"), [("killed", "end_with_stdin()\n"), ("ended by itself", "")], ids=["killed", "ended by itself"]
)
def test_nothing_outlives_the_parent(end: str, watches: str, log: Path) -> None:
    """The child, a grandchild of its group and one in a session of its own, when nobody calls `stop`."""
    child = f"{HEAD}{watches}start({TIDY!r})\nstart({WATCHING!r}, start_new_session=True)\n{WAIT}"
    code = (
        f"{HEAD}from pathlib import Path\n"
        f"child = ChildProcess([sys.executable, '-c', {child!r}], log_path=Path({str(log)!r}))\n"
        "print(child.pid, flush=True)\nsys.stdin.readline()\n"
    )
    parent = subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None and parent.stdout is not None
    pids = [int(parent.stdout.readline()), pid_of("tidy", log), pid_of("watching", log)]
    assert all(is_alive(pid) for pid in pids)
    if end == "killed":
        parent.kill()
    parent.stdin.close()
    assert parent.wait(timeout=60) == (-signal.SIGKILL if end == "killed" else 0)
    parent.stdout.close()
    for pid in pids:
        wait_until_gone(pid)
