"""Rollouts against a policy and judges that misbehave in every way that matters: each loss is counted, none is a 0.

The server is a real one on a free port; it speaks the two protocols and answers by script.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from reward_server.client import RewardClient
from tasks.titles.errors import DataError, ServiceUnavailable, TooManyFailures, UnreadableVerdict
from tasks.titles.prompts import policy_messages
from tasks.titles.rollout import GroupRoller, RemoteGroupRoller, Roller, RolloutGroup, Sampling, check_failures
from tasks.titles.rollout_metrics import train_metrics, trainable, val_metrics
from tasks.titles.story import Prompt, Story

Answer = str | list[str] | int | Callable[[dict[str, Any]], Any]


class ScriptedServer:
    """Policy, validator and reward server in one app.

    `policy` and `validator` are a text to answer, a status to fail with, or a function of the request; `score` is a
    number, a status (an int) or a function. `asked` keeps every request. Of one text at most `choices` are given.
    """

    def __init__(self) -> None:
        self.reset()
        app = FastAPI()
        app.post("/v1/chat/completions")(self._chat)
        app.post("/score")(self._score)
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def reset(self) -> None:
        self.policy: Answer = "A title"
        self.validator: Answer = "True"
        self.score: Any = 2.5
        self.delay_s = 0.0
        self.choices = 100
        self.asked: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        service = "validator" if body["model"] == "base" else "policy"
        return await self._answer(service, body, self._completion)

    async def _score(self, request: Request) -> Response:
        return await self._answer("score", await request.json(), lambda value, _: {"score": value, "version": "v1"})

    async def _answer(self, service: str, body: dict[str, Any], wrap: Callable[[Any, Any], Any]) -> Response:
        self.asked.append({"service": service, **body})
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self.delay_s)
        self.under_way -= 1
        answer = getattr(self, service)
        answer = answer(body) if callable(answer) else answer
        if isinstance(answer, Response):
            return answer
        if isinstance(answer, int):
            return Response(json.dumps({"error": {"message": "scripted"}}), status_code=answer)
        return Response(json.dumps(wrap(answer, body)), media_type="application/json")

    def _completion(self, text: str | list[str], body: dict[str, Any]) -> dict[str, Any]:
        entry = {"token": "token_id:7", "logprob": -0.5, "bytes": None, "top_logprobs": []}
        texts = [text] * min(body.get("n", 1), self.choices) if isinstance(text, str) else text
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": index,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                    "logprobs": {"content": [entry] * 3} if body.get("logprobs") else None,
                }
                for index, text in enumerate(texts)
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3 * len(texts), "total_tokens": 10 + 3 * len(texts)},
        }


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture
def server(running: ScriptedServer) -> ScriptedServer:
    running.reset()
    return running


def prompt(number: int = 1, tokens: int = 50) -> Prompt:
    body = f"Body number {number} tells of a small compiler."
    story = Story(str(number), "someone", None, "Human title", "https://example.org", 30, body, "train")
    return Prompt(story, policy_messages(body), tokens)


SAMPLING = Sampling(model="policy@0", temperature=1.0, run_seed=1, step=0)


async def roll(
    server: ScriptedServer, *, prompts: list[Prompt] | None = None, size: int = 4, concurrency: int = 8
) -> list[RolloutGroup]:
    endpoint = SimpleNamespace(base_url=f"{server.url}/v1", api_key="default", base_model_name="base")
    async with (
        RewardClient(server.url, retries=1) as reward_client,
        Roller(
            endpoint=endpoint,
            reward_client=reward_client,
            max_completion_tokens=20,
            context_tokens=100,
            concurrency=concurrency,
            retries=1,
        ) as roller,
    ):
        return [await roller.group(one, SAMPLING, size) for one in prompts or [prompt()]]


def asked_of(server: ScriptedServer, service: str) -> list[dict[str, Any]]:
    return [request for request in server.asked if request["service"] == service]


async def test_a_group_of_rewarded_titles(server: ScriptedServer) -> None:
    server.policy = ["  One title\n", "Another"] * 2
    server.validator = lambda body: "False." if "Another" in body["messages"][1]["content"] else " true"
    [group] = await roll(server)
    assert not group.failures
    assert sorted((r.title, r.verdict, r.reward, r.score) for r in group.rollouts) == [
        ("Another", False, 0.0, 2.5),
        ("Another", False, 0.0, 2.5),
        ("One title", True, 2.5, 2.5),
        ("One title", True, 2.5, 2.5),
    ]
    rollout = group.rollouts[0]
    assert (rollout.length, rollout.tokens, rollout.reward_model_version) == (len(rollout.title), 3, "v1")
    assert [entry.logprob for entry in rollout.choice.logprobs.content] == [-0.5] * 3
    assert trainable([group]) == [group]


async def test_what_policy_and_validator_are_asked(server: ScriptedServer) -> None:
    await roll(server, size=3)
    [asked] = asked_of(server, "policy")
    wanted = {"model": "policy@0", "temperature": 1.0, "max_tokens": 20, "logprobs": True, "n": 3}
    assert {name: asked[name] for name in wanted} == wanted
    assert asked["seed"] == SAMPLING.seed("1", 0)
    assert not {"top_p", "top_k", "min_p"} & set(asked)
    verdicts = asked_of(server, "validator")
    assert {(request["model"], request["temperature"]) for request in verdicts} == {("base", 0.0)}
    assert verdicts[0]["messages"][1]["content"].endswith("<proposed_title>A title</proposed_title>")


@pytest.mark.parametrize(
    ("concurrency", "choices", "requests"),
    [
        (2, 100, {(0, 2), (2, 2), (4, 1)}),  # more titles than may be in the making at once
        (8, 2, {(0, 5), (2, 3), (4, 1)}),  # a server that gives fewer choices than it is asked for
        (8, 1, {(0, 5), (1, 4), (2, 3), (3, 2), (4, 1)}),  # one that does not know `n`
    ],
)
async def test_a_title_has_its_seed_however_many_are_asked_for_at_once(
    server: ScriptedServer, concurrency: int, choices: int, requests: set[tuple[int, int]]
) -> None:
    server.choices = choices
    groups = await roll(server, prompts=[prompt(1), prompt(2)], size=5, concurrency=concurrency)
    assert [len(group.rollouts) for group in groups] == [5, 5]
    asked = {(one["seed"], one["n"]) for one in asked_of(server, "policy")}
    assert asked == {(SAMPLING.seed(story, first), count) for story in "12" for first, count in requests}


async def test_groups_do_not_wait_for_each_others_places(server: ScriptedServer) -> None:
    server.delay_s = 0.02
    endpoint = SimpleNamespace(base_url=f"{server.url}/v1", api_key="default", base_model_name="base")
    async with (
        RewardClient(server.url) as client,
        Roller(
            endpoint=endpoint, reward_client=client, max_completion_tokens=20, context_tokens=100, concurrency=5
        ) as roller,
    ):
        rolling = [roller.group(prompt(number), SAMPLING, 3) for number in range(4)]
        groups = await asyncio.wait_for(asyncio.gather(*rolling), timeout=20)
        # A group that is given up gives its places back, also where it holds only a part of them.
        given_up = [asyncio.ensure_future(roller.group(prompt(number), SAMPLING, 3)) for number in range(3)]
        await asyncio.sleep(0.01)
        for one in given_up:
            one.cancel()
        groups.append(await asyncio.wait_for(roller.group(prompt(9), SAMPLING, 5), timeout=20))
    assert [len(group.rollouts) for group in groups] == [3, 3, 3, 3, 5]


async def test_both_judges_are_asked_at_the_same_time(server: ScriptedServer) -> None:
    # Each waits until the other has been asked: one after the other would never end.
    def both_asked(_: Any) -> bool:
        return bool(asked_of(server, "score")) and bool(asked_of(server, "validator"))

    server.delay_s = 0.2
    seen = []
    server.score = lambda body: seen.append(both_asked(body)) or 1.0
    server.validator = lambda body: seen.append(both_asked(body)) or "True"
    await roll(server, size=1)
    assert seen == [True, True]


async def test_a_title_is_written_before_it_is_judged(server: ScriptedServer) -> None:
    server.delay_s = 0.1
    before = time.time()
    [group] = await roll(server, size=1)
    # The policy and, after it, the judges each take the delay.
    assert before + 0.1 <= group.rollouts[0].written <= time.time() - 0.1


async def test_concurrency_is_bounded(server: ScriptedServer) -> None:
    server.delay_s = 0.05
    await roll(server, size=12, concurrency=3)
    # Three titles in the making, each with at most two judges under way.
    assert 3 <= server.most_under_way <= 6


@pytest.mark.parametrize(
    ("service", "answer", "reason"),
    [
        ("policy", 500, "policy: ServiceUnavailable"),
        ("policy", 429, "policy: ServiceUnavailable"),
        ("policy", 400, "policy: ServiceRejected"),
        ("policy", lambda body: Response("<html>", media_type="text/html"), "policy: ServiceRejected"),
        ("policy", lambda body: Response("{}", media_type="application/json"), "policy: ServiceRejected"),
        ("policy", lambda body: Response("{no json", media_type="application/json"), "policy: ServiceRejected"),
        ("validator", 503, "validator: ServiceUnavailable"),
        ("validator", 404, "validator: ServiceRejected"),
        ("validator", "maybe", "validator: UnreadableVerdict"),
        ("validator", "", "validator: UnreadableVerdict"),
        ("score", 503, "reward model: ServiceUnavailable"),
        ("score", 422, "reward model: ServiceRejected"),
        ("score", lambda body: Response("oops", media_type="text/plain"), "reward model: ServiceRejected"),
        ("score", lambda body: "high", "reward model: ServiceRejected"),
        ("score", lambda body: float("nan"), "reward model: ServiceRejected"),
    ],
)
async def test_a_broken_service_drops_the_trajectory(
    server: ScriptedServer, service: str, answer: Answer, reason: str
) -> None:
    setattr(server, service, answer)
    [group] = await roll(server, size=2)
    assert not group.rollouts
    assert [failure.reason for failure in group.failures] == [reason] * 2
    with pytest.raises(TooManyFailures, match=f"2 of 2 trajectories failed.*2 times {reason}"):
        check_failures([group], max_failed_share=0.5)


async def test_the_others_of_a_group_live_on(server: ScriptedServer) -> None:
    scores = itertools.cycle([1.0, 503, 503, 2.0, 3.0])
    server.score = lambda body: next(scores)
    [group] = await roll(server, size=4, concurrency=1)
    assert [failure.reason for failure in group.failures] == ["reward model: ServiceUnavailable"]
    assert sorted(rollout.reward for rollout in group.rollouts) == [1.0, 2.0, 3.0]
    assert check_failures([group], max_failed_share=0.25) == 1
    with pytest.raises(TooManyFailures):
        check_failures([group], max_failed_share=0.2)
    metrics = train_metrics([group])
    assert metrics["train/reward"] == pytest.approx(2.0)
    assert metrics["train/trajectories_dropped"] == 1.0


async def test_transient_failures_are_asked_again_and_others_are_not(server: ScriptedServer) -> None:
    answers = itertools.chain([503], itertools.repeat("A title"))
    server.policy = lambda body: next(answers)
    [group] = await roll(server, size=1)
    assert len(group.rollouts) == 1
    assert len(asked_of(server, "policy")) == 2
    server.asked.clear()
    server.policy = 400
    await roll(server, size=1)
    assert len(asked_of(server, "policy")) == 1


async def test_answers_without_logprobs_are_unusable(server: ScriptedServer) -> None:
    def without(body: dict[str, Any]) -> Response:
        return Response(
            json.dumps(server._completion("A title", {**body, "logprobs": False})), media_type="application/json"
        )

    server.policy = without
    [group] = await roll(server, size=2)
    assert [failure.reason for failure in group.failures] == ["policy: ServiceRejected"] * 2
    assert "log-probabilities" in group.failures[0].message


async def test_a_choice_without_logprobs_leaves_the_others_of_its_request_alone(server: ScriptedServer) -> None:
    def one_without(body: dict[str, Any]) -> Response:
        answer = server._completion("A title", body)
        answer["choices"][1]["logprobs"] = {"content": []}
        return Response(json.dumps(answer), media_type="application/json")

    server.policy = one_without
    [group] = await roll(server, size=3)
    assert [failure.reason for failure in group.failures] == ["policy: ServiceRejected"]
    assert len(group.rollouts) == 2 and len(asked_of(server, "policy")) == 1


@pytest.mark.parametrize("text", ["", "  \n"])
async def test_a_blank_title_is_the_policys_own_failure(server: ScriptedServer, text: str) -> None:
    server.policy = [text, "A title"]
    [group] = await roll(server, size=2)
    blank, good = sorted(group.rollouts, key=lambda rollout: rollout.length)
    assert (blank.empty, blank.reward) == (True, 0.0)
    assert good.reward == 2.5
    assert len(asked_of(server, "score")) == len(asked_of(server, "validator")) == 1
    metrics = train_metrics([group])
    assert metrics["train/empty_titles"] == 0.5
    assert metrics["train/score"] == 2.5  # of the one title that was judged
    assert metrics["train/matches"] == 0.5
    assert val_metrics([group])["val/score/mean"] == 2.5


async def test_a_group_roller_asks_the_same_of_the_same_servers_in_another_process(server: ScriptedServer) -> None:
    endpoint = SimpleNamespace(base_url=f"{server.url}/v1", api_key="default", base_model_name="base")
    async with (
        RewardClient(server.url, "key", retries=1) as client,
        Roller(
            endpoint=endpoint,
            reward_client=client,
            max_completion_tokens=20,
            context_tokens=100,
            concurrency=8,
            retries=1,
        ) as roller,
    ):
        here = GroupRoller(roller, SAMPLING, 3)
        there = pickle.loads(pickle.dumps(here))
        assert isinstance(there, RemoteGroupRoller)
        groups = [await rollout(prompt()) for rollout in (here, there)]
    titles = [[(rollout.title, rollout.reward) for rollout in group.rollouts] for group in groups]
    assert titles[0] == titles[1] and len(titles[0]) == 3
    asked = asked_of(server, "policy")
    assert len(asked) == 2 and asked[0] == asked[1]


async def test_a_prompt_that_leaves_no_room_is_never_sent(server: ScriptedServer) -> None:
    groups = await roll(server, prompts=[prompt(1, tokens=80), prompt(2, tokens=81)], size=2)
    assert len(groups[0].rollouts) == 2
    assert [failure.reason for failure in groups[1].failures] == [f"prompt: {DataError.__name__}"] * 2
    assert len(asked_of(server, "policy")) == 1


async def test_a_server_that_is_not_there(server: ScriptedServer) -> None:
    endpoint = SimpleNamespace(base_url="http://127.0.0.1:9/v1", api_key="default", base_model_name="base")
    async with RewardClient(server.url) as reward_client:
        roller = Roller(
            endpoint=endpoint,
            reward_client=reward_client,
            max_completion_tokens=5,
            context_tokens=100,
            concurrency=2,
            retries=1,
        )
        async with roller:
            group = await roller.group(prompt(), SAMPLING, 2)
    assert [failure.reason for failure in group.failures] == [f"policy: {ServiceUnavailable.__name__}"] * 2
    assert "rollout_concurrency" in group.failures[0].message


async def test_a_fault_of_this_program_is_raised(server: ScriptedServer) -> None:
    broken = Prompt(prompt().story, None, 50)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        await roll(server, prompts=[broken], size=3)


async def test_an_unreadable_verdict_names_what_came(server: ScriptedServer) -> None:
    server.validator = "Perhaps"
    [group] = await roll(server, size=1)
    assert UnreadableVerdict.__name__ in group.failures[0].reason
    assert "'Perhaps'" in group.failures[0].message
