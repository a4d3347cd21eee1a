"""Serves an ASGI application on a free port inside the test's own event loop, and holds the starter scorer."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from reward_server.app import create_app
from reward_server.scorer import Scorer, load_scorer, silence_transformers
from reward_server.service import RewardService
from reward_server.settings import RewardServerSettings


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Yield the address of a uvicorn server of `app`."""
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@functools.cache
def starter_scorer() -> Scorer:
    """Return the starter reward model, loaded once for all tests."""
    silence_transformers()
    return load_scorer(RewardServerSettings(threads=1))


class HeldScorer(Scorer):
    """The starter scorer, whose batches wait at a door until it is opened."""

    def __init__(self) -> None:
        self.__dict__.update(starter_scorer().__dict__)
        self.entered = threading.Event()
        self.door = threading.Event()
        self.batches: list[int] = []

    def score_tokens(self, batch: Sequence[Sequence[int]]) -> list[float]:
        self.batches.append(len(batch))
        self.entered.set()
        assert self.door.wait(60)
        return super().score_tokens(batch)


@asynccontextmanager
async def serving_scorer(scorer: Scorer, **settings: Any) -> AsyncIterator[tuple[str, RewardService]]:
    """Yield the address of a reward server with an already loaded `scorer`, and its service."""
    app = create_app(RewardServerSettings(**settings), load=lambda _: scorer)
    async with serving(app) as url:
        await app.state.service.wait_loaded()
        yield url, app.state.service
