"""What makes a step count, in the order that survives a kill, and what a committed step tells the tracker.

The engine has put the checkpoint's folder in its place; then come the validation titles, the journal's row, and
`cursor.json` in the folder, which is the commit mark. MLflow is told after that, and told again on resume: it
leaves alone what it has.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.engines.checkpoints import commit_checkpoint, complete_steps, prune
from tasks.engines.contract import Progress, RunTracker, TrainingRequest, TrainingResult
from tasks.engines.journal import first_collapse
from tasks.engines.resume import adapter_folder, checkpoints_folder, journal_of
from tasks.engines.training_state import TrainingState
from tasks.titles import metric_names as names
from tasks.titles.errors import CheckpointError, DataError
from tasks.titles.group_statistics import JUDGE_NOISE, has_collapsed
from tasks.titles.rollout import RolloutGroup
from tasks.titles.rollout_metrics import rewards_of
from tasks.titles.run_directory import write_json

logger = logging.getLogger(__name__)

VALIDATION, ROLLOUTS = "validation", "rollouts"
"""Folders of the run's titles, and what their tables are called in MLflow."""


class Ledger:
    """Commits the steps of one sitting of a training."""

    def __init__(self, request: TrainingRequest, state: TrainingState) -> None:
        """`state` is the one after the last committed step, or the first state of a fresh run."""
        self.state = state
        self._profile, self._run_dir = request.profile, request.run_dir
        self._journal = journal_of(request.run_dir)
        self.rows = self._journal.rows()
        self._seconds_before, self._started = state.seconds, time.monotonic()

    def commit(
        self,
        state: TrainingState,
        metrics: Mapping[str, float],
        titles: Sequence[Mapping[str, Any]] = (),
        groups: Sequence[RolloutGroup] = (),
    ) -> None:
        """Make the step of `state.cursor` count.

        `titles` are those of its validation, where it had one; with them go the titles of `groups`, which the step
        was trained on.
        """
        step = state.cursor.step
        seconds = self._seconds_before + time.monotonic() - self._started
        row = {**metrics, names.TIME_ELAPSED: seconds}
        if step > 0:
            row[names.TRAIN_COLLAPSED] = self._watch_for_collapse(step, metrics[names.TRAIN_REWARD])
        validated = metrics.get(names.VAL_REWARD_MEAN, -math.inf)
        # Of checkpoints that the judges cannot tell apart, the earliest stays the best.
        if validated > state.best_reward + JUDGE_NOISE:
            state = replace(state, best_step=step, best_reward=validated)
        state = replace(state, seconds=seconds)
        if titles:
            write_json(_titles_file(self._run_dir, VALIDATION, step), list(titles))
            write_json(_titles_file(self._run_dir, ROLLOUTS, step), rollout_rows(groups, step))
        self._journal.append(step, row)
        commit_checkpoint(adapter_folder(self._run_dir, self._profile.engine, step), state.to_json())
        self.state, self.rows[step] = state, row
        logger.info("Step %d of %d: %s", step, self._profile.max_steps, _rewards(row))

    def prune(self) -> set[int]:
        """Remove checkpoints, but for 0, the best and the newest ones; return the steps that are kept."""
        folder = checkpoints_folder(self._run_dir, self._profile.engine)
        keep = {0, self.state.best_step, *complete_steps(folder)[-self._profile.keep_checkpoints :]}
        prune(folder, keep)
        return keep

    def _watch_for_collapse(self, step: int, reward: float) -> float:
        rewards = [self.rows[at][names.TRAIN_REWARD] for at in sorted(self.rows) if at > 0] + [reward]
        if not has_collapsed(rewards, self._profile.groups_per_step):
            return 0.0
        logger.warning(
            "Step %d: the training reward of the last steps is under half of the first steps'. The learning rate (%g) "
            "is probably too high: the policy has collapsed, and the best checkpoint lies before.",
            step,
            getattr(self._profile.learning_rate, self._profile.engine),
        )
        return 1.0


