"""How much memory a stage needs at most: this process and all of its children together."""

from __future__ import annotations

import contextlib
import threading
from typing import Self

import psutil

INTERVAL_S = 1.0


class PeakMemory:
    """Looks once a second while it is open; what is shorter than that may be missed."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        """The highest sum so far of all processes' proportional set sizes, in 10⁶ bytes: pages that several
        processes share count once."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.megabytes = max(self.megabytes, memory_of_process_tree() / 1e6)
            if self._closed.wait(INTERVAL_S):
                return


def memory_of_process_tree() -> int:
    """Return the bytes that this process and all of its descendants hold at the moment."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        # A process may end, or change its owner, between being listed and being looked at.
        with contextlib.suppress(psutil.Error):
            memory = process.memory_full_info()
            # Only Linux knows proportional sizes.
            total += getattr(memory, "pss", 0) or memory.rss
    return total
