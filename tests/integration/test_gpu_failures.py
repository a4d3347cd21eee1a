"""What becomes of a training on a GPU when a part of it dies: ART's own processes, and a double for vLLM alone.

`tests/gpu` kills vLLM itself.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from gpu_failure_parts import ENGINE_WORDS, MEMORY_IS_FULL, opened, part, service
from processes import is_alive, wait_until_gone
from training_parts import prompts
from vllm_process_double import FULL

from reward_server.client import RewardClient
from tasks.engines.gpu.failures import family
from tasks.titles.errors import EngineDied, OutOfMemory, TooManyFailures
from tasks.titles.rollout import Roller, Sampling, ServedAt, check_failures

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards which command stands for vLLM."""
    for name in ("ART_VLLM_RUNTIME_BIN", "ART_VLLM_RUNTIME_PROJECT_ROOT"):
        monkeypatch.setenv(name, "")


async def roll_out(model: Any) -> None:
    """Ask for the titles of a group, as a step does."""
    endpoint = ServedAt(model.inference_base_url, model.inference_api_key, "base")
    async with (
        RewardClient("http://127.0.0.1:9") as judge,
        Roller(
            endpoint=endpoint,
            reward_client=judge,
            max_completion_tokens=24,
            context_tokens=1024,
            concurrency=8,
            retries=0,
        ) as roller,
    ):
        sampling = Sampling(model="policy@0", temperature=1.0, run_seed=1, step=0)
        check_failures([await roller.group(prompts("train", 1)[0], sampling, 6)], 0.5)


async def test_a_server_that_dies_among_rollouts_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(EngineDied) as told:
        async with opened(tmp_path) as (backend, model):
            own = await backend._get_service(model)
            # An answer that cannot be used comes as an error of ours: ART's exception would not survive its way here.
            with pytest.raises(EngineDied, match="500 Internal Server Error"):
                await own.register_lora_for_step(9, str(tmp_path))
            started = family(own._process.pid)
            engine = part(started, ENGINE_WORDS)
            rolling = asyncio.create_task(roll_out(model))
            await asyncio.sleep(1)
            part(started, "vllm_process_double").kill()
            await rolling
    assert isinstance(told.value.__cause__, TooManyFailures)
    assert "vLLM runtime exited with signal SIGKILL." in str(told.value)
    assert "The same command continues" in str(told.value)
    assert f"The end of {tmp_path}/logs/vllm-runtime.log:" in str(told.value)
    assert "POST /v1/load_lora_adapter" in str(told.value)
    assert not is_alive(engine.pid)
    assert not any(is_alive(process.pid) for process in started)


async def test_full_memory_and_a_lost_trainer_are_told_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(EngineDied, match=r"trainer's process has ended: .*signal 9") as told:
        async with opened(tmp_path) as (backend, model):
            own = await backend._get_service(model)
            started = family(own._process.pid)
            with pytest.raises(RuntimeError, match="KeyError: 'a fault of this program'"):
                await own.trainer_logprobs([1, 2])
            results = own.train({}, {}, {})
            assert await anext(results) == {"loss": 1.0}
            with pytest.raises(OutOfMemory, match="Tried to allocate") as full:
                await anext(results)
            assert MEMORY_IS_FULL in str(full.value) and full.value.__context__ is None
            os.kill(own._process.pid, 9)
            await own.trainer_logprobs([1, 2])
    assert isinstance(told.value.__cause__, RuntimeError)
    assert not any(is_alive(process.pid) for process in started)


async def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DOUBLE_FULL", "1")
    with pytest.raises(OutOfMemory, match="The GPU's memory is full") as told:
        await service(tmp_path).start_openai_server({"server_args": {"port": 1}})
    # Its own reason, though it stands far before the end of the log.
    assert FULL in str(told.value) and "in a long traceback" in str(told.value)
    assert "Too many open files" not in str(told.value) and "redis" not in str(told.value)
    assert "vLLM subprocess exited with code 1." in str(told.value)


def test_nothing_outlives_a_run_that_is_killed_outright(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, HERE / "gpu_failure_parts.py", tmp_path], stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert run.stdout is not None
    with run.stdout:
        assert run.stdout.readline() == "opened\n", (tmp_path / "log.txt").read_text()
        started = family(run.pid) - {psutil.Process(run.pid)}
        part(started, ENGINE_WORDS)
        run.kill()
        run.wait()
    for process in started:
        wait_until_gone(process.pid)
