"""What Prefect's task runs cost beside bare coroutines, on a Prefect server of this command's own.

Tasks that do nothing but sleep run as bare coroutines, on Prefect's thread pool, as awaited task runs, and by
`tasks.task_runs`, the way rollouts go. Afterwards the server is asked for every task run: each must be there,
completed and under its own name.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Table

Way = Callable[[], Awaitable[float]]
PAGE = 200
STORED_WITHIN_S = 120.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.task_runner", description=__doc__)
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.5, help="what each task sleeps")
    parser.add_argument("--at-once", type=int, default=64, help="tasks that sleep at the same time")
    parser.add_argument("--rounds", type=int, default=3, help="the table shows the medians")
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=list(NAMES), help="'bare' always runs")
    return parser.parse_args()


NAMES = {"thread-pool": "thread pool", "gather": "awaited, semaphore", "task-runs": "map_task_runs"}


def ways(tasks: int, seconds: float, at_once: int) -> tuple[Way, dict[str, Any]]:
    """Return the bare way and the flows by name; each returns the seconds that its tasks took."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE
    from prefect.runtime import flow_run
    from prefect.task_runners import ThreadPoolTaskRunner

    from tasks.task_runs import map_task_runs
    from tasks.titles.together import together

    numbers = range(tasks)

    @task(name="sleep", task_run_name="sleep-{number}", cache_policy=NO_CACHE, persist_result=False)
    async def sleep(work: Callable[[int], Awaitable[int]], number: int) -> int:
        return await work(number)

    async def nap(number: int) -> int:
        await asyncio.sleep(seconds)
        return number

    def one_of(slots: asyncio.Semaphore, work: Callable[[int], Awaitable[int]]) -> Callable[[int], Awaitable[int]]:
        async def limited(number: int) -> int:
            async with slots:
                return await work(number)

        return limited

    def timed(results: list[int], started: float) -> float:
        taken = time.perf_counter() - started
        assert results == list(numbers), "a task returned another's result"
        return taken

    async def bare() -> float:
        limited = one_of(asyncio.Semaphore(at_once), nap)
        started = time.perf_counter()
        return timed(await together(limited(number) for number in numbers), started)

    @flow(name="thread-pool", task_runner=ThreadPoolTaskRunner(max_workers=at_once))  # type: ignore[arg-type]
    async def thread_pool() -> tuple[str, float]:
        from prefect import unmapped

        started = time.perf_counter()
        futures: Any = sleep.map(unmapped(nap), numbers)  # type: ignore[call-overload]
        return flow_run.id, timed([future.result() for future in futures], started)

    @flow(name="gather")
    async def gather() -> tuple[str, float]:
        limited = one_of(asyncio.Semaphore(at_once), lambda number: sleep(nap, number))
        started = time.perf_counter()
        return flow_run.id, timed(await together(limited(number) for number in numbers), started)

    @flow(name="task-runs")
    async def task_runs() -> tuple[str, float]:
        limited = one_of(asyncio.Semaphore(at_once), nap)
        started = time.perf_counter()
        return flow_run.id, timed(await map_task_runs(sleep, limited, numbers), started)

    return bare, {"thread-pool": thread_pool, "gather": gather, "task-runs": task_runs}


async def check_stored(flow_run_id: str, tasks: int) -> float:
    """Return the seconds until the server had every task run, completed and by name; raise where it has not."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    only = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)]))
    wanted = sorted(f"sleep-{number}" for number in range(tasks))
    started = time.perf_counter()
    async with get_client() as client:
        while True:
            runs: list[Any] = []
            while len(page := await client.read_task_runs(flow_run_filter=only, limit=PAGE, offset=len(runs))) == PAGE:
                runs += page
            runs += page
            completed = sorted(run.name for run in runs if run.state is not None and run.state.is_completed())
            if completed == wanted:
                return time.perf_counter() - started
            if time.perf_counter() - started > STORED_WITHIN_S:
                raise RuntimeError(f"Expected {tasks} completed task runs, the server has {len(completed)}.")
            await asyncio.sleep(0.2)


async def measure(asked: argparse.Namespace, out: Console, screen: Console) -> None:
    bare, flows = ways(asked.tasks, asked.seconds, asked.at_once)
    taken: dict[str, list[float]] = {"bare": []} | {name: [] for name in asked.ways}
    stored: dict[str, list[float]] = {name: [] for name in asked.ways}
    for done in range(asked.rounds):
        taken["bare"].append(await bare())
        for name in asked.ways:
            with screen.status(f"round {done + 1} of {asked.rounds}: {NAMES[name]}"):
                flow_run_id, seconds = await flows[name]()
                taken[name].append(seconds)
                stored[name].append(await check_stored(flow_run_id, asked.tasks))
    show(asked, taken, stored, out)


def show(
    asked: argparse.Namespace, taken: dict[str, list[float]], stored: dict[str, list[float]], out: Console
) -> None:
    table = Table(
        title=f"{asked.tasks} tasks of {asked.seconds:g} s, {asked.at_once} at once, medians of {asked.rounds}"
    )
    for column in ("way", "seconds", "each", "times bare", "stored after", "completed"):
        table.add_column(column)
    bare = statistics.median(taken["bare"])
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        told = " ".join(f"{second:.2f}" for second in seconds)
        after = f"{statistics.median(stored[name]):.1f} s" if name in stored else ""
        kept = str(asked.tasks) if name in stored else ""
        table.add_row(NAMES.get(name, "bare"), f"{middle:.2f}", told, f"{middle / bare:.3f}", after, kept)
    out.print(table)


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory(prefix="task-runner-bench-") as folder:
        # Before Prefect is imported: a database of this command's own.
        os.environ["PREFECT_HOME"] = folder
        os.environ.pop("PREFECT_API_URL", None)
        from flows.execute import prepare_environment
        from flows.prefect_server import prefect_api
        from flows.terminal import output_to

        prepare_environment()
        # Prefect's lines about each task run go to a file, as they do in a run.
        with (
            output_to(Path(folder) / "run.log") as (out, screen),
            prefect_api(Path(folder) / "server.log", None) as api,
        ):
            api.wait_ready()
            asyncio.run(measure(asked, out, screen))


if __name__ == "__main__":
    main()
