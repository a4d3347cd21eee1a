"""Whether processes that a test has started, directly or not, are still there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil


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
