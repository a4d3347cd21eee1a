"""Both engines compute one gradient: the same titles, rewards and formula move the adapter in the same direction.

ART's side is its own packing and loss in the CPU service's trainer, TRL's side a real `GRPOTrainer`. What is left
between them, and pinned here:

* **Weights of titles.** Every loss of ART averages over each title's tokens first, so that a title counts the same
  whatever its length. TRL's `grpo` does so too; `dapo` (its default) and `cispo` average over all tokens, so that long
  titles count for more. Advantages divided by length turn the one into the other.
* **Where the ratio is cut.** On titles of the present policy every ratio is 1 and all formulas have one gradient. On
  older titles ART's `ppo` is TRL's `grpo` and `dapo` (tokens beyond 1 ± 0.2 that would gain more add nothing), and
  ART's `cispo` is TRL's (they go on adding, with a ratio of 5 at most). TRL's `cispo` cuts at `epsilon_high`, whose
  default of 0.2 is meant for the others and takes four fifths of every gradient: it must be set to 5.
* **Scale.** ART divides a batch's advantages by their mean absolute value, so its gradient does not depend on how many
  groups had no spread of rewards; TRL divides by the number of titles, and with micro-batches by theirs once more. ART
  takes a group's standard deviation over its titles, TRL the sample's, √(G / (G - 1)) times as large. A constant factor
  does not change AdamW's update; but of two gradients the larger one meets the clip of the norm sooner.
"""

from __future__ import annotations

import functools
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pytest
import torch
from cpu_parts import load_base, load_tokenizer, load_with_adapter, make_trainer
from gradient_parts import UNCLIPPED, Title, gradients, pack, train
from transformers import TrainerCallback
from trl.trainer.utils import pad, shuffle_sequence_dict, split_tensor_dict
from trl_parts import grpo_trainer

from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.decoder import Decoder
from tasks.engines.cpu.sampler import Generation, generate
from tasks.engines.cpu.trainer import Trainer
from tasks.engines.cpu.weights import copy_state, decoder_weights, merge_adapter
from tasks.engines.trl_engine.sampler import CpuGeneration, Titles, install
from tasks.titles.cursor import sampling_seed
from tasks.titles.prompts import policy_messages

BODIES = (
    "A queue that needs less memory and restarts faster.",
    "Seven engineers left Corvane in May, says the report.",
    "The city will close its last coal plant in 2031.",
)
LENGTHS = (3, 6, 12, 24)
"""The most tokens of a group's titles: where lengths are alike, all weightings are."""
GROUP = len(LENGTHS)
SAME = 0.999
DIFFERENT = 0.98
"""Well below what two computations of one formula come to; the differences named above are at most 0.96 here."""
CISPO_LARGEST_RATIO = 5.0
Gradient = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cores: Cores) -> Path:
    """A checkpoint whose adapter is not the identity, so that both of its matrices have gradients."""
    folder = tmp_path_factory.mktemp("adapter")
    make_trainer(cores, UNCLIPPED, disturbance=0.05).save(folder)
    return folder


def prompt_ids(title: Title) -> list[int]:
    return list(load_tokenizer().apply_chat_template(title.messages, add_generation_prompt=True, return_dict=False))


@pytest.fixture(scope="module")
def on_policy(folder: Path, cores: Cores) -> list[list[Title]]:
    """The pinned batch: titles that the sampler wrote with the adapter in `folder`."""
    base = load_base()
    decoder = Decoder(decoder_weights(merge_adapter(copy_state(base), folder), base.config))
    rng = random.Random(1)
    groups = []
    for number, body in enumerate(BODIES):
        group = [Title([dict(message) for message in policy_messages(body)], [], [], rng.gauss(1, 1)) for _ in LENGTHS]
        requests = [
            Generation(tuple(prompt_ids(title)), length, (number, length), stop=frozenset({2047}))
            for title, length in zip(group, LENGTHS, strict=True)
        ]
        for title, written in zip(group, generate(decoder, requests, cores), strict=True):
            title.tokens, title.logprobs = written.tokens, written.logprobs
        groups.append(group)
    return groups


@pytest.fixture(scope="module")
def off_policy(on_policy: list[list[Title]]) -> list[list[Title]]:
    """The same titles as if an older policy had written them: ratios on both sides of the clip at 1 ± 0.2."""
    rng = random.Random(2)
    return [
        [
            Title(
                title.messages, title.tokens, [value + rng.uniform(-0.5, 0.5) for value in title.logprobs], title.reward
            )
            for title in group
        ]
        for group in on_policy
    ]


def advantages(groups: Sequence[Sequence[Title]]) -> torch.Tensor:
    """Return each title's advantage, [titles], as ART computes it before it scales the batch."""
    rewards = torch.tensor([[title.reward for title in group] for group in groups])
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    return (deviations / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)).flatten()


