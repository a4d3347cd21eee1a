"""SIGTERM while a flow waits in an event loop: what a worker sends to cancel it, and what a shell sends to end it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prefect.exceptions import TerminationSignal


@asynccontextmanager
async def no_sigterm_lost() -> AsyncIterator[None]:
    """Cancel the present task where what Prefect raises for SIGTERM would get lost.

    Its handler raises wherever the main thread happens to be. In a callback of the event loop, or in a task that nobody
    waits for, asyncio only logs what was raised, and the flow would go on.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), TerminationSignal):
            task.cancel()
        elif before is not None:
            before(loop, context)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        loop.set_exception_handler(before)
