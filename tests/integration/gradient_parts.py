"""What the tests of gradients share: titles of a group, ART's packing of them, and the trainer's gradient."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import art
import torch
from art._backend_training import build_rl_train_configs
from art.preprocessing.pack import PackedTensors
from cpu_parts import choice, random_ids

from tasks.engines.art_backend import TitleBackend
from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.cpu.trainer import Trainer
from tasks.starter.paths import BASE_MODEL

UNCLIPPED = CpuSettings(max_grad_norm=1e9)


@dataclass
class Title:
    """One trajectory: its tokens, what the sampler said of them (nats), and its reward."""

    messages: list[dict[str, str]]
    tokens: list[int]
    logprobs: list[float]
    reward: float


def random_title(rng: random.Random, body: str) -> Title:
    """Return a title of random tokens."""
    tokens = [*random_ids(rng, rng.randrange(1, 12)), 2047]
    return Title(
        messages=[{"role": "system", "content": "Write a title."}, {"role": "user", "content": body}],
        tokens=tokens,
        # Far from the policy in both directions, so that ratios lie on both sides of 1 and beyond the clip at 5.
        logprobs=[rng.uniform(-12.0, -2.0) for _ in tokens],
        reward=rng.uniform(-1.0, 3.0),
    )


def random_groups(seed: int, bodies: Sequence[str]) -> list[list[Title]]:
    """Return a group of four random titles for each of `bodies`."""
    rng = random.Random(seed)
    return [[random_title(rng, body) for _ in range(4)] for body in bodies]


def pack(groups: list[list[Title]], path: Path, *, shared: bool = True, length: int = 160) -> PackedTensors:
    """Pack with ART's own code, by way of this project's backend."""
    backend = TitleBackend(path=str(path), seed=1, in_process=True)
    backend._supports_result_packing, backend._packed_sequence_length_requires_chunk_alignment = shared, False
    model = art.TrainableModel(name="run", project="tests", base_model=str(BASE_MODEL))
    backend._image_processors[str(BASE_MODEL)] = None
    packed = backend._get_packed_tensors(
        model,
        [
            art.TrajectoryGroup(
                [
                    art.Trajectory(
                        messages_and_choices=[*title.messages, choice(title.tokens, title.logprobs)],  # type: ignore[list-item]
                        reward=title.reward,
                    )
                    for title in group
                ]
            )
            for group in groups
        ],
        advantage_balance=0.0,
        allow_training_without_logprobs=False,
        scale_rewards=True,
        plot_tensors=False,
        packed_sequence_length=length,
        logprob_calculation_chunk_size=1024,
    )
    assert packed is not None
    return packed


def train(
    trainer: Trainer, packed: PackedTensors, *, learning_rate: float = 0.0, **options: Any
) -> list[dict[str, float]]:
    """Train on `packed` and return each update's metrics; `options` are those of `backend.train`."""
    return list(trainer.train(packed, *build_rl_train_configs(learning_rate=learning_rate, **options)))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the last update's gradient of each weight of the adapter."""
    return {name: weight.grad.clone() for name, weight in trainer._trained.items() if weight.grad is not None}
