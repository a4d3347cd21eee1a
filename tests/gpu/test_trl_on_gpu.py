"""TRL's engine on a GPU with vLLM in its process, and the reward server beside it: learns, and survives full memory.

One training in two sittings: the first step's update finds no memory, and the same command makes two steps. Others
with Unsloth in the trainer, with two GPUs where there are two, with a vLLM server beside the trainer, and that server
alone. `-s` shows the figures.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_parts import Hog, PlainTracker, needs, pids_on_gpu, request, rows_of, show, wait_until_gone
from transformers import AutoModelForCausalLM
from trl_full_update import BEGINS

from tasks.engines.canary import canary_prompt, compare
from tasks.engines.contract import TrainingRequest, TrainingResult
from tasks.engines.gpu.failures import family
from tasks.engines.resume import adapter_folder, stored_state
from tasks.engines.trl_engine import arguments, launch
from tasks.engines.trl_engine.vllm_server import open_vllm_server
from tasks.titles import metric_names as names
from tasks.titles.errors import OutOfMemory
from tasks.titles.tokens import load_tokenizer

pytestmark = needs("trl", "vllm")
HERE = Path(__file__).parent
STEPS = 2
SETTINGS = (f"max_steps={STEPS}", "groups_per_step=16", "group_size=8", "trl.micro_batch=128")


@dataclass
class Failed:
    """A sitting that somebody else's use of the GPU has ended."""

    asked: TrainingRequest
    ended: Exception
    left: list[str]
    committed: int


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, judge_on_gpu: str) -> Iterator[Failed]:
    run_dir: Path = tmp_path_factory.mktemp("trl") / "run"
    run_dir.mkdir()
    asked = request("trl", run_dir, judge_on_gpu, *SETTINGS)
    before, own = pids_on_gpu(), family(os.getpid())
    # vLLM falls asleep before: somebody who takes what it frees would end the run already there.
    with pytest.MonkeyPatch.context() as patch, Hog(since=run_dir / BEGINS), pytest.raises(Exception) as told:
        patch.setattr(arguments, "PROCESS", "trl_full_update")
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        asyncio.run(launch.train(asked, tracker=PlainTracker()))
    state = stored_state(run_dir, "trl")
    show("TRL without memory", {"ended": repr(told.value)[:2000]})
    left = wait_until_gone(family(os.getpid()) - own, before, 2.0)
    yield Failed(asked, told.value, left, state.cursor.step if state else -1)


def test_full_memory_in_the_update_stops_the_run_with_its_reason(failed: Failed) -> None:
    assert (failed.asked.run_dir / BEGINS).exists(), failed.ended
    assert isinstance(failed.ended, OutOfMemory), failed.ended
    assert "The GPU's memory is full" in str(failed.ended)
    assert failed.left == []
    assert failed.committed == 0


def test_the_same_command_makes_two_steps_and_the_canary_holds(failed: Failed) -> None:
    makes_two_steps(failed.asked)


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed here")
def test_unsloth_in_the_trainer_makes_two_steps_and_the_canary_holds(tmp_path: Path, judge_on_gpu: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    makes_two_steps(request("trl", run_dir, judge_on_gpu, f"max_steps={STEPS}", "trl.unsloth=true"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["devices=2"], id="two-processes"),
        pytest.param(["trl.vllm_mode=server", "trl.trainer_gpus=[0]", "trl.server_gpus=[1]"], id="server"),
    ],
)
def test_two_gpus_make_two_steps_and_the_canary_holds(settings: list[str], tmp_path: Path, judge_on_gpu: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    makes_two_steps(request("trl", run_dir, judge_on_gpu, *SETTINGS, *settings))


def test_a_vllm_server_beside_the_trainer_takes_its_weights(
    tmp_path: Path, judge_on_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server mode on one GPU: NCCL joins two processes of one GPU that say they are on two hosts."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    asked = request("trl", run_dir, judge_on_gpu, *SETTINGS, "trl.vllm_mode=server")
    serving = request("trl", run_dir, judge_on_gpu, *SETTINGS, "trl.vllm_mode=server", "trl.server_gpus=[0]")

    async def train_beside_a_server(asked: TrainingRequest, **listeners: Any) -> TrainingResult:
        async with open_vllm_server(serving.profile, serving.base_model, tmp_path) as url:
            assert url is not None
            monkeypatch.setenv("VLLM_SERVER_URL", url)
            monkeypatch.setenv("NCCL_HOSTID", "trainer")
            return await launch.train(asked, **listeners)

    monkeypatch.setenv("NCCL_HOSTID", "server")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    makes_two_steps(asked, train_beside_a_server)


def test_a_vllm_server_of_our_own_answers_as_trl_asks(tmp_path: Path, judge_on_gpu: str) -> None:
    """All of server mode but the weights."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    asked = request("trl", run_dir, judge_on_gpu, "trl.vllm_mode=server", "trl.server_gpus=[0]")
    before = pids_on_gpu()
    prompt = canary_prompt(load_tokenizer(asked.base_model))
    written = asyncio.run(written_by_a_server(asked, prompt))
    assert written["prompt_ids"] == [prompt]
    model = AutoModelForCausalLM.from_pretrained(asked.base_model, dtype=torch.float32)
    for title, logprobs in zip(written["completion_ids"], written["logprobs"], strict=True):
        tokens = torch.tensor([[*prompt, *title]])
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        trained = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].tolist()
        sampled = [token[0] for token in logprobs]
        found = compare(
            sampled, trained, tokens=len(title), sampler="the server", tolerance=asked.profile.canary_tolerance
        )
        show("TRL's server, nats apart", found.metrics())
    assert wait_until_gone(set(), before, 2.0) == []


async def written_by_a_server(asked: TrainingRequest, prompt: list[int]) -> dict[str, Any]:
    """Return what TRL's own client gets from a vLLM server of this project's: two titles."""
    from trl.generation.vllm_client import VLLMClient

    async with open_vllm_server(asked.profile, asked.base_model, asked.run_dir) as url:
        assert url is not None
        client = await asyncio.to_thread(VLLMClient, base_url=url)
        assert client.get_world_size() == 1
        return await asyncio.to_thread(client.generate, [prompt], n=2, max_tokens=16, logprobs=0)


def makes_two_steps(
    asked: TrainingRequest, train: Callable[..., Coroutine[Any, Any, TrainingResult]] = launch.train
) -> None:
    before = pids_on_gpu()
    told: list[int] = []
    result = asyncio.run(train(asked, tracker=PlainTracker(), on_progress=lambda progress: told.append(progress.step)))
    rows = rows_of(asked)
    show("TRL rows", rows)
    assert result.steps == STEPS and told == [0, 1, 2] and sorted(rows) == [0, 1, 2]
    for step in (1, 2):
        assert 0 <= rows[step][names.CANARY_MEAN_DIFFERENCE] <= asked.profile.canary_tolerance
        assert rows[step]["train/groups_trainable"] >= 1
        assert rows[step][names.TRAIN_GRAD_NORM] > 0
        assert (adapter_folder(asked.run_dir, "trl", step) / "optimizer.safetensors").stat().st_size > 1000
    assert wait_until_gone(set(), before, 2.0) == []
