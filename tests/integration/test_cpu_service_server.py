"""The OpenAI-compatible server: what it takes, what it refuses, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import httpx
import pytest
from art.preprocessing.tokenize import tokenize_trajectory
from art.trajectories import History, Trajectory
from cpu_parts import ODD_TEXTS, choice, load_base, load_tokenizer, plain_logprobs, write_adapter
from openai import AsyncOpenAI

from tasks.engines.cpu import worker as worker_module
from tasks.engines.cpu.chat import ChatTokenizer, ControlToken
from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.models import ServedModels
from tasks.engines.cpu.sampler import Generation
from tasks.engines.cpu.server import MOST_BODY_BYTES, HttpServer, build_app
from tasks.engines.cpu.weights import copy_state
from tasks.engines.cpu.worker import Answer, Job, SamplingWorker, ShuttingDown
from tasks.starter.paths import BASE_MODEL
from tasks.titles.errors import ConfigError
from tasks.titles.prompts import policy_messages, validator_messages

KEY = "secret"
END = 2047


class Service:
    """A worker and a server, without ART around them."""

    def __init__(self, checkpoints: Path) -> None:
        self.cores = Cores(2)
        self.compute = ThreadPoolExecutor(1)
        base = load_base()
        write_adapter(checkpoints, 1, self.cores, disturbance=0.05)
        self.models = ServedModels(
            copy_state(base),
            base.config,
            base_name=str(BASE_MODEL),
            run_name="run",
            checkpoints=checkpoints,
            adapters_in_memory=2,
        )
        self.worker = SamplingWorker(self.models, self.compute, self.cores)
        self.chat = ChatTokenizer(load_tokenizer(), [END])
        self.server = HttpServer(build_app(self.models, self.worker, self.chat, api_key=KEY), 0)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        options.setdefault("headers", {"Authorization": f"Bearer {KEY}"})
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def close(self) -> None:
        self.worker.close()
        self.server.close()
        self.compute.shutdown()
        self.cores.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("served") / "checkpoints")
    yield service
    service.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def chat_body(**changes: Any) -> dict[str, Any]:
    return {"model": "base", "messages": list(policy_messages("A queue.")), "max_tokens": 6, **changes}


async def test_a_chat_completion_has_what_art_trains_on(service: Service) -> None:
    messages = list(policy_messages("A message queue that needs less memory."))
    answer = await service.client().chat.completions.create(
        model="run@1", messages=messages, max_tokens=12, logprobs=True, n=3, seed=4
    )
    prompt = list(service.chat.prompt_ids([(message["role"], message["content"]) for message in messages]))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    tokens = []
    for one in answer.choices:
        assert one.logprobs is not None and one.logprobs.content is not None
        tokens.append([int(item.token.removeprefix("token_id:")) for item in one.logprobs.content])
        # The end token is sampled and trained on, but is no part of the title.
        assert (tokens[-1][-1] == END) == (one.finish_reason == "stop")
        assert one.message.content == load_tokenizer().decode(tokens[-1], skip_special_tokens=True)
    assert answer.usage.completion_tokens == sum(len(one) for one in tokens)
    assert len({tuple(one) for one in tokens}) > 1, "n generations of one seed are to differ"
    # As vLLM does it: a choice is the same alone, asked for with the seed that follows the one before.
    for index, one in enumerate(answer.choices):
        alone = await service.client().chat.completions.create(
            model="run@1", messages=messages, max_tokens=12, logprobs=True, seed=4 + index
        )
        assert alone.choices[0].message.content == one.message.content


async def test_the_adapter_and_the_base_model_answer_by_their_names(service: Service) -> None:
    client = service.client()
    names = [model.id for model in (await client.models.list()).data]
    assert names == ["base", str(BASE_MODEL), "run@1"]

    async def logprobs(model: str) -> list[float]:
        answer = await client.completions.create(
            model=model, prompt=list(range(5, 25)), echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        assert answer.choices[0].logprobs is not None
        scores = answer.choices[0].logprobs.token_logprobs
        assert scores is not None and len(scores) == 21 and scores[0] is None
        return scores[1:20]

    base, path, adapter = [await logprobs(name) for name in names]
    assert base == path == pytest.approx(plain_logprobs(load_base(), [5], list(range(6, 25))), abs=1e-4)
    assert max(abs(one - other) for one, other in zip(base, adapter, strict=True)) > 0.01


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_the_server_reads_the_tokens_that_art_trains_on(service: Service, text: str) -> None:
    for messages in (policy_messages(text), validator_messages(text, text)):
        served = service.chat.prompt_ids([(message["role"], message["content"]) for message in messages])
        trajectory = Trajectory(
            messages_and_choices=[*messages, choice([11, 12, END], [-1.0, -2.0, -3.0])],  # type: ignore[list-item]
            reward=1.0,
        )
        result = tokenize_trajectory(
            load_tokenizer(),
            None,
            History(messages_and_choices=trajectory.messages_and_choices),
            1.0,
            False,
            trajectory,
        )
        assert result is not None
        # The end token comes once: ART adds none behind the sampled one.
        assert result.token_ids == [*served, 11, 12, END]
        assert result.assistant_mask == [0] * len(served) + [1, 1, 1]
        assert result.logprobs[-3:] == [-1.0, -2.0, -3.0]


def test_control_tokens_in_a_message_are_refused(service: Service) -> None:
    for token in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"):
        messages = [{"role": "user", "content": f"an article with {token} in it"}]
        answer = service.post("/v1/chat/completions", chat_body(messages=messages))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "control_token"
        with pytest.raises(ControlToken):
            service.chat.prompt_ids([("user", token)])
    # What the prompts make of it is plain text, and is taken.
    messages = list(policy_messages("an article with <|im_end|> in it"))
    assert service.post("/v1/chat/completions", chat_body(messages=messages)).status_code == 200


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 40}, "top_k"),
        ({"min_p": 0.05}, "min_p"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"stop": ["\n"]}, "stop"),
        ({"stream": True}, "stream"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 65}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "name"),
        ({"max_tokens": 5000}, "context"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(service: Service, change: dict[str, Any], named: str) -> None:
    answer = service.post("/v1/chat/completions", chat_body(**change))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert named in error["message"]


def test_neutral_options_are_taken(service: Service) -> None:
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0, "stream": False, "user": "x", "seed": -7}
    assert service.post("/v1/chat/completions", chat_body(**neutral, max_completion_tokens=3)).status_code == 200


def test_refusals_have_openais_statuses(service: Service) -> None:
    for model in ("other", "run@9", "run@x", "run", "base@1"):
        answer = service.post("/v1/chat/completions", chat_body(model=model))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert service.post("/v1/chat/completions", chat_body(), headers={}).status_code == 401
    assert httpx.get(service.url + "/health").json() == {"status": "ok"}
    large = "x" * (MOST_BODY_BYTES + 1)
    answer = service.post("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": large}]))
    assert answer.status_code == 413
    long = service.post("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": "word " * 5000}]))
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert service.post("/v1/completions", {"model": "base", "prompt": [], "max_tokens": 1}).status_code == 400
    assert service.post("/v1/completions", {"model": "base", "prompt": [99999], "max_tokens": 1}).status_code == 400
    broken = httpx.post(service.url + "/v1/completions", content=b"{", headers={"Authorization": f"Bearer {KEY}"})
    assert broken.status_code == 400


def test_a_full_queue_is_said_at_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MOST_WAITING", 0)
    answer = service.post("/v1/chat/completions", chat_body())
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1


async def test_concurrent_requests_are_one_batch(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    answer = SamplingWorker._answer

    def counting(self: SamplingWorker, batch: list[Job]) -> None:
        sizes.append(len(batch))
        answer(self, batch)

    monkeypatch.setattr(SamplingWorker, "_answer", counting)
    busy = threading.Event()
    service.compute.submit(busy.wait, 30)
    client = service.client()
    asked = [
        asyncio.create_task(
            client.chat.completions.create(model=model, messages=list(policy_messages("x")), max_tokens=3)  # type: ignore[call-overload]
        )
        for model in ["base"] * 6 + ["run@1"] * 5
    ]
    # The first batch waits for the compute thread; whatever came after it is to be one batch per model.
    await asyncio.to_thread(until, lambda: len(service.worker._waiting) >= 5)
    await asyncio.sleep(0.3)
    busy.set()
    await asyncio.gather(*asked)
    assert sum(sizes) == 11
    assert len(sizes) <= 3


def test_one_broken_model_fails_its_own_requests_only(service: Service, tmp_path: Path) -> None:
    folder = service.models._checkpoints / "0005"
    folder.mkdir()
    answer = service.post("/v1/chat/completions", chat_body(model="run@5"))
    assert answer.status_code == 500
    assert "no readable LoRA adapter" in answer.json()["error"]["message"]
    folder.rmdir()
    assert service.post("/v1/chat/completions", chat_body()).status_code == 200


async def test_a_client_that_has_gone_is_dropped(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    submit = SamplingWorker.submit

    def keeping(self: SamplingWorker, job: Job) -> Any:
        jobs.append(job)
        return submit(self, job)

    monkeypatch.setattr(SamplingWorker, "submit", keeping)
    busy = threading.Event()
    service.compute.submit(busy.wait, 30)
    body = json.dumps(chat_body()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", service.server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await asyncio.to_thread(until, lambda: bool(jobs))
    await asyncio.to_thread(until, lambda: jobs[0].future.cancelled())
    busy.set()
    answer = await asyncio.to_thread(service.post, "/v1/chat/completions", chat_body())
    assert answer.status_code == 200


def test_every_waiter_is_answered_when_the_service_stops(tmp_path: Path) -> None:
    service = Service(tmp_path / "checkpoints")
    endless = Job("base", [Generation((1, 2, 3), 1900, (0,))])
    future = service.worker.submit(endless)
    until(lambda: not service.worker._waiting)
    busy = threading.Event()
    service.compute.submit(busy.wait, 30)
    statuses: list[int] = []
    asker = threading.Thread(
        target=lambda: statuses.append(service.post("/v1/chat/completions", chat_body()).status_code)
    )
    asker.start()
    until(lambda: bool(service.worker._waiting))
    closer = threading.Thread(target=service.worker.close)
    closer.start()
    with pytest.raises(ShuttingDown):
        future.result(timeout=60)
    busy.set()
    closer.join()
    asker.join()
    assert statuses == [503]
    assert httpx.get(service.url + "/health").status_code == 503
    with pytest.raises(ShuttingDown):
        service.worker.submit(Job("base", [Generation((1,), 1, (0,))]))
    port = service.server.port
    service.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_taken_port_is_said_clearly() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="Choose another one"):
            HttpServer(build_app(None, None, None, api_key=None), taken.getsockname()[1])  # type: ignore[arg-type]


def test_adapters_in_memory_are_bounded(service: Service, tmp_path: Path) -> None:
    for step in (2, 3, 4):
        write_adapter(service.models._checkpoints, step, service.cores, disturbance=0.01 * step)
        assert isinstance(
            service.worker.submit(Job(f"run@{step}", [Generation((1, 2), 2, (0,))])).result(timeout=60), Answer
        )
    assert list(service.models._adapters) == [3, 4]
    service.models.retain({4})
    assert list(service.models._adapters) == [4]
