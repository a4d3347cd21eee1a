"""Many Prefect task runs on the flow's own event loop, at nearly the pace of bare coroutines.

A task run costs its process a few milliseconds besides its work, most of it before the work begins and after it ends.
Prefect's thread pool makes that 46 ms: each task run gets an event loop and API clients of its own. On one loop
the few milliseconds still add up where many task runs end at the same time, because each that ends keeps the next
from beginning. Here the beginnings and endings queue up and go on one per turn of the loop, so that work which can
go on never waits for more than one of them. On two cores 256 half-second task runs, 64 at once, take 1.07 times as
long as bare coroutines, 1.16 times awaited under a semaphore and 5.8 times on the thread pool (`bench.task_runner`);
5,000 short ones took 18 ms each, and the server kept them all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from prefect.client.orchestration import get_client
from prefect.runtime import task_run as present_task_run

from tasks.titles.together import together

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Awaitable[Result]]

# Twice what is usually at work at once (`rollout_concurrency`): a task run that waits inside has its beginning behind
# it, so that its work can go on as soon as another's ends.
OPEN_AT_ONCE = 128
# Prefect's server keeps up to 10,000 events in memory, three of each task run, and drops what comes beyond; some
# two thousand task runs at once made a self-hosted one unstable (https://github.com/PrefectHQ/prefect/issues/18883).
CHUNK = 1000
_STORE_TIMEOUT_S = 120.0
_POLL_S = 0.2


async def map_task_runs(
    task_run: Callable[[Work[Item, Result], Item], Awaitable[Result]],
    work: Work[Item, Result],
    items: Sequence[Item],
) -> list[Result]:
    """Run one task run per item and return their results in the order of `items`.

    `task_run` is an async Prefect task, or calls one, that awaits `work(item)` and does nothing more. At most
    `OPEN_AT_ONCE` task runs are open at the same time; `work` itself bounds how many of them are really at it.
    After each `CHUNK` of task runs the next waits until Prefect's server has stored them. To be called in a flow run.

    The first exception cancels the others and is raised.
    """
    opened: list[str] = []
    bookkeeping = asyncio.Lock()
    places = asyncio.Semaphore(OPEN_AT_ONCE)

    async def in_turn() -> None:
        async with bookkeeping:
            await asyncio.sleep(0)

    async def work_and_queue(item: Item) -> Result:
        opened.append(present_task_run.id)
        result = await work(item)
        await in_turn()
        return result

    async def one(item: Item) -> Result:
        async with places:
            await in_turn()
            return await task_run(work_and_queue, item)

    results: list[Result] = []
    for start in range(0, len(items), CHUNK):
        if start:
            await _stored(opened)
            opened.clear()
        results += await together(one(item) for item in items[start : start + CHUNK])
    return results


async def _stored(task_runs: Sequence[str]) -> None:
    """Wait until Prefect's server knows that these task runs are completed; warn where it does not get there."""
    wanted = {"id": {"any_": list(task_runs)}, "state": {"type": {"any_": ["COMPLETED"]}}}
    deadline = time.monotonic() + _STORE_TIMEOUT_S
    async with get_client() as client:
        while True:
            answer = await client.request("POST", "/task_runs/count", json={"task_runs": wanted})
            missing = len(task_runs) - answer.json()
            if not missing:
                return
            if time.monotonic() > deadline:
                logger.warning("Prefect's server has not stored the end of %d task runs; going on", missing)
                return
            await asyncio.sleep(_POLL_S)
