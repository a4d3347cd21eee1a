"""SIGTERM while a flow waits in an event loop: what a worker sends to cancel it, and what a shell sends to end it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefect.exceptions import TerminationSignal
from prefect.utilities import engine

PREFECTS = engine._prefect_sigterm_handler


@asynccontextmanager
async def no_sigterm_lost() -> AsyncIterator[None]:
    """Let SIGTERM cancel the present task, as Ctrl-C does, and raise Prefect's signal once the task has ended.

    Prefect's own handler raises wherever the main thread happens to be. In a callback of the event loop, or in a task
    that nobody waits for, asyncio only logs what was raised, and the flow would go on; between a future's result and
    the call of those that wait for it they would wait for ever. A second SIGTERM raises all the same.

    What runs without an await hears of it only at its end. Inside another such context, and where Prefect does not
    catch the signal, such as outside the main thread, nothing is changed.
    """
    if signal.getsignal(signal.SIGTERM) is not PREFECTS or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came = False

    def cancel(number: int, *_: object) -> None:
        nonlocal came
        if came:
            PREFECTS(number)
        came = True
        task.cancel()
        # It may be waiting for something to happen.
        loop.call_soon_threadsafe(lambda: None)

    _handle_by(cancel)
    try:
        yield
    except BaseException as error:
        # Cancelled, or ended by a second signal, perhaps in a task group. An error of its own comes first.
        if not came or isinstance(error, Exception):
            raise
    finally:
        _handle_by(PREFECTS)
    if came:
        # Where nothing was awaited any more the task has not been told yet, and Prefect's next await would be.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        task.uncancel()
        raise TerminationSignal(signal.SIGTERM)


def _handle_by(handler: object) -> None:
    """Have SIGTERM handled by `handler`, which Prefect is to take for its own.

    It answers a worker that wants to cancel a run only while the handler in place is the one it knows by this name.
    """
    with engine._prefect_sigterm_bridge_lock:
        signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
        engine._prefect_sigterm_handler = handler  # type: ignore[assignment]
