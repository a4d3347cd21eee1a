"""What this project adds to ART's Unsloth service, with accelerate's real wrapper and a real optimiser, but no GPU.

`tests/gpu` holds what needs one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from art._backend_training import build_rl_train_configs
from art.preprocessing.pack import packed_tensors_to_dir
from fastapi import FastAPI
from gradient_parts import Title, pack
from peft import LoraConfig, PeftModel, get_peft_model
from serving import serving
from transformers import AutoModelForCausalLM

from tasks.engines.gpu.backend import get_model_config
from tasks.engines.gpu.service import GpuService, UnslothService
from tasks.starter.paths import BASE_MODEL
from tasks.titles import metric_names as names
from tasks.titles.errors import RunStopped


def policy() -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(BASE_MODEL), dtype=torch.bfloat16)
    return cast(PeftModel, get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")))


def service(folder: Path, state: Any, **changes: Any) -> GpuService:
    trainer_args = {"optim": "adamw_8bit", "max_grad_norm": 0.1}
    config = {"trainer_args": trainer_args, "engine_args": {}, "rollout_weights_mode": "lora"}
    made = GpuService("policy", str(BASE_MODEL), config, str(folder), **changes)  # type: ignore[arg-type]
    made.__dict__["_state"] = state  # where the property keeps what Unsloth has made
    return made


async def test_training_keeps_the_precision_that_art_takes_off_and_writes_the_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever precision other trainers of this process have asked for: accelerate remembers the first.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = policy()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    trainer = SimpleNamespace(model=model, optimizer=optimizer)
    tokens = {"input_ids": torch.arange(5)[None]}

    async def train(self: UnslothService, *_: Any, **__: Any) -> AsyncIterator[dict[str, float]]:
        """ART's way through a step: wrap once, update, and unwrap for the checkpoint."""
        if trainer.optimizer is optimizer:
            accelerator.prepare(model)
            trainer.optimizer = accelerator.prepare(optimizer)
        output = model(**tokens)
        assert output.logits.dtype == torch.float32
        output.logits.square().mean().backward()
        trainer.optimizer.step()
        yield {"loss": 0.0}
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert model(**tokens).logits.dtype == torch.bfloat16
        self._latest_step += 1
        (tmp_path / "checkpoints" / f"{self._latest_step:04d}").mkdir(parents=True)

    monkeypatch.setattr(UnslothService, "train", train)
    own = service(tmp_path, SimpleNamespace(trainer=trainer), updates_per_step="per_sequence")
    for step in (1, 2):
        results = own.train(*cast(Any, ("tensors", "config", "dev_config")))
        assert [result async for result in results] == [{"loss": 0.0}]
        assert model(**tokens).logits.dtype == torch.float32
        assert (tmp_path / "checkpoints" / f"{step:04d}" / "optimizer.safetensors").stat().st_size > 1000


