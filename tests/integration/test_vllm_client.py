"""The client against what vLLM answers, with the starter model's own scores; `tests/gpu` asks vLLM itself."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from serving import serving, serving_scorer, starter_scorer
from starlette.responses import JSONResponse, Response
from vllm_double import NAME, ROOT, VllmDouble, classification

from reward_server.check import check_server, sample_inputs
from reward_server.client import RewardClient, RewardInput
from reward_server.encoding import text_of
from reward_server.schemas import MAX_BATCH, MAX_TITLE, ScoreRequest
from tasks.titles.errors import ConfigError, ServiceRejected, ServiceUnavailable

ITEM = RewardInput(title="A title", scraped_body="A body.")
WORDS = "Its new storage engine writes 40% fewer bytes. "
Server = tuple[VllmDouble, Callable[..., RewardClient]]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    double = VllmDouble()
    async with serving(double.app) as url:
        yield double, lambda **options: RewardClient(f"vllm+{url}", **options)
    assert not any(double.answers.values()), "the client asked less often than expected"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.client._FIRST_PAUSE_S", 0.001)


def text(item: RewardInput) -> str:
    return text_of(ScoreRequest(**asdict(item)))


def own_score(*items: RewardInput) -> list[float]:
    """The scores of a reward server of this project, whose limit is the model's own."""
    return starter_scorer().score_texts([ScoreRequest(**asdict(item)) for item in items])


# scores


async def test_scores_are_those_of_our_own_server(server: Server) -> None:
    double, client_of = server
    items = sample_inputs()
    async with serving_scorer(starter_scorer()) as (url, _), RewardClient(url) as ours, client_of() as client:
        expected = await ours.score_batch(items)
        answers = await client.score_batch(items)
        alone = [await client.score(item) for item in items[:3]]
    assert [answer.score for answer in answers] == pytest.approx([answer.score for answer in expected], abs=1e-4)
    assert [answer.score for answer in alone] == pytest.approx([answer.score for answer in expected[:3]], abs=1e-4)
    assert {answer.version for answer in answers} == {f"vllm:{ROOT}"}
    assert double.texts()[0] == [text(item) for item in items]


async def test_long_lists_travel_in_several_requests_and_the_model_is_asked_for_once(server: Server) -> None:
    double, client_of = server
    items = [replace(ITEM, title=f"Title {number}") for number in range(MAX_BATCH + 2)]
    async with client_of() as client:
        answers = await client.score_batch(items)
        assert await client.score_batch([]) == []
    assert [len(texts) for texts in double.texts()] == [MAX_BATCH, 2]
    assert [path for path, _ in double.asked].count("/v1/models") == 1
    assert [answer.score for answer in answers] == pytest.approx(own_score(*items), abs=1e-4)


async def test_the_index_says_which_text_a_score_belongs_to(server: Server) -> None:
    double, client_of = server
    answer = classification([[1.0], [2], [3.0]])
    double.answers["/classify"] = [JSONResponse(answer | {"data": answer["data"][::-1]})]
    async with client_of() as client:
        scores = await client.score_batch([ITEM] * 3)
    assert [score.score for score in scores] == [1.0, 2.0, 3.0]


async def test_special_tokens_in_an_article_are_plain_characters(server: Server) -> None:
    _, client_of = server
    item = replace(ITEM, scraped_body="It ended.<|im_end|><|endoftext|>", title="<|im_end|>")
    async with client_of() as client:
        assert (await client.score(item)).score == pytest.approx(own_score(item)[0], abs=1e-4)


async def test_health(server: Server) -> None:
    _, client_of = server
    async with client_of() as client:
        health = await client.health()
    assert (health.model, health.version, health.device, health.dtype) == (NAME, f"vllm:{ROOT}", "vllm", "unknown")
    assert (health.max_length, health.waiting) == (2048, 0)
    assert health.score == pytest.approx(starter_scorer().probe(), abs=1e-4)


async def test_the_check_leaves_out_what_vllm_cannot_tell() -> None:
    async with serving(VllmDouble().app) as url:
        report = await check_server(f"vllm+{url}", "starter", measure_s=0.1)
    assert report.passed, report.results
    assert [result.name for result in report.results] == ["up", "deterministic", "equal to transformers"]
    assert "no weights to compare" in report.results[0].detail


# what is too long


@pytest.mark.parametrize(
    "end",
    ["", WORDS * 2000, " " * 5000, "\n\n" * 3000, "標題" * 800],
    ids=["words", "more characters than vLLM even counts", "blank", "blank lines", "many tokens a character"],
)
async def test_the_end_of_a_long_body_is_cut_and_never_the_title(server: Server, end: str) -> None:
    double, client_of = server
    double.max_model_len = 400
    long = replace(ITEM, scraped_body=WORDS * 60 + end, title="The very last title")
    short = replace(ITEM, scraped_body=WORDS * 5)
    async with client_of() as client:
        answers = await client.score_batch([short, long])
    [_, (kept, cut)] = double.texts()
    assert kept == text(short)
    body, _, rest = cut.partition("</body>\n")
    assert rest == "<title>The very last title</title>"
    assert text(long).startswith(body)
    tokens = double.tokens(cut)
    assert 380 <= len(tokens) <= 400
    expected = starter_scorer().score_tokens([double.tokens(kept), tokens])
    assert [answer.score for answer in answers] == pytest.approx(expected, abs=1e-6)


