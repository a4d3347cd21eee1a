"""The trainer against a plain autograd reference of the same loss, and against itself."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pytest
import torch
from cpu_parts import load_base, load_tokenizer, load_with_adapter, make_trainer, plain_logprobs
from gradient_parts import UNCLIPPED, Title, gradients, pack, random_groups, train
from peft import PeftModel

from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.cpu.trainer import Trainer
from tasks.titles.errors import CheckpointError, ConfigError, RunStopped

BODIES = ("A queue that needs less memory.", "Seven engineers left Corvane in May, says the report.", "Short.")
DISTURBANCE = 0.02


@pytest.fixture(scope="module")
def cores() -> Iterator[Cores]:
    cores = Cores(2)
    yield cores
    cores.close()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer._trained.items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0, name
        assert float((found[name] - gradient).norm() / gradient.norm()) < relative, name


def reference_loss(model: PeftModel, groups: list[list[Title]], *, ppo: bool) -> torch.Tensor:
    """Return the loss as its papers write it, each trajectory alone in its own forward pass.

    CISPO (MiniMax-M1, arXiv 2506.13585): clipped ratio, without gradient, times advantage times log-probability.
    PPO (arXiv 1707.06347): the lesser of ratio and clipped ratio, times advantage. Advantages are GRPO's
    (arXiv 2402.03300); like ART, each title has the same weight whatever its length, and advantages are
    scaled to a mean absolute value of 1 per token.
    """
    tokenizer = load_tokenizer()
    advantages, lengths, terms = [], [], []
    for group in groups:
        rewards = torch.tensor([title.reward for title in group])
        normal = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        for title, advantage in zip(group, normal, strict=True):
            prompt = tokenizer.apply_chat_template(title.messages, add_generation_prompt=True, return_dict=False)
            tokens = torch.tensor([[*prompt, *title.tokens]])
            logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
            now = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
            ratio = (now - torch.tensor(title.logprobs)).exp()
            if ppo:
                terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum())
            else:
                terms.append(-(ratio.detach().clamp(0.0, 5.0) * advantage * now).sum())
            advantages.append(float(advantage))
            lengths.append(len(title.tokens))
    total = sum(lengths)
    share = [total / (len(lengths) * length) for length in lengths]
    scale = sum(abs(a) * s * n for a, s, n in zip(advantages, share, lengths, strict=True)) / total
    loss = torch.stack([term * s / scale for term, s in zip(terms, share, strict=True)]).sum() / total
    return loss


@pytest.mark.parametrize("loss", ["cispo", "ppo"])
def test_gradients_agree_with_a_plain_reference(tmp_path: Path, cores: Cores, loss: str) -> None:
    groups = random_groups(1, BODIES)
    trainer = make_trainer(cores, UNCLIPPED, disturbance=DISTURBANCE)
    (tmp_path / "adapter").mkdir()
    trainer.save(tmp_path / "adapter")
    packed = pack(groups, tmp_path)
    assert packed["tokens"].shape[0] > 1, "the test is about several packed sequences"
    (metrics,) = train(trainer, packed, ppo=loss == "ppo")

    model = load_with_adapter(tmp_path / "adapter")
    expected = reference_loss(model, groups, ppo=loss == "ppo")
    expected.backward()
    assert metrics["loss/train"] == pytest.approx(expected.item(), rel=1e-4)
    reference = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_close(gradients(trainer), reference, 1e-4)
    norm = torch.cat([gradient.flatten() for gradient in reference.values()]).norm().item()
    assert metrics["loss/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_sharing_the_prompt_gives_the_gradient_of_not_sharing_it(tmp_path: Path, cores: Cores) -> None:
    groups = random_groups(2, BODIES)
    shared, alone = pack(groups, tmp_path), pack(groups, tmp_path, shared=False)
    assert shared["tokens"].shape[0] < alone["tokens"].shape[0] == 12
    found = []
    for packed in (shared, alone):
        trainer = make_trainer(cores, UNCLIPPED, disturbance=DISTURBANCE)
        train(trainer, packed)
        found.append(gradients(trainer))
    assert_close(found[0], found[1], 1e-4)


def test_the_number_of_cores_and_the_padding_change_nothing(tmp_path: Path, cores: Cores) -> None:
    groups = random_groups(3, BODIES)
    one_core = Cores(1)
    try:
        serial = make_trainer(one_core, UNCLIPPED, disturbance=DISTURBANCE)
        train(serial, pack(groups, tmp_path))
    finally:
        one_core.close()
    parallel = make_trainer(cores, UNCLIPPED, disturbance=DISTURBANCE)
    train(parallel, pack(groups, tmp_path))
    for name, gradient in gradients(serial).items():
        assert torch.equal(gradient, gradients(parallel)[name])
    padded = pack(groups, tmp_path)
    wide = {
        key: torch.nn.functional.pad(value, (0, 50), value={"group_ids": -1, "parent_ids": -1}.get(key, 0))
        if isinstance(value, torch.Tensor)
        else value
        for key, value in padded.items()
    }
    train(parallel, wide)  # type: ignore[arg-type]
    for name, gradient in gradients(serial).items():
        assert torch.equal(gradient, gradients(parallel)[name])


def test_one_update_a_step_or_one_per_sequence(tmp_path: Path, cores: Cores) -> None:
    packed = pack(random_groups(4, BODIES), tmp_path)
    sequences = packed["tokens"].shape[0]
    assert sequences > 1
    after = []
    for updates, expected in (("one", 1), ("per_sequence", sequences)):
        trainer = make_trainer(cores, CpuSettings(updates_per_step=updates), disturbance=DISTURBANCE)  # type: ignore[arg-type]
        metrics = train(trainer, packed, learning_rate=1e-3)
        assert len(metrics) == expected
        assert all(one["data/step_num_gradient_steps"] == expected for one in metrics)
        assert {int(state["step"]) for state in trainer._optimizer.state.values()} == {expected}
        after.append(weights(trainer))
    assert any(not torch.equal(one, after[1][name]) for name, one in after[0].items())


def test_the_gradient_is_clipped_and_its_norm_reported_unclipped(tmp_path: Path, cores: Cores) -> None:
    packed = pack(random_groups(5, BODIES), tmp_path)
    trainer = make_trainer(cores, CpuSettings(max_grad_norm=0.01), disturbance=DISTURBANCE)
    (metrics,) = train(trainer, packed)
    assert metrics["loss/grad_norm"] > 0.02
    norm = torch.cat([gradient.flatten() for gradient in gradients(trainer).values()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_metrics_say_what_was_trained_on(tmp_path: Path, cores: Cores) -> None:
    groups = random_groups(6, BODIES)
    trainer = make_trainer(cores, disturbance=DISTURBANCE)
    (tmp_path / "adapter").mkdir()
    trainer.save(tmp_path / "adapter")
    (metrics,) = train(trainer, pack(groups, tmp_path), kl_penalty_coef=0.1)

    tokenizer, model, base = load_tokenizer(), load_with_adapter(tmp_path / "adapter"), load_base()
    old, new, reference, entropy = [], [], [], []
    for title in (title for group in groups for title in group):
        prompt = tokenizer.apply_chat_template(title.messages, add_generation_prompt=True, return_dict=False)
        old += title.logprobs
        new += plain_logprobs(model, prompt, title.tokens)
        reference += plain_logprobs(base, prompt, title.tokens)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *title.tokens]])).logits[0, len(prompt) - 1 : -1]
        entropy.append(torch.distributions.Categorical(logits=logits).entropy().mean())
    probabilities = torch.tensor([old, new]).exp()
    assert metrics["probs_corr"] == pytest.approx(float(torch.corrcoef(probabilities)[0, 1]), abs=1e-3)
    assert metrics["loss/kl_policy_ref"] == pytest.approx(
        sum(a - b for a, b in zip(new, reference, strict=True)) / len(new), abs=1e-4
    )
    # Each title weighs the same in ART's mean, whatever its length.
    assert metrics["loss/entropy"] == pytest.approx(float(torch.stack(entropy).mean()), rel=1e-3)


def test_a_saved_optimiser_takes_the_same_next_step(tmp_path: Path, cores: Cores) -> None:
    packed = [pack(random_groups(seed, BODIES), tmp_path) for seed in (7, 8)]
    first = make_trainer(cores, disturbance=DISTURBANCE)
    train(first, packed[0], learning_rate=1e-2)
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin")) + list((tmp_path / "saved").glob("*.pt"))
    train(first, packed[1], learning_rate=1e-2)

    second = make_trainer(cores)
    second.load(tmp_path / "saved")
    train(second, packed[1], learning_rate=1e-2)
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(second)[name])

    without_state = make_trainer(cores)
    without_state.load(tmp_path / "saved")
    without_state._optimizer.state.clear()
    train(without_state, packed[1], learning_rate=1e-2)
    assert any(not torch.equal(weight, weights(first)[name]) for name, weight in weights(without_state).items())


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path, cores: Cores) -> None:
    make_trainer(cores).save(tmp_path)
    with pytest.raises(CheckpointError, match="'r': 8"):
        make_trainer(cores, CpuSettings(lora_rank=4)).load(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer(cores).load(tmp_path)


def test_the_first_adapter_depends_on_the_seed_alone(cores: Cores) -> None:
    torch.manual_seed(1)
    first = weights(make_trainer(cores))
    torch.manual_seed(2)
    second, other = weights(make_trainer(cores)), weights(make_trainer(cores, CpuSettings(seed=2)))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())


def test_an_update_that_is_not_finite_stops_the_run_and_is_not_made(tmp_path: Path, cores: Cores) -> None:
    packed = pack(random_groups(9, BODIES), tmp_path)
    trainer = make_trainer(cores, disturbance=DISTURBANCE)
    before = weights(trainer)
    packed["advantages"][packed["assistant_mask"]] = float("inf")
    with pytest.raises(RunStopped, match="not finite"):
        train(trainer, packed, learning_rate=1e-2)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())


def test_options_that_are_not_supported_and_trajectories_too_long_are_refused(tmp_path: Path, cores: Cores) -> None:
    packed = pack(random_groups(1, BODIES), tmp_path)
    with pytest.raises(ConfigError, match="precalculate_logprobs"):
        train(make_trainer(cores), packed, precalculate_logprobs=True)
    with pytest.raises(ConfigError, match="Raise packed_sequence_length"):
        pack(random_groups(1, BODIES), tmp_path, length=20)


def test_packing_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    random.seed(1)
    first = pack(random_groups(1, BODIES), tmp_path)
    random.seed(2)
    state = random.getstate()
    second = pack(random_groups(1, BODIES), tmp_path)
    assert random.getstate() == state
    assert torch.equal(first["tokens"], second["tokens"])
    assert torch.equal(first["group_ids"], second["group_ids"])
