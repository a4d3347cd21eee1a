"""SIGTERM while a flow waits in an event loop."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from prefect import flow

from flows.termination import cancelled_by_sigterm


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@flow(name="waiting")
async def wait_long(*, in_a_callback: bool) -> None:
    async with cancelled_by_sigterm():
        if in_a_callback:
            # What Prefect's handler raises here, asyncio only logs.
            asyncio.get_running_loop().call_soon(terminate)
        else:
            terminate()
        await asyncio.sleep(60)


@pytest.mark.parametrize("in_a_callback", [False, True])
@pytest.mark.usefixtures("prefect_harness")
def test_a_flow_ends_wherever_its_event_loop_is(in_a_callback: bool) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(wait_long(in_a_callback=in_a_callback))
    assert signal.getsignal(signal.SIGTERM) is before


async def test_the_handler_from_before_stands_again_afterwards() -> None:
    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        async with cancelled_by_sigterm():
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