class Recorder:
    """A trainer whose weights are moved nowhere, and a server that only notes what it is asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free_memory: int) -> None:
        self.asked: list[str] = []
        model = policy()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.state = SimpleNamespace(
            trainer=SimpleNamespace(model=model, optimizer=torch.optim.AdamW(weights)),
            peft_model=model,
            reload_to_gpu=lambda: self.asked.append("reload"),
            offload_to_cpu=lambda: self.asked.append("offload"),
        )
        for name in ("_sleep_runtime", "_wake_runtime", "_reload_adapter", "aclose"):
            monkeypatch.setattr(GpuService, name, self._note(name))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_memory, free_memory))

    def _note(self, name: str) -> Any:
        async def note(own: UnslothService, *arguments: Any) -> None:
            self.asked.append(" ".join([name, *(str(argument) for argument in arguments[1:])]))

        return note


async def train(own: GpuService, folder: Path, **damage: float) -> list[dict[str, float]]:
    title = Title([{"role": "user", "content": "A body."}], [5, 6, 7, 2047], [-3.0] * 4, 1.0)
    packed = pack([[title, Title(title.messages, [8, 9, 2047], [-2.0] * 3, 0.0)]], folder)
    if damage:
        packed["advantages"][:] = damage["advantages"]
    config, dev_config = build_rl_train_configs(learning_rate=1e-3)
    tensors = packed_tensors_to_dir(packed, str(folder / "tensors"))
    return [result async for result in own.train(tensors, config, dev_config)]


ROOM, NO_ROOM = 2**40, 2**30


@pytest.mark.parametrize(
    ("sleep", "free_memory", "asked"),
    [
        (True, ROOM, ["_sleep_runtime", "reload", "_wake_runtime", "_reload_adapter 1"]),
        (True, NO_ROOM, ["_sleep_runtime", "reload", "offload", "_wake_runtime", "_reload_adapter 1"]),
        (False, NO_ROOM, ["reload", "_reload_adapter 1"]),
    ],
)
async def test_a_step_at_once_does_what_memory_asks_for_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleep: bool, free_memory: int, asked: list[str]
) -> None:
    recorder = Recorder(monkeypatch, free_memory=free_memory)
    before = {name: weight.detach().clone() for name, weight in recorder.state.peft_model.named_parameters()}
    own = service(tmp_path, recorder.state, sleep=sleep)
    (metrics,) = await train(own, tmp_path)
    assert recorder.asked == asked
    timed = {name for name in names.GPU_TRAINING_TIMES if name in metrics}
    waiting = {names.TIME_SLEEP, names.TIME_WAKE}
    assert timed == set(names.GPU_TRAINING_TIMES) - (set() if sleep else waiting)
    assert metrics["data/step_num_gradient_steps"] == 1.0 and metrics["loss/grad_norm"] > 0
    written = {path.name for path in (tmp_path / "checkpoints" / "0001").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"} <= written
    changed = [name for name, weight in recorder.state.peft_model.named_parameters() if (weight != before[name]).any()]
    assert changed and all("lora_" in name for name in changed)


async def test_a_step_that_fails_closes_the_service_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch, free_memory=ROOM)
    own = service(tmp_path, recorder.state)
    with pytest.raises(RunStopped, match="not finite"):
        await train(own, tmp_path, advantages=float("inf"))
    assert recorder.asked == ["_sleep_runtime", "reload", "aclose"]
    assert not (tmp_path / "checkpoints").exists()


async def test_the_adapter_of_a_step_is_loaded_once_and_not_in_place(tmp_path: Path) -> None:
    vllm = FastAPI()
    asked = []

    @vllm.post("/v1/load_lora_adapter")
    async def load(body: dict[str, Any]) -> None:
        asked.append(body)

    async with serving(vllm) as url:
        made = service(tmp_path, None)
        made._vllm_port = int(url.rpartition(":")[2])
        for _ in range(2):
            await made.register_lora_for_step(3, "checkpoints/0003")
    assert asked == [{"lora_name": "policy@3", "lora_path": "checkpoints/0003"}]
    assert made._latest_step == 3


async def test_a_continued_run_gets_its_optimiser_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.engines.adapter_files import save_optimizer

    model = policy()
    trained = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    model(input_ids=torch.arange(5)[None]).logits.float().square().mean().backward()
    trained.step()
    folder = tmp_path / "checkpoints" / "0003"
    folder.mkdir(parents=True)
    save_optimizer(model, trained, folder, {"name": "adamw_8bit"})

    fresh = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    state = SimpleNamespace(trainer=SimpleNamespace(model=model, optimizer=fresh))
    monkeypatch.setattr(UnslothService, "_state", property(lambda self: state))
    own = GpuService("policy", str(BASE_MODEL), {}, str(tmp_path))
    assert own._state is state
    assert fresh.state.keys() == trained.state.keys()
    for weight, values in trained.state.items():
        assert torch.equal(fresh.state[weight]["exp_avg"], values["exp_avg"])


def test_art_makes_its_configuration_without_megatron_and_nobody_takes_the_stand_ins_for_it(tmp_path: Path) -> None:
    assert importlib.util.find_spec("megatron") is None, "this test is for machines without it"
    config = get_model_config(base_model=str(BASE_MODEL), output_dir=str(tmp_path), config=None)
    assert set(config["peft_args"]["target_modules"]) >= {"q_proj", "down_proj"}
    assert not [name for name in sys.modules if name.partition(".")[0] == "megatron"]
