"""One training of a reward model by the project's own trainer, and what it cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from transformers import AutoConfig, AutoTokenizer

from reward_server.encoding import readable_length
from reward_server.model_files import ADAPTER_FOLDER, ModelFiles, find_model
from tasks.reward_training.encoded import EncodedStories, encode_stories
from tasks.reward_training.report import TrainedRewardModel
from tasks.reward_training.stories import LabelledStories
from tasks.reward_training.trainer import total_steps, train_reward_model
from tasks.titles.config import RewardTraining
from tasks.titles.errors import ConfigError
from tasks.titles.peak_memory import PeakMemory
from tasks.titles.story import Split

Progress = Callable[[str, int, int, str], None]
"""Stage, done, total, note."""


@dataclass(frozen=True)
class Cost:
    """What a training took. Its first step, a warm-up, counts in `training_s` alone; padding is in no token."""

    steps: int
    training_s: float
    step_s: float
    """The median."""
    story_tokens: float
    """Mean tokens of a training story."""
    longest_story_tokens: int
    tokens_per_s: float
    bodies_cut: int
    """Training stories whose body lost its end."""
    peak_memory_mb: float
    """In 10⁶ bytes: of the GPU, or of this process on a CPU."""


@dataclass(frozen=True)
class Training:
    """A trained reward model."""

    files: ModelFiles
    trained: TrainedRewardModel
    judged: dict[Split, EncodedStories]
    """The stories that its figures are made of, the longest first."""
    cost: Cost


class _Watch:
    """Shows how far a training is, and takes the time of its steps."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.ends: list[float] = []
        """When training began and when each step ended, in seconds."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "training":
            self.ends.append(time.perf_counter())
        self._progress(stage, done, total, note)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store nothing: the figures of the last step come back from the training."""


def timed_training(
    folder: Path, stories: LabelledStories, settings: RewardTraining, *, seed: int, device: str, progress: Progress
) -> Training:
    """Train a reward model in `folder`, with neither a validation nor a checkpoint between its steps.

    Raises `ConfigError` for settings that make fewer than two steps, and what `train_reward_model` does.
    """
    steps = total_steps(len(stories.by_split["train"]), settings)
    if steps < 2:
        raise ConfigError("The first step is a warm-up and not timed: expected settings that make two steps at least.")
    settings = settings.model_copy(update={"eval_steps": steps + 1, "save_steps": steps + 1})
    watch = _Watch(progress)
    model = folder / "model"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as memory:
        trained = train_reward_model(
            folder,
            model,
            settings,
            stories,
            seed=seed,
            device=device,
            metrics=watch,
            on_progress=watch,
            stop=threading.Event(),
        )
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else memory.megabytes
    files = find_model(str(model / ADAPTER_FOLDER))
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer)
    max_length = readable_length(settings.max_length, tokenizer, AutoConfig.from_pretrained(files.base))
    read = encode_stories(tokenizer, stories.by_split["train"], max_length)
    judged = {
        split: encode_stories(tokenizer, stories.sample(split, settings.report_stories), max_length).by_length()
        for split in stories.by_split
    }
    cost = cost_of(watch.ends, settings, [len(ids) for ids in read.ids], cut=read.cut, peak_memory_mb=peak)
    return Training(files, trained, judged, cost)


def cost_of(
    ends: Sequence[float], settings: RewardTraining, tokens: Sequence[int], *, cut: int, peak_memory_mb: float
) -> Cost:
    """Return what a training took that began, and whose steps ended, at `ends` [s], on stories of `tokens` tokens."""
    step_s = [after - before for before, after in pairwise(ends[1:])]
    an_epoch = total_steps(len(tokens), settings.model_copy(update={"epochs": 1, "max_steps": None}))
    return Cost(
        steps=len(ends) - 1,
        training_s=round(ends[-1] - ends[0], 2),
        step_s=round(median(step_s), 4),
        story_tokens=round(sum(tokens) / len(tokens), 1),
        longest_story_tokens=max(tokens),
        tokens_per_s=round(sum(tokens) / an_epoch * len(step_s) / sum(step_s), 1),
        bodies_cut=cut,
        peak_memory_mb=round(peak_memory_mb, 1),
    )
