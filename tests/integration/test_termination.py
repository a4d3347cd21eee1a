"""SIGTERM while a flow waits in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.utilities.engine import can_ack_control_intent

from flows.termination import PREFECTS, no_sigterm_lost

WHERE = (
    "the flow's own task",
    "the flow's own task, which computes",
    "a callback",
    "a task that nobody waits for",
    "a task group",
    "a task group whose error is told in a callback",
    "between a result and its waiters",
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


async def terminate_between_a_result_and_its_waiters() -> None:
    """Give a future its result, of which the loop is about to tell those who wait when the signal comes."""
    loop = asyncio.get_running_loop()
    future, told = loop.create_future(), []
    future.add_done_callback(told.append)

    def call_soon(*arguments: Any, **options: Any) -> asyncio.Handle:
        del loop.call_soon
        terminate()
        return loop.call_soon(*arguments, **options)

    loop.call_soon = call_soon  # type: ignore[method-assign]
    try:
        future.set_result(None)
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.1)
        if not told:
            pytest.fail("whoever waits for this future waits for ever")


@flow(name="waiting")
async def wait_long(where: str) -> None:
    async with no_sigterm_lost():
        if where == WHERE[0]:
            terminate()
        elif where == WHERE[1]:
            terminate()
            return
        elif where == WHERE[2]:
            asyncio.get_running_loop().call_soon(terminate)
        elif where == WHERE[3]:
            _ = asyncio.create_task(terminate_soon())
            del _
        elif where == WHERE[4]:
            await terminate_in_a_group()
        elif where == WHERE[5]:
            asyncio.create_task(terminate_in_a_group()).add_done_callback(tell)
        else:
            await terminate_between_a_result_and_its_waiters()
        await asyncio.sleep(60)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.usefixtures("prefect_harness")
def test_a_flow_ends_wherever_its_event_loop_is(where: str) -> None:
    with pytest.raises(TerminationSignal):
        asyncio.run(wait_long(where))


@flow(name="asked")
async def ask_prefect() -> list[bool]:
    """Return whether Prefect would take a worker's wish to cancel: outside, inside, nested, and outside again."""
    asked = [can_ack_control_intent()]
    async with no_sigterm_lost():
        asked.append(can_ack_control_intent() and signal.getsignal(signal.SIGTERM) is not PREFECTS)
        async with no_sigterm_lost():
            asked.append(can_ack_control_intent())
        asked.append(signal.getsignal(signal.SIGTERM) is not PREFECTS)
    return [*asked, can_ack_control_intent(), signal.getsignal(signal.SIGTERM) is PREFECTS]


@pytest.mark.usefixtures("prefect_harness")
def test_prefect_takes_the_handler_for_its_own_and_gets_its_own_back() -> None:
    assert asyncio.run(ask_prefect()) == [True] * 6


@flow(name="deaf")
async def wait_deaf() -> None:
    async with no_sigterm_lost():
        with contextlib.suppress(asyncio.CancelledError):
            terminate()
            await asyncio.sleep(60)


@flow(name="computing")
async def compute_on() -> None:
    async with no_sigterm_lost():
        terminate()
        terminate()
        pytest.fail("the second signal was to end this")


@pytest.mark.parametrize("deaf", [wait_deaf, compute_on])
@pytest.mark.usefixtures("prefect_harness")
def test_neither_a_swallowed_cancellation_nor_a_computation_outlasts_it(deaf: Any) -> None:
    with pytest.raises(TerminationSignal):
        asyncio.run(deaf())


async def test_a_cancellation_of_another_kind_stays_one() -> None:
    async def waiting() -> None:
        async with no_sigterm_lost():
            await asyncio.sleep(60)

    task = asyncio.create_task(waiting())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
