"""The memory of a process tree: a child's counts while it lives, and the peak stays."""

import subprocess
import sys
import time

from tasks.titles.peak_memory import PeakMemory, memory_of_process_tree

CHILD_MB = 60
CHILD = f"import sys; held = bytearray(b'x') * {CHILD_MB * 1_000_000}; print('ready', flush=True); sys.stdin.read()"


def test_the_peak_holds_what_a_child_had() -> None:
    before = memory_of_process_tree() / 1e6
    with PeakMemory() as memory:
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert memory_of_process_tree() / 1e6 > before + CHILD_MB
        deadline = time.monotonic() + 30
        while memory.megabytes < before + CHILD_MB and time.monotonic() < deadline:
            time.sleep(0.05)
        child.stdin.close()
        child.wait()
        child.stdout.close()
    assert memory.megabytes > before + CHILD_MB
