"""The trainer of a GPU's packed sequences, in float32 on a CPU: against the CPU's own and against single passes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pytest
import torch
from art._backend_training import build_rl_train_configs
from art.preprocessing.pack import PackedTensors
from cpu_parts import load_tokenizer, load_with_adapter, make_trainer, plain_logprobs
from gradient_parts import UNCLIPPED, gradients, pack, random_groups, train
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.engines.cpu.cores import Cores
from tasks.engines.gpu.packed_trainer import PackedTrainer
from tasks.titles.errors import ConfigError, RunStopped

BODIES = ("A queue that needs less memory.", "Seven engineers left Corvane in May.", "Short.")


@pytest.fixture(scope="module")
def cores() -> Iterator[Cores]:
    cores = Cores(1)
    yield cores
    cores.close()


def packed_trainer(model: PeftModel, *, max_grad_norm: float = 1e9) -> PackedTrainer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return PackedTrainer(model, torch.optim.AdamW(weights, lr=0.0), max_grad_norm=max_grad_norm)


def update(trainer: PackedTrainer, packed: PackedTensors, *, learning_rate: float = 1e-3, **options: object) -> object:
    return trainer.update(packed, *build_rl_train_configs(learning_rate=learning_rate, **options))  # type: ignore[arg-type]


def found_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def prepare_as_unsloth(model: PeftModel) -> None:
    """Make gradient checkpointing ready, the reentrant way, and leave it off."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = False


@pytest.mark.parametrize("prepare", [lambda model: None, prepare_as_unsloth])
def test_its_gradient_is_that_of_the_cpu_trainer(
    tmp_path: Path, cores: Cores, prepare: Callable[[PeftModel], None]
) -> None:
    own = make_trainer(cores, UNCLIPPED, disturbance=0.02)
    own.save(tmp_path)
    packed = pack(random_groups(1, BODIES), tmp_path)
    assert packed["tokens"].shape[0] > 1, "the test is about several packed sequences"
    (expected,) = train(own, packed, kl_penalty_coef=0.1)

    model = load_with_adapter(tmp_path)
    prepare(model)
    trainer = packed_trainer(model)
    passes: list[int] = []
    layers: Any = model.get_base_model().model.layers
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: passes.append(number))
    configs = build_rl_train_configs(learning_rate=0.0, kl_penalty_coef=0.1)
    parts = trainer.gradients(packed, *configs)
    # The reference, the policy, and the policy again in the backward pass: it keeps no layer's work.
    assert Counter(passes) == dict.fromkeys(range(len(layers)), 3 * len(parts))
    assert sum(part.loss for part in parts) == pytest.approx(expected["loss/train"], rel=1e-4)
    assert sum(part.entropy for part in parts) == pytest.approx(expected["loss/entropy"], rel=1e-4)
    assert sum(part.divergence for part in parts) == pytest.approx(expected["loss/kl_policy_ref"], abs=1e-5)
    found = found_gradients(model)
    for name, gradient in gradients(own).items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-4, name


def test_titles_that_share_a_prompt_have_the_probabilities_of_single_ones(tmp_path: Path, cores: Cores) -> None:
    make_trainer(cores, disturbance=0.02).save(tmp_path)
    model, groups = load_with_adapter(tmp_path), random_groups(2, BODIES)
    packed = pack(groups, tmp_path, length=512)
    assert packed["tokens"].shape[0] == 1
    config, _ = build_rl_train_configs(learning_rate=0.0)
    together = packed_trainer(model).logprobs(packed, 0, config).tolist()
    tokenizer = load_tokenizer()
    alone = {
        # Groups keep their order in the pack and titles within a group do not: they are told apart by their tokens.
        tuple(title.tokens): plain_logprobs(
            model.eval(),
            tokenizer.apply_chat_template(title.messages, add_generation_prompt=True, return_dict=False),
            title.tokens,
        )
        for group in groups
        for title in group
    }
    spoken = packed["tokens"][0][packed["assistant_mask"][0]].tolist()
    while spoken:
        end = spoken.index(2047) + 1
        expected = alone.pop(tuple(spoken[:end]))
        assert together[:end] == pytest.approx(expected, abs=1e-3)
        spoken, together = spoken[end:], together[end:]
    assert not alone and not together


def test_one_clipped_update_for_all_sequences(tmp_path: Path, cores: Cores) -> None:
    make_trainer(cores, disturbance=0.02).save(tmp_path)
    packed = pack(random_groups(3, BODIES), tmp_path)
    model = load_with_adapter(tmp_path)
    trainer = packed_trainer(model, max_grad_norm=0.01)
    seen: list[float] = []
    trainer._optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            float(torch.cat([gradient.flatten() for gradient in found_gradients(model).values()]).norm())
        )
    )
    metrics = update(trainer, packed)
    assert isinstance(metrics, dict) and metrics["loss/grad_norm"] > 0.02
    assert seen == [pytest.approx(0.01, rel=1e-3)]
    assert not found_gradients(model)
    assert model.training and all(module.training for module in model.modules())


def test_an_update_of_the_gpu_that_is_not_finite_is_not_made(tmp_path: Path, cores: Cores) -> None:
    make_trainer(cores, disturbance=0.02).save(tmp_path)
    packed = pack(random_groups(4, BODIES), tmp_path)
    model = load_with_adapter(tmp_path)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    packed["advantages"][packed["assistant_mask"]] = float("inf")
    with pytest.raises(RunStopped, match="not finite"):
        update(packed_trainer(model), packed)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not found_gradients(model)
    with pytest.raises(ConfigError, match="precalculate_logprobs"):
        update(packed_trainer(model), packed, precalculate_logprobs=True)
