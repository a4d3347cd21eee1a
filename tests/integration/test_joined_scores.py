"""Titles that are asked for at the same moment travel in one request, and do not suffer for each other."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from serving import HeldScorer, figure, serving_scorer, starter_scorer, wait_for

from reward_server.client import RewardClient, RewardInput
from reward_server.joined import JoinedScores
from reward_server.schemas import MAX_TITLE
from tasks.titles.errors import ServiceRejected, ServiceUnavailable

pytestmark = pytest.mark.usefixtures("no_settings_around")

ITEMS = [RewardInput(f"Title {number}", f"Body {number // 6}. " * 20) for number in range(48)]
ALONE, BATCHES = ('request_seconds_count{path="/score"}', 'request_seconds_count{path="/score/batch"}')


async def test_titles_of_one_moment_travel_together(http: httpx.AsyncClient) -> None:
    async with serving_scorer(starter_scorer()) as (url, _), RewardClient(url) as client:
        expected = [await client.score(item) for item in ITEMS[:3]]
        joined = JoinedScores(client)
        answers = await asyncio.gather(*(joined.score(item) for item in ITEMS))
        assert [answer.version for answer in answers] == [expected[0].version] * len(ITEMS)
        found = [answer.score for answer in answers[:3]]
        assert found == pytest.approx([answer.score for answer in expected], abs=1e-4)
        assert await figure(http, url, BATCHES) == 1
        await joined.score(ITEMS[0])
        assert await figure(http, url, BATCHES) == 1
        assert await figure(http, url, ALONE) == 4


async def test_a_request_holds_so_much_text(http: httpx.AsyncClient) -> None:
    scorer = HeldScorer()
    scorer.door.set()
    long = [RewardInput(f"Title {number}", "word " * 30_000) for number in range(5)]
    async with serving_scorer(scorer) as (url, _), RewardClient(url) as client:
        joined = JoinedScores(client)
        await asyncio.gather(*(joined.score(item) for item in long))
        assert await figure(http, url, BATCHES) == 2
        assert await figure(http, url, ALONE) == 1


async def test_a_refused_title_fails_alone() -> None:
    bad = RewardInput("x" * (MAX_TITLE + 1), "A body.")
    async with serving_scorer(starter_scorer()) as (url, _), RewardClient(url) as client:
        joined = JoinedScores(client)
        asked = [*ITEMS[:2], bad, ITEMS[2]]
        answers = await asyncio.gather(*(joined.score(item) for item in asked), return_exceptions=True)
        assert isinstance(answers[2], ServiceRejected)
        assert "422" in str(answers[2])
        expected = [(await client.score(item)).score for item in ITEMS[:3]]
        found = [answer.score for answer in answers if not isinstance(answer, BaseException)]
        assert found == pytest.approx(expected, abs=1e-4)


async def test_each_caller_gets_an_error_of_its_own() -> None:
    async with RewardClient("http://127.0.0.1:9", retries=0) as client:
        joined = JoinedScores(client)
        errors = await asyncio.gather(*(joined.score(item) for item in ITEMS[:3]), return_exceptions=True)
    assert all(isinstance(error, ServiceUnavailable) and "127.0.0.1:9" in str(error) for error in errors)
    assert len(set(map(id, errors))) == 3


async def test_one_caller_that_leaves_takes_nothing_from_the_others() -> None:
    scorer = HeldScorer()
    async with serving_scorer(scorer) as (url, _), RewardClient(url) as client:
        joined = JoinedScores(client)
        asking = [asyncio.create_task(joined.score(item)) for item in ITEMS[:3]]
        await wait_for(scorer.entered.is_set)
        asking[1].cancel()
        scorer.door.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(answers[1], asyncio.CancelledError)
        assert [type(answer).__name__ for answer in answers] == ["Score", "CancelledError", "Score"]


async def test_a_request_ends_when_all_its_callers_have_left(http: httpx.AsyncClient) -> None:
    scorer = HeldScorer()
    async with serving_scorer(scorer) as (url, service), RewardClient(url) as client:
        first = asyncio.create_task(client.score(ITEMS[0]))
        await wait_for(scorer.entered.is_set)
        joined = JoinedScores(client)
        asking = [asyncio.create_task(joined.score(item)) for item in ITEMS[:3]]
        await wait_for(lambda: service.batcher().waiting == 3)
        for one in asking:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await wait_for(lambda: service.batcher().waiting == 0)
        assert await figure(http, url, "texts_dropped_total") == 3
        scorer.door.set()
        await first
        # Those who come later have a request of their own.
        assert (await joined.score(ITEMS[1])).version
