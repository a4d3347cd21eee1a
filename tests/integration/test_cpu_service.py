"""The CPU service behind ART: rollouts, a step, the canary, a resume."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import art
import pytest
import torch
from cpu_parts import load_tokenizer, load_with_adapter, plain_logprobs
from safetensors.torch import load_file, save_file

from tasks.engines.canary import CANARY_TITLE, canary_tokens, check_canary
from tasks.engines.checkpoints import step_folder, steps_on_disk
from tasks.engines.cpu.backend import CpuBackend, CpuSettings
from tasks.engines.cpu.service import CpuService
from tasks.starter.paths import BASE_MODEL
from tasks.titles.errors import SamplerDisagrees
from tasks.titles.prompts import policy_messages

BODIES = ("A queue that needs less memory and restarts faster.", "Seven engineers left Corvane in May.")
SETTINGS = CpuSettings(threads=2)


@asynccontextmanager
async def open_run(
    path: Path, settings: CpuSettings = SETTINGS
) -> AsyncIterator[tuple[CpuBackend, art.TrainableModel]]:
    backend = CpuBackend(path=str(path), settings=settings)
    model = art.TrainableModel(name="run", project="tests", base_model=str(BASE_MODEL), report_metrics=[])
    try:
        await model.register(backend, _openai_client_config={"server_args": {"api_key": "key"}})
        yield backend, model
    finally:
        await backend.close()


def checkpoints(path: Path) -> Path:
    return path / "tests" / "models" / "run" / "checkpoints"


async def roll_out(model: art.TrainableModel, *, seed: int, spread: bool = True) -> list[art.TrajectoryGroup]:
    """Sample four titles of each body; the reward prefers rare tokens, so that there is something to learn."""
    client = model.openai_client()

    async def title(body: str, number: int) -> art.Trajectory:
        messages = list(policy_messages(body))
        answer = await client.chat.completions.create(
            model=model.get_inference_name(),
            messages=messages,  # type: ignore[arg-type]
            max_tokens=12,
            logprobs=True,
            seed=100 * seed + number,
        )
        content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
        reward = sum(item.logprob for item in content or []) if spread else 1.0
        return art.Trajectory(messages_and_choices=[*messages, answer.choices[0]], reward=-reward)  # type: ignore[list-item]

    return [art.TrajectoryGroup(await asyncio.gather(*(title(body, n) for n in range(4)))) for body in BODIES]


async def step(backend: CpuBackend, model: art.TrainableModel, seed: int) -> dict[str, float]:
    result = await backend.train(
        model, await roll_out(model, seed=seed), learning_rate=1e-2, packed_sequence_length=512
    )
    return result.metrics


async def canary(backend: CpuBackend, model: art.TrainableModel) -> float:
    tokens = canary_tokens(load_tokenizer())
    trainer = await backend.trainer_logprobs(model, tokens)
    checked = await check_canary(model.openai_client(), model.get_inference_name(), tokens, trainer, tolerance=1e-3)
    return checked.max_difference


async def test_a_step_trains_serves_the_new_adapter_and_passes_the_canary(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-used")
    caplog.set_level(logging.INFO)
    tokens = canary_tokens(load_tokenizer())
    async with open_run(tmp_path) as (backend, model):
        assert model.get_inference_name() == "run@0"
        assert await canary(backend, model) < 1e-4
        before = await backend.trainer_logprobs(model, tokens)
        capfd.readouterr()
        metrics = await step(backend, model, 1)
        assert capfd.readouterr() == ("", ""), "ART's lines go to the log, and its bars nowhere"
        assert model.get_inference_name() == "run@1"
        assert await canary(backend, model) < 1e-4
        after = await backend.trainer_logprobs(model, tokens)
        # The old adapter is still served, and is the old one.
        old = await check_canary(model.openai_client(), "run@0", tokens, before, tolerance=1e-3)
        assert old.max_difference < 1e-4
    assert max(abs(one - other) for one, other in zip(before, after, strict=True)) > 0.01
    folder = step_folder(checkpoints(tmp_path), 1)
    expected = plain_logprobs(load_with_adapter(folder), tokens[:1], tokens[1:])
    assert after == pytest.approx(expected, abs=1e-4)
    assert metrics["data/step_num_gradient_steps"] == 1
    assert metrics["probs_corr"] > 0.999, "trained on titles of the very policy that is trained"
    assert {"loss/train", "loss/entropy", "loss/grad_norm"} <= metrics.keys()
    assert any("Packed 8 trajectories" in record.message for record in caplog.records)
    assert not list(tmp_path.rglob("wandb"))
    assert not [path for path in checkpoints(tmp_path).iterdir() if not path.name.isdigit()]


async def test_the_canary_trips_on_another_adapter(tmp_path: Path) -> None:
    async with open_run(tmp_path) as (backend, model):
        await step(backend, model, 1)
        assert await canary(backend, model) < 1e-4
        folder = step_folder(checkpoints(tmp_path), 1)
        adapter = load_file(folder / "adapter_model.safetensors")
        name = next(key for key in adapter if key.endswith("v_proj.lora_B.weight"))
        adapter[name] = adapter[name] + 0.05
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        service = await backend._get_service(model)
        assert isinstance(service, CpuService)
        await service.register_lora_for_step(1, str(folder))
        with pytest.raises(SamplerDisagrees, match="nats apart"):
            await canary(backend, model)


async def test_a_resumed_run_makes_the_steps_of_an_uninterrupted_one(tmp_path: Path) -> None:
    async with open_run(tmp_path / "straight") as (backend, model):
        straight = [await step(backend, model, seed) for seed in range(3)]
    async with open_run(tmp_path / "resumed") as (backend, model):
        resumed = [await step(backend, model, 0)]
    # A kill while the next checkpoint was being written leaves this behind.
    leftover = checkpoints(tmp_path / "resumed") / ".new-0002-torn"
    leftover.mkdir()
    (leftover / "adapter_config.json").write_text("{")
    async with open_run(tmp_path / "resumed") as (backend, model):
        assert model.get_inference_name() == "run@1"
        assert await canary(backend, model) < 1e-4
        resumed += [await step(backend, model, seed) for seed in (1, 2)]
    for one, other in zip(straight, resumed, strict=True):
        for key in ("loss/train", "loss/entropy", "loss/grad_norm", "probs_corr"):
            assert one[key] == pytest.approx(other[key], rel=1e-6)
    ends = [
        load_file(step_folder(checkpoints(tmp_path / run), 3) / "adapter_model.safetensors")
        for run in ("straight", "resumed")
    ]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


async def test_a_broken_off_update_is_not_carried_into_the_next_one(tmp_path: Path) -> None:
    per_sequence = CpuSettings(threads=2, updates_per_step="per_sequence")
    async with open_run(tmp_path / "calm", per_sequence) as (backend, model):
        groups = await roll_out(model, seed=1)
        await backend.train(model, groups, learning_rate=1e-2, packed_sequence_length=128)
    async with open_run(tmp_path / "broken", per_sequence) as (backend, model):
        async for _ in _first_update(backend, model, groups):
            break
        assert steps_on_disk(checkpoints(tmp_path / "broken")) == [0]
        assert await canary(backend, model) < 1e-4
        await backend.train(model, groups, learning_rate=1e-2, packed_sequence_length=128)
    ends = [
        load_file(step_folder(checkpoints(tmp_path / run), 1) / "adapter_model.safetensors")
        for run in ("calm", "broken")
    ]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


async def _first_update(
    backend: CpuBackend, model: art.TrainableModel, groups: list[art.TrajectoryGroup]
) -> AsyncIterator[dict[str, float]]:
    from art._backend_training import build_rl_train_configs

    config, dev_config = build_rl_train_configs(learning_rate=1e-2, packed_sequence_length=128)
    updates = backend._train_model(model, groups, config, dev_config)
    async for metrics in updates:
        yield metrics
    raise AssertionError("the test breaks off before the end")


async def test_a_step_without_spread_is_served_under_its_new_name(tmp_path: Path) -> None:
    async with open_run(tmp_path) as (backend, model):
        groups = await roll_out(model, seed=1, spread=False)
        result = await backend.train(model, groups, learning_rate=1e-2, packed_sequence_length=512)
        assert result.step == 1
        assert model.get_inference_name() == "run@1"
        assert await canary(backend, model) < 1e-4


async def test_closing_frees_the_port_and_ends_every_thread(tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    async with open_run(tmp_path) as (backend, model):
        port = int(model.inference_base_url.split(":")[2].split("/")[0])  # type: ignore[union-attr]
        await roll_out(model, seed=1)
        await backend.trainer_logprobs(model, [1, 2, 3])
    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if not name.startswith("asyncio_")}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with socket.socket() as free:
        # Closed connections hold a port back for a minute from those who do not ask for it this way.
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))
        free.listen()


def test_the_canary_is_a_prompt_and_a_title() -> None:
    tokenizer = load_tokenizer()
    text = tokenizer.decode(canary_tokens(tokenizer))
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant")
    assert text.endswith(f"<|im_start|>assistant\n{CANARY_TITLE}")
