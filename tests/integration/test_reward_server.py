"""The reward server over HTTP, with the starter reward model."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest
from serving import GOOD, HeldScorer, is_error, serving, serving_scorer, starter_scorer

from reward_server.__main__ import _listen
from reward_server.app import create_app
from reward_server.check import check_server, plain_scores
from reward_server.client import RewardClient, RewardInput
from reward_server.model_files import find_model
from reward_server.schemas import MAX_BATCH, MAX_BODY, MAX_TITLE
from reward_server.scorer import Scorer
from reward_server.settings import RewardServerSettings
from tasks.starter.paths import HELDOUT_REWARD_MODEL
from tasks.titles.errors import ServiceRejected, ServiceUnavailable

WORDS = ("Norwind", "ships", "a", "faster", "database", "for", "42", "labs", "<b>", "naïve", "標題", "in", "2024", ".")


pytestmark = pytest.mark.usefixtures("no_settings_around")


def random_inputs(count: int, longest: int = 300) -> list[RewardInput]:
    generator = random.Random(3)
    return [
        RewardInput(
            title=f"{index} " + " ".join(generator.choices(WORDS, k=generator.randint(1, 12))),
            scraped_body=" ".join(generator.choices(WORDS, k=generator.randint(1, longest))),
            by=generator.choice(["", "dang"]),
            url=generator.choice(["", "https://example.org/a?b=c"]),
        )
        for index in range(count)
    ]


# scores


async def test_batched_scores_equal_plain_forward_passes() -> None:
    inputs = random_inputs(40)
    scorer = HeldScorer(prefix_sharing=True)
    async with serving_scorer(scorer, token_budget=4096) as (url, _), RewardClient(url) as client:
        asking = [asyncio.create_task(client.score(item)) for item in inputs[:24]]
        asking_batch = asyncio.create_task(client.score_batch(inputs[24:]))
        await asyncio.to_thread(scorer.entered.wait, 30)
        await asyncio.sleep(0.3)
        scorer.door.set()
        answers = [*await asyncio.gather(*asking), *await asking_batch]
    plain = plain_scores(find_model("starter"), inputs, max_length=2048)
    assert [answer.score for answer in answers] == pytest.approx(plain, abs=1e-4)
    assert len({answer.score for answer in answers}) > 20
    assert {answer.version for answer in answers} == {find_model("starter").version()}
    assert sum(scorer.batches) == len(inputs)
    assert max(scorer.batches) > 4


async def test_null_empty_and_absent_fields_are_the_same(http: httpx.AsyncClient) -> None:
    async with serving_scorer(starter_scorer()) as (url, _):
        variants = [
            {},
            {"by": None, "url": None, "time": None},
            {"by": "", "url": ""},
        ]
        scores = {(await http.post(f"{url}/score", json={**GOOD, **variant})).json()["score"] for variant in variants}
        assert len(scores) == 1
        dates = [1714564800, "2024-05-01T12:00:00Z", "2024-05-01"]
        dated = {(await http.post(f"{url}/score", json={**GOOD, "time": date})).json()["score"] for date in dates}
        assert len(dated) == 1
        assert dated != scores


async def test_health_asks_the_model(http: httpx.AsyncClient) -> None:
    scorer = starter_scorer()
    async with serving_scorer(scorer) as (url, _):
        async with RewardClient(url) as client:
            health = await client.health()
        assert health.score == scorer.probe()
        assert (health.model, health.version, health.device) == ("starter", scorer.version, "cpu")
        is_down = await http.get(f"{url}/nothing")
        await is_error(is_down, 404, "not_found")


async def test_long_lists_travel_in_several_requests() -> None:
    inputs = random_inputs(MAX_BATCH + 5, longest=3)
    async with serving_scorer(starter_scorer()) as (url, _), RewardClient(url) as client:
        scores = [answer.score for answer in await client.score_batch(inputs)]
        assert await client.score_batch([]) == []
        assert len(scores) == len(inputs)
        assert (await client.score(inputs[-1])).score == pytest.approx(scores[-1], abs=1e-4)


# refusals


async def test_401_with_another_key_or_none(http: httpx.AsyncClient) -> None:
    async with serving_scorer(starter_scorer(), api_key="right") as (url, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            for method, path in (("POST", "/score"), ("POST", "/score/batch"), ("GET", "/health"), ("GET", "/metrics")):
                refused = await http.request(method, url + path, headers=headers, json=GOOD)
                await is_error(refused, 401, "unauthorized", "Authorization: Bearer")
                assert refused.headers["WWW-Authenticate"] == "Bearer"
        # The key is looked at before the body, and a key may be any bytes.
        assert (await http.post(f"{url}/score", headers={"Authorization": b"Bearer \xff"})).status_code == 401
        assert (await http.get(f"{url}/openapi.json")).status_code == 200
        async with RewardClient(url, api_key="right") as client:
            await client.health()
            await client.score(RewardInput(**GOOD))  # type: ignore[arg-type]
        async with RewardClient(url, api_key="wrong") as client:
            with pytest.raises(ServiceRejected, match="401"):
                await client.health()


async def test_413_by_announced_and_by_real_length(http: httpx.AsyncClient) -> None:
    async with serving_scorer(starter_scorer(), max_request_bytes=2000) as (url, _):
        large = json.dumps({**GOOD, "scraped_body": "x" * 2000}).encode()
        await is_error(await http.post(f"{url}/score", content=large), 413, "too_large", "2000 bytes")

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 500):
                yield large[start : start + 500]

        request = http.build_request("POST", f"{url}/score", content=pieces())
        assert "content-length" not in request.headers
        await is_error(await http.send(request), 413, "too_large")
        small = {**GOOD, "scraped_body": "x" * 1000}
        assert (await http.post(f"{url}/score", json=small)).status_code == 200


BAD_BODIES: dict[str, tuple[str, bytes]] = {
    "no body": ("/score", b""),
    "no JSON": ("/score", b"{"),
    "no UTF-8": ("/score", b'{"title": "\xff"}'),
    "too deep": ("/score", b"[" * 100_000),
    "half a surrogate pair": ("/score", json.dumps({**GOOD, "title": "\ud800"}).encode()),
    "half a surrogate pair in a key": ("/score", json.dumps({**GOOD, "\ud800": 1}).encode()),
    "a list instead of one": ("/score", json.dumps([GOOD]).encode()),
    "one instead of a list": ("/score/batch", json.dumps(GOOD).encode()),
    "empty list": ("/score/batch", b"[]"),
    "long list": ("/score/batch", json.dumps([GOOD] * (MAX_BATCH + 1)).encode()),
    "one bad of two": ("/score/batch", json.dumps([GOOD, {**GOOD, "title": None}]).encode()),
    "blank title": ("/score", json.dumps({**GOOD, "title": "  "}).encode()),
    "long title": ("/score", json.dumps({**GOOD, "title": "x" * (MAX_TITLE + 1)}).encode()),
    "long body": ("/score", json.dumps({**GOOD, "scraped_body": "x" * (MAX_BODY + 1)}).encode()),
    "no such time": ("/score", json.dumps({**GOOD, "time": "yesterday"}).encode()),
    "time is no number": ("/score", json.dumps({**GOOD, "time": float("nan")}).encode()),
    "misspelt": ("/score", json.dumps({**GOOD, "scrapped_body": ""}).encode()),
}


async def test_422_for_bad_input(http: httpx.AsyncClient) -> None:
    async with serving_scorer(starter_scorer()) as (url, _):
        for name, (path, body) in BAD_BODIES.items():
            response = await http.post(url + path, content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 422, (name, response.text)
            await is_error(response, 422, "bad_input")
            assert len(response.text) < 1000, name
        plain = await http.post(f"{url}/score", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
        await is_error(plain, 422, "bad_input")


async def test_422_where_the_title_alone_is_too_long(http: httpx.AsyncClient) -> None:
    scorer = HeldScorer()
    scorer.door.set()
    scorer.max_length = 100
    async with serving_scorer(scorer) as (url, service):
        response = await http.post(f"{url}/score", json={**GOOD, "title": "ti tle " * 200})
        await is_error(response, 422, "bad_input", "100 tokens")
        assert (await http.post(f"{url}/score", json={**GOOD, "scraped_body": "bo dy " * 200})).status_code == 200
        assert service.batcher().waiting == 0


async def test_429_when_full(http: httpx.AsyncClient) -> None:
    scorer = HeldScorer()
    async with serving_scorer(scorer, queue_size=MAX_BATCH, token_budget=512) as (url, service):
        first = asyncio.create_task(http.post(f"{url}/score/batch", json=[GOOD] * MAX_BATCH))
        await asyncio.to_thread(scorer.entered.wait, 30)
        full = await http.post(f"{url}/score/batch", json=[GOOD] * MAX_BATCH)
        await is_error(full, 429, "queue_full")
        assert int(full.headers["Retry-After"]) >= 1
        async with RewardClient(url, retries=0) as client:
            with pytest.raises(ServiceUnavailable, match="429"):
                await client.score_batch([RewardInput("t", "b")] * MAX_BATCH)
        scorer.door.set()
        answered = await first
        assert answered.status_code == 200
        assert len(answered.json()) == MAX_BATCH
        assert service.batcher().waiting == 0
        assert (await http.post(f"{url}/score", json=GOOD)).status_code == 200


async def test_503_while_loading(http: httpx.AsyncClient) -> None:
    may_load = threading.Event()

    def load(_: RewardServerSettings) -> Scorer:
        assert may_load.wait(60)
        return starter_scorer()

    app = create_app(RewardServerSettings(), load=load)
    async with serving(app) as url:
        for response in (await http.get(f"{url}/health"), await http.post(f"{url}/score", json=GOOD)):
            await is_error(response, 503, "not_ready", "being loaded")
            assert int(response.headers["Retry-After"]) >= 1
        may_load.set()
        await app.state.service.wait_loaded()
        assert (await http.get(f"{url}/health")).status_code == 200


async def test_503_with_the_reason_where_the_model_cannot_be_loaded(http: httpx.AsyncClient) -> None:
    app = create_app(RewardServerSettings(model="/nowhere/model"))
    async with serving(app) as url:
        await app.state.service.wait_loaded()
        await is_error(await http.get(f"{url}/health"), 503, "not_ready", "/nowhere/model")


def test_connections_do_not_hold_back_small_pieces() -> None:
    # asyncio sets the option itself where a socket names its protocol: on an inherited one.
    with _listen(RewardServerSettings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    with socket.create_server(("127.0.0.1", 0)) as given, _listen(RewardServerSettings(fd=given.fileno())) as listener:
        assert listener.proto == socket.IPPROTO_TCP
        given.detach()


# the check


async def test_check_passes_on_its_own_model_and_fails_on_another() -> None:
    async with serving_scorer(starter_scorer()) as (url, _):
        report = await check_server(url, "starter", measure_s=0.1)
        assert report.passed, report.results
        assert [result.name for result in report.results] == [
            "up", "same weights", "deterministic", "equal to transformers",
        ]  # fmt: skip
        assert report.single_per_s is not None
        assert report.batch_per_s is not None
        other = await check_server(url, str(HELDOUT_REWARD_MODEL), measure_s=0.1)
        assert not other.passed
        assert {result.name for result in other.results if not result.passed} == {
            "same weights", "equal to transformers",
        }  # fmt: skip


class MoodyScorer(HeldScorer):
    """Says something else each time."""

    def score_tokens(self, batch: Sequence[list[int]]) -> list[float]:
        return [score + len(self.batches) for score in super().score_tokens(batch)]


async def test_check_fails_on_a_server_that_is_not_deterministic() -> None:
    scorer = MoodyScorer()
    scorer.door.set()
    async with serving_scorer(scorer) as (url, _):
        report = await check_server(url, "starter", measure_s=0.1)
    assert "deterministic" in {result.name for result in report.results if not result.passed}


async def test_check_says_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.client._FIRST_PAUSE_S", 0.01)
    report = await check_server("http://127.0.0.1:9", "starter")
    assert not report.passed
    assert [result.name for result in report.results] == ["up"]
