"""What a training needs: figures that follow exactly from a model's shape, and that estimates grow as they should."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors import safe_open

from tasks.starter.paths import BASE_MODEL
from tasks.titles.config import Profile, load_profile
from tasks.titles.errors import ConfigError
from tasks.titles.memory_estimate import (
    GB,
    Estimate,
    activation_bytes,
    adapter_bytes,
    estimate,
    logit_bytes,
    vllm_cache,
    weight_bytes,
)
from tasks.titles.model_shape import ModelShape, read_shape

QWEN_HALF = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN_SEVEN = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip
STARTER = json.loads((BASE_MODEL / "config.json").read_text(encoding="utf-8"))


def shape(config: dict[str, Any], **changes: object) -> ModelShape:
    return read_shape({**config, **changes}, "a test")


def estimate_on(
    profile: Profile,
    found: ModelShape,
    *,
    gpu_bytes: float = 80 * GB,
    free_bytes: float = 80 * GB,
    judge_bytes: float = 0,
) -> Estimate:
    return estimate(
        profile,
        found,
        gpu_bytes=gpu_bytes,
        free_bytes=min(free_bytes, gpu_bytes),
        longest=8_448,
        judge_bytes=judge_bytes,
    )


@pytest.mark.parametrize(
    ("config", "parameters", "lora", "kv"),
    [
        # Parameters: the model cards' 0.49 and 7.62 billion to the last one; LoRA: what PEFT counts for rank 8.
        (QWEN_HALF, 494_032_768, 4_399_104, 12_288),
        (QWEN_SEVEN, 7_615_616_512, 20_185_088, 57_344),
        (STARTER, 5_249_280, None, 3_072),
    ],
    ids=["0.5B", "7B", "starter"],
)
def test_sizes_are_exact(config: dict[str, Any], parameters: int, lora: int | None, kv: int) -> None:
    found = shape(config)
    assert found.parameters == parameters
    assert found.kv_bytes_per_token() == kv
    if lora is not None:
        assert found.lora_parameters(8) == lora and found.lora_parameters(16) == 2 * lora
    assert weight_bytes(found) == 2 * parameters > weight_bytes(found, four_bit=True)


def test_the_starter_models_file_holds_as_many_numbers_and_peft_makes_as_large_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = shape(STARTER)
    with safe_open(BASE_MODEL / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert found.parameters == stored
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(BASE_MODEL)), LoraConfig(r=8, target_modules="all-linear")
    )
    assert found.lora_parameters(8) == sum(part.numel() for part in model.parameters() if part.requires_grad)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**QWEN_HALF, "model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({key: value for key, value in QWEN_HALF.items() if key != "vocab_size"}, "lacks a size"),
    ],
)
def test_a_model_of_another_layout_is_not_guessed_at(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_shape(config, "a test")


def test_a_share_that_weights_fill_leaves_no_cache() -> None:
    found = shape(QWEN_SEVEN)
    assert vllm_cache(found, 16 * GB, 8_448).tokens == 0
    roomy = vllm_cache(found, 60 * GB, 8_448)
    assert roomy.tokens == int((60 * GB - 2 * 7_615_616_512 - 3 * GB) / 57_344)
    assert roomy.at_once == pytest.approx(roomy.tokens / 8_448)


@pytest.mark.parametrize(
    ("config", "share", "longest", "tokens"),
    [(QWEN_HALF, 0.75, 2_296, 4_862_625), (QWEN_SEVEN, 0.6, 8_448, 567_056)],
    ids=["0.5b", "7b"],
)
def test_the_cache_is_nearly_what_vllm_has_on_an_h100(
    config: dict[str, Any], share: float, longest: int, tokens: int
) -> None:
    found = vllm_cache(shape(config), share * 79.18 * 2**30, longest)
    assert found.tokens == pytest.approx(tokens, rel=0.02)


def test_logits_and_activations_are_counted_as_said() -> None:
    found = shape(QWEN_HALF)
    assert logit_bytes(found, 1024) == 4 * 1024 * 151_936 * 4
    assert activation_bytes(found, 8_192) == (24 * 8_192 * 896 + 8_192 * 6 * (896 + 4_864)) * 2


@pytest.mark.parametrize("changes", [[], ["engine=trl"]], ids=["art", "trl"])
def test_what_is_longer_or_larger_takes_more_and_vllms_share_counts_while_titles_are_written(
    changes: list[str],
) -> None:
    def peak(profile: Profile, config: dict[str, Any], phase: str) -> float:
        found = estimate_on(profile, shape(config))
        return next(part.bytes for part in found.phases if part.name == phase)

    profile = load_profile("qwen-0.5b", changes)
    short = load_profile("qwen-0.5b", [*changes, "max_prompt_tokens=1948"])
    small_share = load_profile("qwen-0.5b", [*changes, f"{profile.engine}.vllm_memory_share=0.1"])
    assert peak(short, QWEN_HALF, "training") < peak(profile, QWEN_HALF, "training")
    assert peak(profile, QWEN_HALF, "training") < peak(profile, QWEN_SEVEN, "training")
    assert peak(profile, QWEN_HALF, "rollouts") > peak(small_share, QWEN_HALF, "rollouts") + 10 * GB


def test_reward_models_on_the_same_gpu_count_in_every_phase() -> None:
    profile, found = load_profile("qwen-0.5b"), shape(QWEN_HALF)
    without, beside = (estimate_on(profile, found, judge_bytes=judge) for judge in (0, 1 * GB))
    more = [b.bytes - a.bytes for a, b in zip(without.phases, beside.phases, strict=True)]
    assert more == pytest.approx([1.7 * GB] * 2)


def training(changes: list[str], **there: float) -> dict[str, dict[str, float]]:
    """The bytes of each part in each phase of a training of the 0.5B model, with ART unless `changes` say otherwise."""
    found = estimate_on(load_profile("qwen-0.5b", changes), shape(QWEN_HALF), **there)
    return {phase.name: {part.name: part.bytes for part in phase.parts} for phase in found.phases}


def test_a_packed_update_holds_logits_of_titles_alone_and_the_output_layer_in_32_bits() -> None:
    packed, by_art = (training([f"updates_per_step={one}"])["training"] for one in ("one", "per_sequence"))
    found = shape(QWEN_HALF)
    assert packed["logits"] == logit_bytes(found, 600) and by_art["logits"] == logit_bytes(found, 1024)
    assert packed["output layer, 32 bits"] == 4 * 896 * 151_936 and "output layer, 32 bits" not in by_art
    assert packed["activations"] == activation_bytes(found, 8_704) > by_art["activations"]
    assert packed["attention mask"] == 6 * 8_704**2 and by_art["attention mask"] == 2 * 8_192**2
    # Eight prompts: all of their titles may be in one sequence.
    assert training(["groups_per_step=8"])["training"]["logits"] == logit_bytes(found, 4_800)


@pytest.mark.parametrize(
    ("changes", "there", "stay", "vllm"),
    [
        ([], {}, True, "vLLM asleep"),
        ([], {"gpu_bytes": 20 * GB}, False, "vLLM asleep"),  # a quarter of it holds no weights and 4 GiB
        ([], {"free_bytes": 66 * GB}, False, "vLLM asleep"),
        ([], {"judge_bytes": 13 * GB}, False, "vLLM asleep"),
        (["art.sleep=false"], {"gpu_bytes": 20 * GB}, True, "vLLM's share"),
        (["updates_per_step=per_sequence"], {}, False, "vLLM asleep"),
        (["art.trainer_gpus=[0]", "art.inference_gpus=[1]"], {}, False, None),
    ],
    ids=["sleep", "small GPU", "taken GPU", "with a judge", "awake", "as ART does", "two GPUs"],
)
def test_who_is_on_arts_gpu_beside_whom(
    changes: list[str], there: dict[str, float], stay: bool, vllm: str | None
) -> None:
    phases = training(changes, **there)
    assert ("base weights" in phases["rollouts"]) is stay
    assert {"vLLM asleep", "vLLM's share"} & phases["training"].keys() == ({vllm} if vllm else set())
    assert phases["rollouts"]["vLLM's share"] == 0.75 * there.get("gpu_bytes", 80 * GB)


@pytest.mark.parametrize(
    ("changes", "writing", "learning"),
    [
        ([], {"base weights", "vLLM's share"}, {"base weights", "vLLM asleep"}),
        (["trl.vllm_sleep=false"], {"base weights", "vLLM's share"}, {"base weights", "vLLM's share"}),
        (["trl.unsloth=true"], {"vLLM's share"}, {"vLLM's share"}),
        (["trl.vllm_mode=server"], {"base weights"}, {"base weights"}),
    ],
    ids=["sleep", "awake", "Unsloth", "server"],
)
def test_who_is_on_trls_gpu_beside_whom(changes: list[str], writing: set[str], learning: set[str]) -> None:
    phases = training(["engine=trl", *changes])
    told = {"base weights", "vLLM asleep", "vLLM's share"}
    assert told & phases["rollouts"].keys() == writing
    assert told & phases["training"].keys() == learning


def test_a_checkpoint_holds_the_adapter_and_two_moments() -> None:
    found = shape(QWEN_HALF)
    assert adapter_bytes(load_profile("qwen-0.5b"), found) == (4 * 4_399_104, 2 * 4_399_104)
    assert adapter_bytes(load_profile("starter"), found) == (4 * 4_399_104, 8 * 4_399_104)