def art_gradient(folder: Path, groups: list[list[Title]], loss: str, cores: Cores) -> Gradient:
    trainer = Trainer(load_base(), UNCLIPPED, cores)
    trainer.load(folder)
    train(trainer, pack(groups, folder, length=256), ppo=loss == "ppo")
    return gradients(trainer)


def trl_gradient(
    folder: Path, groups: list[list[Title]], loss: str, own_advantages: torch.Tensor, **options: Any
) -> Gradient:
    """Return the gradient of TRL's loss over the micro-batches of a step, with a sampler's correction of 1."""
    titles = [title for group in groups for title in group]
    if loss == "cispo":
        options.setdefault("epsilon_high", CISPO_LARGEST_RATIO)
    trainer: Any = grpo_trainer(
        load_with_adapter(folder),
        folder,
        lambda completions, **_: [0.0 for _ in completions],
        [titles[0].messages],
        loss_type=loss,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=len(groups),
        num_generations=GROUP,
        **options,
    )
    assert trainer.vllm_importance_sampling_correction
    trainer.use_vllm = True
    trainer.model.train()
    # What Hugging Face's loop sets at each update.
    trainer.current_gradient_accumulation_steps = len(groups)
    prompts, written = [torch.tensor(prompt_ids(title)) for title in titles], [torch.tensor(t.tokens) for t in titles]
    batch = {
        "prompt_ids": pad(prompts, load_tokenizer().pad_token_id, "left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        "completion_ids": pad(written, load_tokenizer().pad_token_id, "right"),
        "completion_mask": pad([torch.ones_like(ids) for ids in written], 0, "right"),
        "old_per_token_logps": pad([torch.tensor(title.logprobs) for title in titles], 0, "right"),
        "importance_sampling_ratio": torch.ones(len(titles), 1),
        "advantages": own_advantages,
        "num_items_in_batch": torch.tensor(sum(len(title.tokens) for title in titles)),
    }
    torch.manual_seed(0)
    for part in split_tensor_dict(shuffle_sequence_dict(batch), len(groups)):
        trainer.compute_loss(trainer.model, part).backward()
    return gradients_of(trainer.model)


def gradients_of(model: torch.nn.Module) -> Gradient:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def flat(gradient: Gradient) -> torch.Tensor:
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])


def cosine(one: Gradient, other: Gradient) -> float:
    assert one.keys() == other.keys()
    return torch.nn.functional.cosine_similarity(flat(one), flat(other), dim=0).item()


def norms(one: Gradient, other: Gradient) -> float:
    return (flat(one).norm() / flat(other).norm()).item()


def mean_length_by_length(groups: Sequence[Sequence[Title]]) -> torch.Tensor:
    """Return the factors, [titles], that make a mean over tokens one over titles: mean length over own length."""
    lengths = torch.tensor([len(title.tokens) for group in groups for title in group], dtype=torch.float)
    return lengths.mean() / lengths


@pytest.fixture(scope="module")
def batches(on_policy: list[list[Title]], off_policy: list[list[Title]]) -> dict[str, list[list[Title]]]:
    return {"on-policy": on_policy, "off-policy": off_policy}


@pytest.fixture(scope="module")
def art(folder: Path, batches: dict[str, list[list[Title]]], cores: Cores) -> Callable[[str, str], Gradient]:
    """ART's gradient by loss and batch, each computed once."""
    return functools.cache(lambda loss, policy: art_gradient(folder, batches[policy], loss, cores))


@pytest.mark.parametrize(
    ("art_loss", "trl_loss", "policy"),
    [
        ("ppo", "grpo", "on-policy"),
        ("ppo", "grpo", "off-policy"),
        ("cispo", "grpo", "on-policy"),
    ],
)
def test_one_formula_one_gradient(
    folder: Path,
    batches: dict[str, list[list[Title]]],
    art: Callable[[str, str], Gradient],
    art_loss: str,
    trl_loss: str,
    policy: str,
) -> None:
    groups = batches[policy]
    own = advantages(groups)
    ours, theirs = art(art_loss, policy), trl_gradient(folder, groups, trl_loss, own)
    assert cosine(ours, theirs) >= SAME
    assert norms(ours, theirs) == pytest.approx(1 / own.abs().mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("art_loss", "trl_loss", "policy"),
    [
        ("ppo", "dapo", "on-policy"),
        ("ppo", "dapo", "off-policy"),
        ("cispo", "dapo", "on-policy"),
        ("cispo", "cispo", "on-policy"),
        ("cispo", "cispo", "off-policy"),
    ],
)
def test_what_is_left_is_the_weight_of_long_titles(
    folder: Path,
    batches: dict[str, list[list[Title]]],
    art: Callable[[str, str], Gradient],
    art_loss: str,
    trl_loss: str,
    policy: str,
) -> None:
    groups = batches[policy]
    own, ours = advantages(groups), art(art_loss, policy)
    assert cosine(ours, trl_gradient(folder, groups, trl_loss, own)) < DIFFERENT
    by_title = trl_gradient(folder, groups, trl_loss, own * mean_length_by_length(groups))
    assert cosine(ours, by_title) >= SAME
    assert norms(ours, by_title) == pytest.approx(1 / own.abs().mean().item(), rel=1e-3)


