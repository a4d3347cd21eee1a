"""What the tests of reward model training share: a few starter stories, small settings and one training of them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tasks.reward_training.report import TrainedRewardModel
from tasks.reward_training.runs import model_folder, open_reward_run
from tasks.reward_training.stories import LabelledStories, labelled_stories
from tasks.reward_training.trainer import train_reward_model
from tasks.starter.world import generate_stories
from tasks.titles.config import load_profile
from tasks.titles.run_directory import RunDirectory
from tasks.titles.sources import load_stories
from tasks.tracking import tracked

SPLITS = {"train": 18, "val": 3, "test": 5}
# Five passes over 18 stories make an epoch, so that 7 steps end in the second one.
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "epochs": 2,
    "max_steps": 7,
    "eval_batch_size": 2,
    "eval_steps": 3,
    "save_steps": 2,
    "report_stories": 12,
    "learning_rate": 3e-3,
    "registered_name": "tests-reward-model",
}


@dataclass(frozen=True)
class FinishedTraining:
    """A training without any interruption."""

    run: RunDirectory
    steps: int
    told: list[tuple[str, int, int]]
    """Stage, done, total: its progress."""


def write_stories(path: Path) -> Path:
    """Write starter stories with splits of the tests' own."""
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    rows = [
        {**asdict(story), "split": split} for story, split in zip(generate_stories(len(splits)), splits, strict=True)
    ]
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
    return path


def overrides(stories: Path, **changes: Any) -> list[str]:
    """Return the settings as a command line gives them."""
    settings = [f"reward_training.{key}={json.dumps(value)}" for key, value in {**SETTINGS, **changes}.items()]
    return [f"stories={stories}", *settings]


def reward_run(folder: Path, **changes: Any) -> RunDirectory:
    """Return the run `it` in `folder`, with `stories.jsonl` beside it as its stories."""
    stories = folder / "stories.jsonl"
    if not stories.exists():
        write_stories(stories)
    return open_reward_run(load_profile("starter", overrides(stories, **changes)), folder, run_name="it")


def stories_of(run: RunDirectory) -> LabelledStories:
    return labelled_stories(load_stories(run.profile.stories), run.profile.reward_training)


def train(
    run: RunDirectory, on_progress: Any = lambda *_: None, stop: threading.Event | None = None
) -> TrainedRewardModel:
    """Train as the flow does, from where the run stands to its end."""
    with tracked(run, f"sqlite:///{run.path.parent.parent}/mlflow.db") as tracker:
        return train_reward_model(
            run.path,
            model_folder(run),
            run.profile.reward_training,
            stories_of(run),
            seed=run.profile.seed,
            device="cpu",
            metrics=tracker,
            on_progress=on_progress,
            stop=stop or threading.Event(),
        )


def history(run: RunDirectory) -> dict[str, dict[int, float]]:
    """Return the metrics that MLflow holds of a run; a step that is there twice is an error."""
    client = MlflowClient(f"sqlite:///{run.path.parent.parent}/mlflow.db")
    run_id = run.record().mlflow_run_id
    assert run_id is not None
    series = {}
    for name in client.get_run(run_id).data.metrics:
        rows = client.get_metric_history(run_id, name)
        assert max(Counter(row.step for row in rows).values()) == 1, name
        series[name] = {row.step: row.value for row in rows}
    return series
