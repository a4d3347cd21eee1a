"""Serves the reward server on a free port inside the test's own event loop, asks it and holds the starter scorer."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn

from reward_server.app import create_app
from reward_server.scorer import Scorer, load_scorer, silence_transformers
from reward_server.service import RewardService
from reward_server.settings import RewardServerSettings

GOOD = {"title": "Norwind ships a database", "scraped_body": "Norwind ships a faster database.", "by": None}
"""A request that is answered with a score."""


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Yield the address of a uvicorn server of `app`."""
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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

    def __init__(self, *, prefix_sharing: bool = False) -> None:
        """Without `prefix_sharing` the token budget alone says how many texts make a batch."""
        self.__dict__.update(starter_scorer().__dict__)
        self.shares_prefixes = prefix_sharing
        self.entered = threading.Event()
        self.door = threading.Event()
        self.batches: list[int] = []

    def score_tokens(self, batch: Sequence[list[int]]) -> list[float]:
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


async def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true within 30 s")


async def figure(http: httpx.AsyncClient, url: str, name: str) -> float:
    """Return one line of the server's metrics."""
    lines = (await http.get(f"{url}/metrics")).text.splitlines()
    [value] = [line.rpartition(" ")[2] for line in lines if line.startswith(f"reward_server_{name} ")]
    return float(value)


async def is_error(response: httpx.Response, status: int, word: str, *parts: str) -> None:
    """Assert that `response` refuses as described, with `parts` in its message."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert set(answer) == {"error", "message"}
    assert answer["error"] == word
    for part in parts:
        assert part in answer["message"]