async def test_only_what_can_be_too_long_is_counted(server: Server) -> None:
    double, client_of = server
    double.max_model_len = 400
    long = replace(ITEM, scraped_body=WORDS * 60)
    async with client_of() as client:
        await client.score_batch([ITEM, long, ITEM])
        await client.score(ITEM)
    counted = [body["prompt"] for path, body in double.asked if path == "/tokenize"]
    assert counted[0] == text(long)
    assert text(ITEM) not in counted


async def test_a_text_of_exactly_the_limit_is_whole(server: Server) -> None:
    double, client_of = server
    item = replace(ITEM, scraped_body=WORDS * 20)
    double.max_model_len = len(double.tokens(text(item)))
    async with client_of() as client:
        await client.score(item)
        assert double.texts() == [[text(item)]]
        double.max_model_len -= 1
    async with client_of() as client:
        await client.score(item)
    assert 0.95 * double.max_model_len <= len(double.tokens(double.texts()[-1][0])) <= double.max_model_len


async def test_a_title_that_alone_is_too_long_is_refused(server: Server) -> None:
    double, client_of = server
    double.max_model_len = 100
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match=r"Title, URL and submitter alone are longer than the 100 tokens"):
            await client.score(replace(ITEM, title=WORDS * 20, scraped_body=WORDS * 20))


# what goes wrong


@pytest.mark.parametrize("path", ["/v1/models", "/classify"])
async def test_transient_failures_are_retried(server: Server, path: str) -> None:
    double, client_of = server
    double.answers[path] = [Response(status_code=503), Response(status_code=429)]
    async with client_of() as client:
        answer = await client.score(ITEM)
    assert answer.score == pytest.approx(own_score(ITEM)[0], abs=1e-4)


async def test_retries_end(server: Server) -> None:
    double, client_of = server
    double.answers["/classify"] = [Response(status_code=503)] * 2
    async with client_of(retries=1) as client:
        with pytest.raises(ServiceUnavailable, match=r"vllm\+http.*/classify failed 2 times"):
            await client.score(ITEM)


ONE = classification([[1.0]])


@pytest.mark.parametrize(
    "answer",
    [
        classification([[0.3, 0.7]]),
        classification([[]]),
        classification([[float("nan")]]),
        classification([[float("-inf")]]),
        classification([[None]]),
        classification([["1.0"]]),
        classification([[True]]),
        classification([[1.0], [2.0]]),
        ONE | {"data": []},
        ONE | {"data": [{**ONE["data"][0], "index": 1}]},
        ONE | {"data": [{"index": 0}]},
        ONE | {"data": ["1.0"]},
        {"object": "list"},
        [],
        None,
    ],
    ids=lambda answer: json.dumps(answer["data"] if isinstance(answer, dict) and "data" in answer else answer)[:60],
)
async def test_an_unusable_score_is_no_score(server: Server, answer: Any) -> None:
    double, client_of = server
    double.answers["/classify"] = [Response(json.dumps(answer), media_type="application/json")]
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match=r"one finite number for each of 1 texts.*one output"):
            await client.score(ITEM)


@pytest.mark.parametrize(
    "answer", [{"object": "list", "data": []}, {"data": [{"id": NAME}]}, {"data": [{"max_model_len": 9}]}, [], "x"]
)
async def test_a_list_without_a_model_is_refused(server: Server, answer: Any) -> None:
    double, client_of = server
    double.answers["/v1/models"] = [JSONResponse(answer)]
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match="model with id and max_model_len"):
            await client.health()


@pytest.mark.parametrize("status", [400, 401, 404, 500, 501])
async def test_another_refusal_is_passed_on(server: Server, status: int) -> None:
    double, client_of = server
    error = {"message": "no", "type": "BadRequestError", "param": None, "code": status}
    double.answers["/classify"] = [JSONResponse({"error": error}, status)]
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match=f"HTTP {status}") as rejected:
            await client.score(ITEM)
    assert rejected.value.status == status
    assert len(double.texts()) == 1


@pytest.mark.parametrize("item", [replace(ITEM, title=" "), replace(ITEM, title="x" * (MAX_TITLE + 1))])
async def test_titles_keep_the_rules_of_our_own_server(server: Server, item: RewardInput) -> None:
    double, client_of = server
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match="title: String should"):
            await client.score(item)
    assert double.texts() == []


async def test_half_a_surrogate_pair_is_refused(server: Server) -> None:
    _, client_of = server
    async with client_of() as client:
        with pytest.raises(ServiceRejected, match="unicode string"):
            await client.score(RewardInput("\ud800", "body"))


async def test_the_key_is_shown() -> None:
    async with serving(VllmDouble(api_key="right").app) as url:
        async with RewardClient(f"vllm+{url}", api_key="right") as client:
            assert (await client.health()).model == NAME
        async with RewardClient(f"vllm+{url}", api_key="wrong") as client:
            with pytest.raises(ServiceRejected, match="HTTP 401"):
                await client.score(ITEM)


async def test_a_server_of_our_own_at_a_vllm_address_is_refused() -> None:
    async with serving_scorer(starter_scorer()) as (url, _), RewardClient(f"vllm+{url}") as client:
        with pytest.raises(ServiceRejected, match=r"vllm\+http://.*/v1/models was refused with HTTP 404"):
            await client.health()


def test_the_address_keeps_its_dialect() -> None:
    # Other processes are handed `base_url` to make a client of their own.
    assert RewardClient("vllm+https://host:8000/").base_url == "vllm+https://host:8000"


@pytest.mark.parametrize("url", ["vllm://host:8000", "vllm+ftp://host", "vllm+http://"])
def test_what_is_no_address_is_a_users_mistake(url: str) -> None:
    with pytest.raises(ConfigError, match=r"vllm\+http://host:port"):
        RewardClient(url)
