"""SIGTERM while a flow waits in an event loop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import anyio
import pytest
from prefect import flow
from prefect.exceptions import TerminationSignal

from flows.termination import no_sigterm_lost

WHERE = (
    "the flow's own task",
    "a callback",
    "a task that nobody waits for",
    "a task group",
    "a task group whose error is told in a callback",
)


@pytest.fixture(autouse=True)
def survived() -> Iterator[None]:
    """Prefect hands SIGTERM on to the handler that was there before; Python's own would end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def terminate_soon() -> None:
    terminate()


async def terminate_in_a_group() -> None:
    # anyio's, which HTTP clients connect in.
    async with anyio.create_task_group() as group:
        group.start_soon(terminate_soon)


def tell(task: asyncio.Task[None]) -> None:
    if (error := task.exception()) is not None:
        raise error


@flow(name="waiting")
async def wait_long(where: str) -> None:
    async with no_sigterm_lost():
        if where == WHERE[0]:
            terminate()
        elif where == WHERE[1]:
            asyncio.get_running_loop().call_soon(terminate)
        elif where == WHERE[2]:
            _ = asyncio.create_task(terminate_soon())
            del _
        elif where == WHERE[3]:
            await terminate_in_a_group()
        else:
            asyncio.create_task(terminate_in_a_group()).add_done_callback(tell)
        await asyncio.sleep(60)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.usefixtures("prefect_harness")
def test_a_flow_ends_wherever_its_event_loop_is(where: str) -> None:
    with pytest.raises((asyncio.CancelledError, TerminationSignal)):
        asyncio.run(wait_long(where))


async def test_other_errors_go_where_they_went_before() -> None:
    heard = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: heard.append(context["message"]))
    async with no_sigterm_lost():
        loop.call_exception_handler({"message": "meanwhile", "exception": ValueError()})
    loop.call_exception_handler({"message": "afterwards"})
    assert heard == ["meanwhile", "afterwards"]
