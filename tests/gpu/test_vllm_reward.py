"""vLLM itself as the reward server: the merged starter model's scores over HTTP against those of transformers.

Needs a GPU and vLLM, which may be installed elsewhere: VLLM_COMMAND is the command that starts its command line, such
as `env PYTHONPATH=/opt/vllm python3 -m vllm.entrypoints.cli.main`. `-s` shows the figures.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import pytest
import torch
from gpu_parts import needs

from reward_server.client import RewardClient, RewardInput
from reward_server.merge import merge
from reward_server.model_files import find_model
from reward_server.schemas import ScoreRequest
from reward_server.scorer import Scorer
from tasks.starter.world import generate_stories
from tasks.titles.child_process import ChildProcess

COMMAND = os.environ.get("VLLM_COMMAND")
MAX_MODEL_LEN = 900
START_TIMEOUT_S = 400
"""vLLM compiles the model first."""
STEPS, STORIES, TITLES = 10, 8, 6
TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}

pytestmark = [
    *needs(),
    pytest.mark.skipif(
        COMMAND is None and importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here, and VLLM_COMMAND does not name one",
    ),
]


@dataclass(frozen=True)
class Served:
    """A vLLM server, and the same weights in transformers."""

    url: str
    dtype: str
    scorer: Scorer


@pytest.fixture(scope="module", params=TOLERANCE)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    merge("starter", folder / "merged")
    # float32 on the CPU is what both are measured by.
    scorer = Scorer(find_model("starter"), device="cpu", dtype=torch.float32, max_length=MAX_MODEL_LEN)
    with vllm_server(folder / "merged", request.param, folder / "vllm.log") as url:
        yield Served(url, request.param, scorer)


@contextmanager
def vllm_server(model: Path, dtype: str, log_path: Path) -> Iterator[str]:
    """Yield the address of a vLLM server of the classifier in `model`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = shlex.split(COMMAND) if COMMAND else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    command += ["serve", str(model), "--runner", "pooling", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", dtype, "--max-model-len", str(MAX_MODEL_LEN), "--gpu-memory-utilization", "0.4"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    process = ChildProcess(command, log_path=log_path, environment=environment)
    started = time.monotonic()
    try:
        while not _is_healthy(port):
            assert process.poll() is None, f"vLLM ended before it was ready.{process.log_end()}"
            assert time.monotonic() - started < START_TIMEOUT_S, f"vLLM does not start.{process.log_end()}"
            time.sleep(0.5)
        _show(f"{dtype}: vLLM ready after {time.monotonic() - started:.0f} s")
        yield f"vllm+http://127.0.0.1:{port}"
    finally:
        process.stop()


def test_scores_are_those_of_transformers(served: Served) -> None:
    items = _items(40)
    # Bodies of one to four stories.
    items = [
        RewardInput(
            title=item.title,
            scraped_body="\n\n".join(other.scraped_body for other in items[index : index + 1 + index % 4]),
            by=item.by,
            time=item.time,
            url=item.url,
        )
        for index, item in enumerate(items)
    ]
    requests = [ScoreRequest(**asdict(item)) for item in items]

    async def ask() -> tuple[list[float], list[float]]:
        async with RewardClient(served.url) as client:
            health = await client.health()
            assert (health.device, health.max_length) == ("vllm", MAX_MODEL_LEN)
            together = [answer.score for answer in await client.score_batch(items)]
            alone = [answer.score for answer in await asyncio.gather(*map(client.score, items))]
        return together, alone

    together, alone = asyncio.run(ask())
    expected = served.scorer.score_texts(requests)
    lengths = [len(ids) for ids in served.scorer.encode(requests)]
    differences = [max(abs(a - c), abs(b - c)) for a, b, c in zip(together, alone, expected, strict=True)]
    _show(
        f"{served.dtype}: {len(items)} titles of {min(lengths)} to {max(lengths)} tokens, largest difference "
        f"{max(differences):.4f}, scores {min(expected):.2f} to {max(expected):.2f}"
    )
    assert max(expected) - min(expected) > 1
    assert max(differences) <= TOLERANCE[served.dtype]


def test_a_body_that_is_too_long_is_cut(served: Served) -> None:
    items = _items(40)
    long = RewardInput(title=items[0].title, scraped_body="\n\n".join(item.scraped_body for item in items))
    requests = [ScoreRequest(**asdict(long)), ScoreRequest(**asdict(items[0]))]

    async def ask() -> list[float]:
        async with RewardClient(served.url) as client:
            return [answer.score for answer in await client.score_batch([long, items[0]])]

    scores = asyncio.run(ask())
    expected = served.scorer.score_texts(requests)  # cut to the last token that fits
    _show(f"{served.dtype}: too long {scores[0]:.3f}, {expected[0]:.3f} by our own server")
    assert scores[0] == pytest.approx(expected[0], abs=0.2)
    assert scores[1] == pytest.approx(expected[1], abs=TOLERANCE[served.dtype])


def test_the_speed_of_a_training(served: Served) -> None:
    items = _items((STEPS + 1) * STORIES)
    steps = [items[start : start + STORIES] for start in range(0, len(items), STORIES)]

    async def ask_step(client: RewardClient, step: list[RewardInput]) -> None:
        titles = [
            RewardInput(title=f"{item.title} ({number})", scraped_body=item.scraped_body)
            for item in step
            for number in range(TITLES)
        ]
        await asyncio.gather(*map(client.score, titles))

    async def ask() -> float:
        async with RewardClient(served.url) as client:
            await ask_step(client, steps[0])
            started = time.perf_counter()
            for step in steps[1:]:
                await ask_step(client, step)
            return STEPS * STORIES * TITLES / (time.perf_counter() - started)

    per_second = asyncio.run(ask())
    _show(f"{served.dtype}: {per_second:.0f} titles per second, {STORIES} stories of {TITLES} titles at once")
    assert per_second > 0


def _items(count: int) -> list[RewardInput]:
    return [RewardInput.from_story(story, story.title) for story in generate_stories(count, seed=7)]


def _is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _show(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")
