"""SIGTERM while a flow waits in an event loop: what a worker sends to cancel it, and what a shell sends to end it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def cancelled_by_sigterm() -> AsyncIterator[None]:
    """Have SIGTERM cancel the present task meanwhile, as Ctrl-C does.

    Prefect's own handler raises wherever the main thread happens to be. In a callback of the event loop asyncio logs
    what was raised and goes on, and so does the flow. What is cancelled must not keep the loop waiting.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    prefects = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, prefects)