def test_on_older_titles_cispo_is_another_formula(
    folder: Path, off_policy: list[list[Title]], art: Callable[[str, str], Gradient]
) -> None:
    own = advantages(off_policy)
    assert cosine(art("cispo", "off-policy"), trl_gradient(folder, off_policy, "grpo", own)) < DIFFERENT
    assert cosine(art("cispo", "off-policy"), art("ppo", "off-policy")) < DIFFERENT


def test_trl_s_cispo_needs_a_bound_of_its_own(folder: Path, on_policy: list[list[Title]]) -> None:
    own = advantages(on_policy)
    bound, default = (
        trl_gradient(folder, on_policy, "cispo", own, epsilon_high=largest) for largest in (CISPO_LARGEST_RATIO, None)
    )
    assert cosine(bound, default) >= SAME
    assert norms(default, bound) == pytest.approx(0.2, rel=1e-3)


def test_a_group_without_spread_shrinks_trl_s_gradient_alone(
    folder: Path, on_policy: list[list[Title]], art: Callable[[str, str], Gradient], cores: Cores
) -> None:
    flat_group = [Title(title.messages, title.tokens, title.logprobs, reward=1.0) for title in on_policy[0]]
    more = [*on_policy, flat_group]
    ours = art_gradient(folder, more, "ppo", cores)
    assert cosine(ours, art("ppo", "on-policy")) >= SAME
    assert norms(ours, art("ppo", "on-policy")) == pytest.approx(1, rel=1e-3)
    theirs, before = (trl_gradient(folder, groups, "grpo", advantages(groups)) for groups in (more, on_policy))
    assert cosine(theirs, before) >= SAME
    assert norms(theirs, before) == pytest.approx(len(on_policy) / len(more), rel=1e-3)


class Recording(CpuGeneration):
    """Keeps the titles of the last call."""

    last: Titles

    def generate(self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any = None) -> Titles:
        self.last = super().generate(prompts, images, num_generations, profiler)
        return self.last


class BeforeTheUpdate(TrainerCallback):
    """Keeps the gradient that the optimiser is given."""

    gradient: Gradient

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.gradient = gradients_of(model)


@pytest.mark.parametrize("divided_once", [True, False])
def test_a_whole_step_of_trl_has_the_gradient_of_art_s(
    folder: Path, tmp_path: Path, cores: Cores, divided_once: bool
) -> None:
    """From sampling to the optimiser: TRL's own titles, advantages and micro-batches, and what ART makes of them.

    TRL divides the loss by the number of micro-batches, and so does accelerate's `backward` again
    (huggingface/transformers issue 40709), unless its `gradient_accumulation_steps` is set to 1 after construction.
    """
    rewards: list[float] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards.extend(sum(ids) / len(ids) for ids in completion_ids)
        return rewards

    trainer: Any = grpo_trainer(
        load_with_adapter(folder),
        tmp_path,
        reward,
        [policy_messages(body) for body in BODIES],
        loss_type="grpo",
        max_steps=1,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=len(BODIES),
        num_generations=GROUP,
        max_completion_length=max(LENGTHS),
        max_grad_norm=1e9,
    )
    sampler = Recording(
        trainer.model,
        max_tokens=max(LENGTHS),
        seed_of=lambda prompt, number: sampling_seed(1, 0, 0, str(prompt), number),
        cores=cores,
    )
    install(trainer, sampler)
    if divided_once:
        trainer.accelerator.gradient_accumulation_steps = 1
    seen = BeforeTheUpdate()
    trainer.add_callback(seen)
    trainer.train()

    _, written, logprobs, _ = sampler.last
    titles = [
        Title(
            [dict(message) for message in policy_messages(BODIES[place // GROUP])],
            written[place],
            [token[0] for token in logprobs[place]],
            rewards[place],
        )
        for place in range(len(BODIES) * GROUP)
    ]
    groups = [titles[start : start + GROUP] for start in range(0, len(titles), GROUP)]
    assert len({len(title.tokens) for title in titles}) > 2
    ours = art_gradient(folder, groups, "ppo", cores)
    assert cosine(ours, seen.gradient) >= SAME
    expected = math.sqrt(GROUP / (GROUP - 1)) / advantages(groups).abs().mean().item()
    expected *= 1 if divided_once else len(BODIES)
    assert norms(ours, seen.gradient) == pytest.approx(expected, rel=1e-3)
