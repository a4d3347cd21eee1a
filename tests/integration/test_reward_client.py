"""The client against a server that misbehaves in every way it should survive or report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from serving import serving
from starlette.types import Receive, Scope, Send

from reward_server.client import RewardClient, RewardInput
from reward_server.schemas import ScoreRequest
from tasks.titles.errors import ConfigError, ServiceRejected, ServiceUnavailable
from tasks.titles.story import Story

ITEM = RewardInput(title="A title", scraped_body="A body.", time=datetime(2024, 5, 1, tzinfo=UTC))
FINE = (200, {}, b'{"score": 1.5, "version": "abc"}')
Answer = tuple[int, dict[str, str], bytes]


class Moody:
    """An ASGI server that gives the next answer of a list to each request, and keeps the requests."""

    def __init__(self) -> None:
        self.answers: list[Answer | str] = []
        self.bodies: list[Any] = []
        self.times: list[float] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(json.loads(body) if body else None)
        self.times.append(asyncio.get_running_loop().time())
        answer = self.answers.pop(0)
        if answer == "hang":
            await receive()  # until the client gives up
            return
        if answer == "break":
            raise ConnectionError("the server breaks off")
        status, headers, content = answer
        encoded = [(key.encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": encoded})
        if content == b"stop half way":
            raise ConnectionError("the server breaks off")
        await send({"type": "http.response.body", "body": content})


@pytest.fixture
async def server() -> AsyncIterator[tuple[Moody, Callable[..., RewardClient]]]:
    moody = Moody()
    async with serving(moody) as url:
        yield moody, lambda **options: RewardClient(url, **options)
    assert moody.answers == [], "the client asked less often than expected"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.client._FIRST_PAUSE_S", 0.001)


Server = tuple[Moody, Callable[..., RewardClient]]


@pytest.mark.parametrize(
    "trouble",
    [
        [(429, {}, b"")],
        [(502, {}, b""), (503, {}, b""), (504, {}, b"")],
        [(200, {"Content-Length": "100"}, b"stop half way")],
        ["hang"],
    ],
    ids=["429", "502 503 504", "broken off", "too slow"],
)
async def test_transient_failures_are_retried(server: Server, trouble: list[Any]) -> None:
    moody, client_of = server
    moody.answers = [*trouble, FINE]
    async with client_of(timeout_s=0.5) as client:
        answer = await client.score(ITEM)
    assert (answer.score, answer.version) == (1.5, "abc")
    assert len(moody.bodies) == len(trouble) + 1
    assert all(body == moody.bodies[0] for body in moody.bodies)


async def test_retries_end(server: Server) -> None:
    moody, client_of = server
    moody.answers = [(503, {}, b"loading")] * 3
    async with client_of(retries=2) as client:
        with pytest.raises(ServiceUnavailable, match=r"3 times.*503: loading"):
            await client.score(ITEM)


async def test_retry_after_is_honoured(server: Server) -> None:
    moody, client_of = server
    moody.answers = [(429, {"Retry-After": "1"}, b""), (503, {"Retry-After": "Wed, 21 Oct"}, b""), FINE]
    async with client_of() as client:
        await client.score(ITEM)
    first, second, third = moody.times
    assert second - first >= 1
    assert third > second


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 302])
async def test_what_is_not_transient_is_asked_once(server: Server, status: int) -> None:
    moody, client_of = server
    moody.answers = [(status, {}, b"no")]
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match=f"HTTP {status}: no"):
            await client.score(ITEM)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b'{"score": 1.0}',
        b'{"version": "abc"}',
        b'{"score": null, "version": "abc"}',
        b'{"score": "1.0", "version": "abc"}',
        b'{"score": true, "version": "abc"}',
        b'{"score": NaN, "version": "abc"}',
        b'{"score": -Infinity, "version": "abc"}',
        b'{"score": 1.0, "version": null}',
    ],
)
async def test_an_unusable_score_is_no_score(server: Server, content: bytes) -> None:
    moody, client_of = server
    moody.answers = [(200, {}, content)]
    async with client_of() as client:
        with pytest.raises(ServiceRejected):
            await client.score(ITEM)


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_a_list_of_another_length_is_refused(server: Server, count: int) -> None:
    moody, client_of = server
    moody.answers = [(200, {}, json.dumps([{"score": 1.0, "version": "abc"}] * count).encode())]
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match="list of 2 scores"):
            await client.score_batch([ITEM, ITEM])


@pytest.mark.parametrize("content", [b"{}", b'"ok"', b'{"status": "ok", "score": NaN}'])
async def test_the_health_of_another_server_is_refused(server: Server, content: bytes) -> None:
    moody, client_of = server
    moody.answers = [(200, {}, content)]
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match="no health of a reward server"):
            await client.health()


async def test_nobody_listens() -> None:
    async with RewardClient("http://127.0.0.1:9", retries=1) as client:
        with pytest.raises(ServiceUnavailable, match=r"2 times.*ConnectError"):
            await client.score(ITEM)


@pytest.mark.parametrize("url", ["127.0.0.1:7000", "ftp://host", "http://", ""])
def test_what_is_no_address_is_a_users_mistake(url: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        RewardClient(url)


async def test_half_a_surrogate_pair_is_refused() -> None:
    async with RewardClient("http://127.0.0.1:9") as client:
        with pytest.raises(ServiceRejected, match="surrogate"):
            await client.score(RewardInput("\ud800", "body"))


async def test_a_story_arrives_whole_with_the_other_title(server: Server) -> None:
    moody, client_of = server
    moody.answers = [FINE]
    moment = datetime(2024, 5, 1, 12, 30, tzinfo=UTC)
    story = Story("7", "dang", moment, "Its own", "https://example.org", 9, "Die naïve Größe 🚀", "test")
    async with client_of() as client:
        await client.score(RewardInput.from_story(story, "Another"))
    received = ScoreRequest.model_validate(moody.bodies[0])
    assert received == ScoreRequest(
        title="Another", by="dang", time=moment, scraped_body="Die naïve Größe 🚀", url="https://example.org"
    )
