"""What vLLM is given of the policy: the merged weights, while the policy itself stays as it was, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from tasks.engines.trl_engine.merged_weights import merged_weights, push_merged_weights
from tasks.starter.paths import BASE_MODEL

ULPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7}
"""Two roundings of a weight, relative to it."""


def policy(dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(BASE_MODEL), dtype=dtype)
    settings = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return cast(PeftModel, get_peft_model(base, settings))


def copies(weights: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in weights}


@pytest.mark.parametrize("dtype", ULPS)
def test_the_merged_weights_are_those_of_trl_and_the_policy_is_untouched(dtype: torch.dtype) -> None:
    model = policy(dtype)
    before = copies(model.named_parameters())
    merged = copies(merged_weights(model))
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)

    generation: Any = object.__new__(VLLMGeneration)  # its own way, without a vLLM behind it
    generation.model = model
    generation._dist = type("Alone", (), {"is_fsdp": False, "gather_params": lambda self, _: torch.no_grad()})()
    theirs = copies(generation._iter_named_params())
    plain = copies(AutoModelForCausalLM.from_pretrained(str(BASE_MODEL), dtype=dtype).named_parameters())
    assert merged.keys() == theirs.keys() == plain.keys()
    for name, weight in theirs.items():
        assert torch.allclose(merged[name].float(), weight.float(), rtol=ULPS[dtype], atol=1e-7), name
    changed = {name for name in merged if not torch.equal(merged[name], plain[name])}
    assert changed == {name for name in merged if "_proj" in name and name.endswith("weight")}


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_sync_brings_all_merged_weights_to_vllm(mode: str) -> None:
    model, calls = policy(torch.float32), []
    vllm = SimpleNamespace(load_weights=lambda weights: calls.append(copies(weights)))
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=vllm))
    generation: Any = object.__new__(VLLMGeneration)  # TRL's own sync, with these in vLLM's place
    generation.mode, generation.enable_sleep_mode, generation._weight_metadata = mode, False, None
    generation.model, generation.accelerator = model, SimpleNamespace(is_main_process=True)
    generation.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker)),
        reset_prefix_cache=lambda: None,
    )
    generation.vllm_client = SimpleNamespace(
        update_named_params=lambda _, weights: calls.append(copies(weights)), reset_prefix_cache=lambda: None
    )
    push_merged_weights(cast(Any, SimpleNamespace(vllm_generation=generation)))
    generation.sync_weights()
    expected = copies(merged_weights(model))
    (given,) = calls
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], weight) for name, weight in expected.items())
