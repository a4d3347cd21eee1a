"""Loads as training makes them: stories with six titles each, sent by clients that cost next to nothing."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from reward_server.client import RewardClient, RewardInput
from reward_server.joined import JoinedScores

TITLES = 6
"""Titles of one story: a trajectory group."""
STORIES = 8
"""Stories of one training step."""
_TEXT = """Norwind ships a faster database for 42 labs in Oslo, and the source is open. Nobody had asked before; its
users measured 40% fewer writes when they pulled the power cord, the founders said on Tuesday. An early import of rows
took nine minutes on two cores and costs $12 a month"""
_WORDS = _TEXT.split()

Title = dict[str, str]


class Stories:
    """Makes stories, never the same twice."""

    def __init__(self, tokenizer: Any, seed: int = 1) -> None:
        """`tokenizer` is that of the reward model."""
        self._tokenizer = tokenizer
        self._random = random.Random(seed)

    def steps(self, count: int, body_tokens: int) -> list[Title]:
        """Return the titles of `count` training steps, whose bodies have about `body_tokens` tokens."""
        return [title for _ in range(count * STORIES) for title in self._story(body_tokens)]

    def _story(self, body_tokens: int) -> list[Title]:
        length = round(body_tokens * self._random.uniform(0.9, 1.0))
        words = " ".join(self._random.choices(_WORDS, k=length))  # a word has one token or more
        offsets = self._tokenizer([words], return_offsets_mapping=True)["offset_mapping"][0]
        body = words[: offsets[length - 1][1]]
        return [
            {"title": " ".join(self._random.choices(_WORDS, k=self._random.randint(4, 12))), "scraped_body": body}
            for _ in range(TITLES)
        ]


@dataclass
class Answers:
    """What a server answered to a load."""

    scores: list[float]
    seconds: float
    latencies: list[float] = field(default_factory=list)
    """Seconds of each request."""

    @property
    def per_second(self) -> float:
        """Titles per second."""
        return len(self.scores) / self.seconds


class Connection:
    """One keep-alive HTTP connection, reduced to what a load needs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect to the server at `url`."""
        address = urlsplit(url)
        return cls(*await asyncio.open_connection(address.hostname, address.port))

    async def post(self, path: str, body: bytes) -> Any:
        """Return the decoded answer. Raises `RuntimeError` where it is not 200."""
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self._writer.write(head.encode() + b"\r\n\r\n" + body)
        status, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        [length] = [int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length:")]
        content = await self._reader.readexactly(length)
        if " 200 " not in status:
            raise RuntimeError(f"POST {path} was answered with {status}: {content[:300]!r}")
        return json.loads(content)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


async def send_singly(url: str, titles: Sequence[Title], clients: int) -> Answers:
    """Send each title in a request of its own, `clients` of them at a time, in order."""
    bodies = [json.dumps(title).encode() for title in titles]
    connections = [await Connection.open(url) for _ in range(min(clients, len(bodies)))]
    scores = [0.0] * len(bodies)
    latencies = [0.0] * len(bodies)
    left = iter(range(len(bodies)))

    async def work(connection: Connection) -> None:
        for index in left:
            sent = time.perf_counter()
            scores[index] = (await connection.post("/score", bodies[index]))["score"]
            latencies[index] = time.perf_counter() - sent

    start = time.perf_counter()
    await asyncio.gather(*(work(connection) for connection in connections))
    seconds = time.perf_counter() - start
    for connection in connections:
        connection.close()
    return Answers(scores, seconds, latencies)


async def send_joined(url: str, titles: Sequence[Title]) -> Answers:
    """Send titles at once as ART's loop does: through the project's client, which joins them into few requests."""
    latencies = [0.0] * len(titles)

    async def score(scores: JoinedScores, index: int) -> float:
        sent = time.perf_counter()
        answer = await scores.score(RewardInput(titles[index]["title"], titles[index]["scraped_body"]))
        latencies[index] = time.perf_counter() - sent
        return answer.score

    async with RewardClient(url) as client:
        await client.score(RewardInput("A title", "A body."))  # connects, as a training has from its second step on
        joined = JoinedScores(client)
        start = time.perf_counter()
        scores = await asyncio.gather(*(score(joined, index) for index in range(len(titles))))
        return Answers(scores, time.perf_counter() - start, latencies)


async def send_together(url: str, titles: Sequence[Title]) -> Answers:
    """Send titles in one request, as TRL's reward function does."""
    connection = await Connection.open(url)
    start = time.perf_counter()
    answer = await connection.post("/score/batch", json.dumps(list(titles)).encode())
    seconds = time.perf_counter() - start
    connection.close()
    return Answers([entry["score"] for entry in answer], seconds, [seconds])


async def send_steps(titles: Sequence[Title], send: Callable[[Sequence[Title]], Awaitable[Answers]]) -> Answers:
    """`send` the titles of one training step after the other."""
    size = STORIES * TITLES
    answers = Answers([], 0.0)
    for place in range(0, len(titles), size):
        part = await send(titles[place : place + size])
        answers.scores += part.scores
        answers.seconds += part.seconds
        answers.latencies += part.latencies
    return answers
