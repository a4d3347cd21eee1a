"""Whether processes that a test has started, directly or not, are still there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

MARK = "HN_TITLES_TEST_RUN"
"""Environment variable that a test gives to what it starts, all of which inherits it."""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> None:
    for _ in range(600):
        if not is_alive(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there after 30 s")


def descendants(pid: int) -> set[int]:
    """Return the ids of all processes that `pid` has started, directly or not, and that are still there."""
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes that were started, at any depth, with this test's mark."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={folder}".encode() in environ.read_bytes().split(b"\0"):
                found.append((environ.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended meanwhile, or is not ours to read
    return found


def wait_until_none_is_left(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while processes_of(folder):
        assert time.monotonic() < deadline, processes_of(folder)
        time.sleep(0.2)
