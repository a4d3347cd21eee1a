"""What the queue of the reward server promises: every waiter is answered, and titles of one body come together."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence

import httpx
import pytest
import torch
from serving import GOOD, HeldScorer, figure, is_error, serving_scorer, starter_scorer, wait_for

from reward_server.check import plain_scores
from reward_server.client import RewardClient, RewardInput
from reward_server.model_files import find_model
from reward_server.schemas import ScoreRequest
from tasks.titles.errors import ServiceRejected

pytestmark = pytest.mark.usefixtures("no_settings_around")

# every waiter is answered


class BrokenScorer(HeldScorer):
    """Raises on a batch with a title that says so, and answers no number to another."""

    def score_tokens(self, batch: Sequence[list[int]]) -> list[float]:
        scores = super().score_tokens(batch)
        texts = [self._tokenizer.decode(ids) for ids in batch]
        if any("RAISE" in text for text in texts):
            raise RuntimeError("the device is gone")
        return [float("nan") if "NAN" in text else score for text, score in zip(texts, scores, strict=True)]


class SmallMemory(HeldScorer):
    """Has memory for a few texts at a time."""

    def __init__(self, texts: int) -> None:
        super().__init__(prefix_sharing=True)
        self.texts = texts
        self.door.set()

    def score_tokens(self, batch: Sequence[list[int]]) -> list[float]:
        scores = super().score_tokens(batch)
        if len(batch) > self.texts:
            raise torch.OutOfMemoryError("no memory left")
        return scores


async def test_waiters_are_answered_when_the_model_raises(http: httpx.AsyncClient) -> None:
    scorer = BrokenScorer()
    async with serving_scorer(scorer) as (url, service):
        titles = ["hold the door", "RAISE", "a", "b"]
        asking = []
        for title in titles:
            asking.append(asyncio.create_task(http.post(f"{url}/score", json={**GOOD, "title": title})))
            await wait_for(scorer.entered.is_set)
        await wait_for(lambda: len(service.batcher()._waiting) == 3)
        scorer.door.set()
        first, *others = await asyncio.gather(*asking)
        assert first.status_code == 200
        for response in others:
            await is_error(response, 500, "scoring_failed", "the device is gone")
        assert (await http.post(f"{url}/score", json=GOOD)).status_code == 200


async def test_a_score_that_is_no_number_is_an_error_of_its_text_alone(http: httpx.AsyncClient) -> None:
    scorer = BrokenScorer()
    scorer.door.set()
    async with serving_scorer(scorer) as (url, _):
        nan = {**GOOD, "title": "NAN"}
        batch, fine = await asyncio.gather(
            http.post(f"{url}/score/batch", json=[GOOD, nan]), http.post(f"{url}/score", json=GOOD)
        )
        await is_error(batch, 500, "scoring_failed", "nan")
        assert fine.status_code == 200
        async with RewardClient(url) as client:
            with pytest.raises(ServiceRejected, match="nan"):
                await client.score(RewardInput("NAN", "body"))


async def test_waiters_are_answered_when_the_server_stops(http: httpx.AsyncClient) -> None:
    scorer = HeldScorer()
    async with serving_scorer(scorer, token_budget=64) as (url, service):
        asking = [asyncio.create_task(http.post(f"{url}/score", json=GOOD)) for _ in range(5)]
        await wait_for(lambda: scorer.entered.is_set() and len(service.batcher()._waiting) == 4)
        await service.stop()
        for response in await asyncio.gather(*asking):
            await is_error(response, 503, "not_ready", "stops")
        await is_error(await http.get(f"{url}/health"), 503, "not_ready", "stops")
        scorer.door.set()
    assert scorer.batches == [1]


async def test_texts_of_a_client_that_left_are_dropped(http: httpx.AsyncClient) -> None:
    scorer = HeldScorer()
    async with serving_scorer(scorer, token_budget=64) as (url, service):
        staying = asyncio.create_task(http.post(f"{url}/score", json=GOOD))
        await wait_for(scorer.entered.is_set)
        leaving = asyncio.create_task(http.post(f"{url}/score/batch", json=[GOOD] * 7))
        batcher = service.batcher()
        await wait_for(lambda: len(batcher._waiting) == 7)
        leaving.cancel()
        await wait_for(lambda: batcher.waiting == 0)
        assert await figure(http, url, "texts_dropped_total") == 7
        async with asyncio.timeout(30):
            while "client_gone" not in (await http.get(f"{url}/metrics")).text:
                await asyncio.sleep(0.01)
        assert await figure(http, url, 'errors_total{kind="client_gone"}') == 1
        scorer.door.set()
        assert (await staying).status_code == 200
    assert scorer.batches == [1]


async def test_a_batch_that_memory_does_not_hold_is_split(http: httpx.AsyncClient) -> None:
    scorer = SmallMemory(texts=3)
    async with serving_scorer(scorer) as (url, _):
        titles = [{**GOOD, "title": f"Title {index}"} for index in range(12)]
        response = await http.post(f"{url}/score/batch", json=titles)
        assert response.status_code == 200
        scores = [answer["score"] for answer in response.json()]
        assert len(set(scores)) == 12
        for title, score in zip(titles, scores, strict=True):
            alone = await http.post(f"{url}/score", json=title)
            assert alone.json()["score"] == pytest.approx(score, abs=1e-4)
    assert scorer.batches[:7] == [12, 6, 3, 3, 6, 3, 3]


async def test_503_for_a_text_that_memory_does_not_hold_alone(http: httpx.AsyncClient) -> None:
    async with serving_scorer(SmallMemory(texts=0)) as (url, service):
        responses = await asyncio.gather(*(http.post(f"{url}/score", json=GOOD) for _ in range(3)))
        for response in responses:
            await is_error(response, 503, "out_of_memory", "no memory left")
            assert int(response.headers["Retry-After"]) >= 1
        await is_error(await http.get(f"{url}/health"), 503, "out_of_memory")
        assert service.batcher().waiting == 0
        assert await figure(http, url, 'errors_total{kind="out_of_memory"}') == 4


async def test_waiters_are_answered_when_the_worker_fails(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = HeldScorer()
    async with serving_scorer(scorer, token_budget=64) as (url, service):
        asking = [asyncio.create_task(http.post(f"{url}/score", json=GOOD)) for _ in range(5)]
        await wait_for(lambda: scorer.entered.is_set() and len(service.batcher()._waiting) == 4)
        with monkeypatch.context() as broken:
            broken.setattr("reward_server.batching.choose_batch", lambda *_: 1 / 0)
            scorer.door.set()
            first, *others = await asyncio.gather(*asking)
        assert first.status_code == 200
        for response in others:
            await is_error(response, 503, "worker_failed", "ZeroDivisionError")
        assert (await http.get(f"{url}/health")).json()["waiting"] == 0
        assert (await http.post(f"{url}/score", json=GOOD)).status_code == 200


async def test_who_asks_for_health_is_answered_when_the_server_stops(http: httpx.AsyncClient) -> None:
    scorer = HeldScorer()
    async with serving_scorer(scorer) as (url, service):
        asking = asyncio.create_task(http.post(f"{url}/score", json=GOOD))
        await wait_for(scorer.entered.is_set)
        health = asyncio.create_task(http.get(f"{url}/health"))
        await asyncio.sleep(0.2)
        assert not health.done()
        await service.stop()
        await is_error(await health, 503, "not_ready", "stops")
        await is_error(await asking, 503, "not_ready", "stops")
        scorer.door.set()


# titles of one body


def story(index: int, titles: int = 6) -> list[dict[str, str]]:
    body = f"Number {index} of Norwind's labs ships a faster database. " * 12
    return [{"title": f"Title {number} of {index}", "scraped_body": body} for number in range(titles)]


@pytest.mark.parametrize("path", ["/score", "/score/batch"])
async def test_titles_of_a_body_are_scored_together(http: httpx.AsyncClient, path: str) -> None:
    scorer = HeldScorer(prefix_sharing=True)
    titles = [title for index in range(8) for title in story(index)]
    random.Random(1).shuffle(titles)
    async with serving_scorer(scorer) as (url, service):
        first = asyncio.create_task(http.post(f"{url}/score", json=GOOD))
        await wait_for(scorer.entered.is_set)
        contents = titles if path == "/score" else [titles]
        asking = [asyncio.create_task(http.post(url + path, json=content)) for content in contents]
        await wait_for(lambda: len(service.batcher()._waiting) == 48)
        scorer.door.set()
        answers = [response.json() for response in await asyncio.gather(*asking)]
        await first
        shared = await figure(http, url, "tokens_shared_total")
        computed = await figure(http, url, "tokens_computed_total")
    assert all(size % 6 == 0 for size in scorer.batches[1:])
    assert 1 < len(scorer.batches[1:]) < 8
    assert shared > 2 * computed
    scores = [answer["score"] for answer in (answers if path == "/score" else answers[0])]
    inputs = [RewardInput(**title) for title in titles]
    assert scores == pytest.approx(plain_scores(find_model("starter"), inputs, 2048), abs=1e-3)


async def test_the_first_title_of_a_burst_waits_for_the_others(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward_server.batching._BURST_S", 1.0)
    monkeypatch.setattr("reward_server.batching._PAUSE_S", 1.0)
    scorer = HeldScorer(prefix_sharing=True)
    async with serving_scorer(scorer) as (url, service):
        first, *others = story(0)
        asking = [asyncio.create_task(http.post(f"{url}/score", json=first))]
        await wait_for(scorer.entered.is_set)
        asking += [asyncio.create_task(http.post(f"{url}/score", json=title)) for title in others]
        await wait_for(lambda: len(service.batcher()._waiting) == 5)
        scorer.door.set()
        await asyncio.gather(*asking)
        await asyncio.gather(*(http.post(f"{url}/score", json=title) for title in story(1)))
    assert scorer.batches == [1, 5, 6]


async def test_a_title_does_not_wait_where_a_client_sends_one_after_the_other(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward_server.batching._BURST_S", 30.0)
    async with serving_scorer(starter_scorer()) as (url, _), asyncio.timeout(25):
        for title in story(0):
            assert (await http.post(f"{url}/score", json=title)).status_code == 200


class SlowEncoder(HeldScorer):
    """Each call of the encoder waits at a gate; the starter scorer otherwise."""

    def __init__(self) -> None:
        super().__init__(prefix_sharing=True)
        self.gate = threading.Semaphore(0)

    def encode(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        assert self.gate.acquire(timeout=60)
        return super().encode(requests)


async def test_a_title_waits_for_those_of_its_body_that_are_being_encoded(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward_server.batching._SIBLINGS_S", 60.0)
    scorer = SlowEncoder()
    scorer.door.set()
    async with serving_scorer(scorer) as (url, service):
        first = asyncio.create_task(http.post(f"{url}/score", json=GOOD))
        await wait_for(lambda: service.batcher().waiting == 1)
        second = asyncio.create_task(http.post(f"{url}/score", json={**GOOD, "title": "Another"}))
        await wait_for(lambda: service.batcher().waiting == 2)
        scorer.gate.release()  # the first has been encoded and could be scored
        await wait_for(lambda: len(service.batcher()._waiting) == 1)
        scorer.gate.release()
        assert {(await first).status_code, (await second).status_code} == {200}
    assert scorer.batches == [2]


async def test_metrics(http: httpx.AsyncClient) -> None:
    async with serving_scorer(starter_scorer()) as (url, _):
        assert (await http.post(f"{url}/score/batch", json=story(1))).status_code == 200
        assert (await http.post(f"{url}/score", content=b"{")).status_code == 422
        assert (await http.get(f"{url}/nothing")).status_code == 404
        response = await http.get(f"{url}/metrics")
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        expected = {
            "queue_texts": 0,
            "batch_texts_count": 1,
            "batch_texts_sum": 6,
            "batch_seconds_count": 1,
            'request_seconds_count{path="/score"}': 1,
            'request_seconds_count{path="/score/batch"}': 1,
            'errors_total{kind="bad_input"}': 1,
            'errors_total{kind="not_found"}': 1,
            "texts_dropped_total": 0,
        }
        assert {name: await figure(http, url, name) for name in expected} == expected
        assert await figure(http, url, "tokens_shared_total") > await figure(http, url, "tokens_computed_total") > 100
