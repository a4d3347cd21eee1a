"""Threads that each compute on one core.

torch's own threads wait for each other by spinning at the end of every operation. As long as the machine
is idle that is fast; as soon as another process wants a core, such as the reward server in the middle of
a step, each of the thousands of small operations may spin for a whole time slice: the same sampling then
took 50 s instead of 0.5 s (two cores, four busy processes). Whole pieces of work side by side, one core
each, need no such waiting, take the same time where the machine is idle, and give the same numbers
whatever the number of cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    # macOS knows no affinity; where there is one, a container may have been given fewer cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Cores:
    """A fixed number of threads for independent pieces of work."""

    def __init__(self, count: int | None = None) -> None:
        """Use `count` cores, or all that this process may run on."""
        self.count = count or usable_cores()
        self._pool = ThreadPoolExecutor(self.count, "core", use_one_core)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return the results in the order of `items`; the first exception is raised once all have ended."""
        futures = [self._pool.submit(function, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def use_one_core() -> None:
    """Make torch compute in the calling thread alone."""
    torch.set_num_threads(1)
