"""Runs coroutines at the same time, and leaves none behind when one of them fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

Result = TypeVar("Result")


async def together(awaitables: Iterable[Awaitable[Result]]) -> list[Result]:
    """Return the results in the order of `awaitables`.

    The first exception cancels the others, waits for them to end and is raised as it is
    (`asyncio.gather` leaves them running, `asyncio.TaskGroup` wraps what was raised).
    """
    running = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