def check_start(request: TrainingRequest, state: TrainingState | None, tracker: RunTracker) -> None:
    """Check that a sitting may begin from `state`, None for a fresh run.

    Raises `CheckpointError` for a tracker of another MLflow run than the one to be continued, and `DataError`
    without stories.
    """
    if state is not None and state.mlflow_run_id != tracker.run_id:
        raise CheckpointError(
            f"This run continues MLflow run {state.mlflow_run_id}, but the tracker was opened for {tracker.run_id}. "
            "Open it with the stored id (`resume.stored_state`)."
        )
    if not request.train or not request.val:
        raise DataError(
            f"Training needs stories: got {len(request.train)} for training, {len(request.val)} to validate."
        )


def validation_rows(groups: Sequence[RolloutGroup], step: int) -> list[dict[str, Any]]:
    """Return a validation's titles as rows for a table."""
    return [
        {
            "step": step,
            "story_id": rollout.story_id,
            "human_title": group.prompt.story.title,
            "title": rollout.title,
            "reward": rollout.reward,
            "score": rollout.score,
            "verdict": rollout.verdict,
            "length": rollout.length,
        }
        for group in groups
        for rollout in group.rollouts
    ]


def rollout_rows(groups: Sequence[RolloutGroup], step: int) -> list[dict[str, Any]]:
    """Return a step's training titles as rows for a table; `advantage` is reward minus the group's mean."""
    return [
        {
            "step": step,
            "story_id": rollout.story_id,
            "title": rollout.title,
            "reward": rollout.reward,
            "score": rollout.score,
            "verdict": rollout.verdict,
            "advantage": rollout.reward - statistics.fmean(rewards_of(group)),
        }
        for group in groups
        for rollout in group.rollouts
    ]


def tell(request: TrainingRequest, tracker: RunTracker, step: int, metrics: Mapping[str, float]) -> Progress:
    """Hand a committed step to the tracker: its metrics, and its titles and checkpoint where it was validated.

    Returns what a watcher is to see of it.
    """
    tracker.log_metrics(step, metrics)
    titles: list[dict[str, Any]] = []
    if names.VAL_REWARD_MEAN in metrics:
        titles = _read_titles(request.run_dir, VALIDATION, step)
        tracker.log_titles(f"{VALIDATION}-{step:04d}", titles)
        tracker.log_titles(f"{ROLLOUTS}-{step:04d}", _read_titles(request.run_dir, ROLLOUTS, step))
        engine = request.profile.engine
        if step in complete_steps(checkpoints_folder(request.run_dir, engine)):
            tracker.log_checkpoint(step, adapter_folder(request.run_dir, engine, step), metrics)
    return Progress(step, request.profile.max_steps, metrics, tuple(titles))


def tell_all(request: TrainingRequest, tracker: RunTracker) -> None:
    """Tell the tracker everything that is committed."""
    for step, metrics in sorted(journal_of(request.run_dir).rows().items()):
        tell(request, tracker, step, metrics)


def finish(request: TrainingRequest, tracker: RunTracker, state: TrainingState) -> TrainingResult:
    """Hand the kept checkpoints that were never validated to the tracker, too, and return the training's result."""
    engine = request.profile.engine
    rows = journal_of(request.run_dir).rows()
    steps = complete_steps(checkpoints_folder(request.run_dir, engine))
    checkpoints = {step: adapter_folder(request.run_dir, engine, step) for step in steps}
    for step, folder in checkpoints.items():
        tracker.log_checkpoint(step, folder, rows[step])
    return TrainingResult(
        engine=engine,
        steps=state.cursor.step,
        best_step=state.best_step,
        checkpoints=checkpoints,
        seconds=state.seconds,
        trajectories_dropped=state.trajectories_dropped,
        collapsed_at=first_collapse(rows),
    )


def _titles_file(run_dir: Path, kind: str, step: int) -> Path:
    return run_dir / kind / f"{step:04d}.json"


def _read_titles(run_dir: Path, kind: str, step: int) -> list[dict[str, Any]]:
    file = _titles_file(run_dir, kind, step)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def _rewards(row: Mapping[str, float]) -> str:
    words = {names.TRAIN_REWARD: "training", names.VAL_REWARD_MEAN: "validation"}
    return ", ".join(f"{word} reward {row[name]:.3f}" for name, word in words.items() if name in row)
