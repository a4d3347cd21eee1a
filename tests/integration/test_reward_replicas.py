"""Several reward servers behind one address, connections spread over those that live, as a Kubernetes Service does."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from reward_server.client import RewardClient, RewardInput
from reward_server.process import RewardServerProcess
from tasks.starter.world import generate_stories

ITEMS = [
    RewardInput(title=story.title, scraped_body=story.scraped_body, time=story.time) for story in generate_stories(24)
]


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def one_address(urls: list[str]) -> AsyncIterator[tuple[str, Counter[str]]]:
    """Yield an address whose connections go to each of `urls` in turn, dead ones left out; and where they went."""
    turns = itertools.cycle(urls)
    went: Counter[str] = Counter()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for url in itertools.islice(turns, len(urls)):
            try:
                there = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
            except ConnectionError:
                continue
            went[url] += 1
            await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))
            return
        writer.close()

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", went


async def test_replicas_score_alike_and_one_that_dies_costs_no_title(reward_server_url: str, tmp_path: Path) -> None:
    async with RewardClient(reward_server_url) as alone:
        expected = await asyncio.gather(*(alone.score(item) for item in ITEMS))
    other = RewardServerProcess("starter", log_path=tmp_path / "reward.log", threads=1)
    async with other, one_address([reward_server_url, other.url]) as (url, went), RewardClient(url) as client:
        together = await asyncio.gather(*(client.score(item) for item in ITEMS))
        assert went[reward_server_url] > 1 and went[other.url] > 1
        assert {score.version for score in together} == {expected[0].version}
        scores = [score.score for score in expected]
        assert [score.score for score in together] == pytest.approx(scores, abs=1e-4)

        under_way = asyncio.gather(*(client.score(item) for item in ITEMS))
        await asyncio.sleep(0.05)
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        assert [score.score for score in await under_way] == pytest.approx(scores, abs=1e-4)
        assert (await client.health()).version == expected[0].version
