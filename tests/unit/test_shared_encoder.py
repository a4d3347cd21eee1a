"""Encoding for many requests at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from reward_server.errors import BadInput
from reward_server.schemas import ScoreRequest
from reward_server.shared_encoder import SharedEncoder


class Tokenizer:
    """Encodes a title as its length, waiting at a door; a title of the word «bad» cannot be encoded."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.entered = threading.Event()
        self.door = threading.Event()

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        self.calls.append(len(requests))
        self.entered.set()
        assert self.door.wait(30)
        if any(request.title == "bad" for request in requests):
            raise BadInput("too long")
        return [[len(request.title)] for request in requests]


def request(title: str) -> ScoreRequest:
    return ScoreRequest(title=title, scraped_body="")


async def test_what_is_asked_meanwhile_is_encoded_together_and_a_bad_one_fails_alone() -> None:
    tokenizer = Tokenizer()
    encoder = SharedEncoder(tokenizer)
    first = asyncio.create_task(encoder.encode([request("a")]))
    await asyncio.to_thread(tokenizer.entered.wait, 30)
    later = [asyncio.create_task(encoder.encode([request(t) for t in titles])) for titles in (["bb"], ["c", "ddd"])]
    bad = asyncio.create_task(encoder.encode([request("bad")]))
    gone = asyncio.create_task(encoder.encode([request("gone")]))
    await asyncio.sleep(0)
    gone.cancel()
    tokenizer.door.set()
    assert await first == [[1]]
    assert [await task for task in later] == [[[2]], [[1], [3]]]
    with pytest.raises(BadInput):
        await bad
    assert tokenizer.calls == [1, 5, 1, 2, 1, 1]
    assert await encoder.encode([request("again")]) == [[5]]
    encoder.stop()


async def test_who_asks_a_stopped_encoder_hears_of_it() -> None:
    tokenizer = Tokenizer()
    tokenizer.door.set()
    encoder = SharedEncoder(tokenizer)
    encoder.stop()
    with pytest.raises(RuntimeError):
        await encoder.encode([request("a")])
