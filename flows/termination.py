"""SIGTERM while a flow waits in an event loop: what a worker sends to cancel it, and what a shell sends to end it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prefect.exceptions import TerminationSignal


@asynccontextmanager
async def no_sigterm_lost() -> AsyncIterator[None]:
    """Cancel the present task where what Prefect raises for SIGTERM would get lost, and raise it plain.

    Its handler raises wherever the main thread happens to be. In a callback of the event loop, or in a task that nobody
    waits for, asyncio only logs what was raised, and the flow would go on. In a task group, such as those that HTTP
    clients connect in, it comes out in a `BaseExceptionGroup`, which is no termination to Prefect or the command line.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if _termination(context.get("exception")) is not None:
            task.cancel()
        elif before is not None:
            before(loop, context)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
    try:
        yield
    except BaseExceptionGroup as group:
        termination = _termination(group)
        if termination is None:
            raise
        raise termination from None
    finally:
        loop.set_exception_handler(before)


def _termination(error: BaseException | None) -> TerminationSignal | None:
    """Return the signal that `error` is, or holds as a group."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for one in error.exceptions if (found := _termination(one)) is not None), None)
    return error if isinstance(error, TerminationSignal) else None
