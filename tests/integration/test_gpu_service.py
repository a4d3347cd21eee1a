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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tasks.engines.gpu.backend import get_model_config
from tasks.engines.gpu.service import GpuService, UnslothService
from tasks.starter.paths import BASE_MODEL


def policy() -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(BASE_MODEL), dtype=torch.bfloat16)
    return cast(PeftModel, get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")))


def service(folder: Path, state: Any) -> GpuService:
    made = GpuService("policy", str(BASE_MODEL), {"trainer_args": {"optim": "adamw_8bit"}}, str(folder))
    made.__dict__["_state"] = state  # where the property keeps what Unsloth has made
    return made


async def test_training_keeps_the_precision_that_art_takes_off_and_writes_the_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    own = service(tmp_path, SimpleNamespace(trainer=trainer))
    for step in (1, 2):
        assert [result async for result in own.train("tensors", "config")] == [{"loss": 0.0}]
        assert model(**tokens).logits.dtype == torch.float32
        assert (tmp_path / "checkpoints" / f"{step:04d}" / "optimizer.safetensors").stat().st_size > 1000


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


def test_art_makes_its_configuration_without_megatron_and_nobody_takes_the_stand_ins_for_it() -> None:
    assert importlib.util.find_spec("megatron") is None, "this test is for machines without it"
    config = get_model_config(base_model=str(BASE_MODEL), output_dir="nowhere", config=None)
    assert set(config["peft_args"]["target_modules"]) >= {"q_proj", "down_proj"}
    assert not [name for name in sys.modules if name.partition(".")[0] == "megatron"]
