"""Training with ART, the loop in the open.

Draw a batch of stories, roll out a group of titles for each, hand the groups that have a spread of
rewards to the trainer, check that server and trainer agree on the new weights, validate where it is due,
and commit the step. `art_resume` tells how a killed run continues.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from reward_server.client import RewardClient
from tasks.engines.art_resume import adapter_folder, checkpoints_folder, journal_of
from tasks.engines.art_session import ArtSession
from tasks.engines.checkpoints import commit_checkpoint, complete_steps, prune
from tasks.engines.contract import (
    GroupMapper,
    GroupRollout,
    Progress,
    ProgressListener,
    RunTracker,
    TrainingRequest,
    TrainingResult,
)
from tasks.engines.journal import first_collapse
from tasks.engines.training_state import TrainingState, first_state
from tasks.titles import metric_names as names
from tasks.titles.errors import CheckpointError, DataError, NothingToTrainOn
from tasks.titles.group_statistics import JUDGE_NOISE, count_groups, has_collapsed
from tasks.titles.rollout import Roller, RolloutGroup, Sampling, check_failures
from tasks.titles.rollout_metrics import rewards_of, tokens_of, train_metrics, trainable, val_metrics
from tasks.titles.run_directory import write_json
from tasks.titles.story import Prompt
from tasks.titles.together import together

logger = logging.getLogger(__name__)

ENGINE = "art"
# ART's own names of what its trainer measures, and this project's.
TRAINER_METRICS = {
    "loss/train": names.TRAIN_LOSS,
    "loss/entropy": names.TRAIN_ENTROPY,
    "loss/grad_norm": names.TRAIN_GRAD_NORM,
    "loss/kl_policy_ref": names.TRAIN_KL,
}


async def map_plainly(rollout: GroupRollout, prompts: Sequence[Prompt], step: int) -> list[Any]:
    """Roll out a step's groups at the same time, without Prefect task runs: a `GroupMapper`."""
    return await together(rollout(prompt) for prompt in prompts)


async def train(
    request: TrainingRequest,
    *,
    session: ArtSession,
    state: TrainingState | None,
    tracker: RunTracker,
    map_groups: GroupMapper = map_plainly,
    on_progress: ProgressListener | None = None,
) -> TrainingResult:
    """Train up to `max_steps`, from `state` on where a run is continued.

    `session` and `state` come from `open_session`. A training that is complete already returns its result from disk.

    Raises `RunStopped` (too many failed trajectories, nothing to train on, sampler and trainer disagree)
    with everything up to the last committed step kept, `DataError` without stories, and `CheckpointError`
    for a tracker of another MLflow run than the one to be continued.
    """
    if state is not None and state.mlflow_run_id != tracker.run_id:
        raise CheckpointError(
            f"This run continues MLflow run {state.mlflow_run_id}, but the tracker was opened for {tracker.run_id}. "
            "Open it with the stored id (`art_resume.stored_state`)."
        )
    if not request.train or not request.val:
        raise DataError(
            f"Training needs stories: got {len(request.train)} for training, {len(request.val)} to validate."
        )
    profile = request.profile
    async with (
        RewardClient(request.reward_model_url, request.reward_model_api_key) as reward_client,
        Roller(
            endpoint=session,
            reward_client=reward_client,
            max_completion_tokens=profile.max_completion_tokens,
            context_tokens=session.context_tokens,
            concurrency=profile.rollout_concurrency,
        ) as roller,
    ):
        training = _Training(request, session, roller, tracker, map_groups, on_progress, state)
        await session.check_canary(training.state.cursor.step)
        if state is None:
            await training.start()
        else:
            training.replay()
        while training.state.cursor.step < profile.max_steps:
            await training.step()
        return training.finish()


class _Training:
    """One sitting of a training."""

    def __init__(
        self,
        request: TrainingRequest,
        session: ArtSession,
        roller: Roller,
        tracker: RunTracker,
        map_groups: GroupMapper,
        on_progress: ProgressListener | None,
        state: TrainingState | None,
    ) -> None:
        self.state = state or first_state(request, tracker.run_id)
        self._request, self._profile = request, request.profile
        self._session, self._roller, self._tracker = session, roller, tracker
        self._map_groups, self._on_progress = map_groups, on_progress
        self._journal = journal_of(request.run_dir)
        self._rows = self._journal.rows()
        self._seconds_before, self._started = self.state.seconds, time.monotonic()

    async def start(self) -> None:
        """Validate the untrained adapter and commit it as checkpoint 0."""
        titles, metrics = await self._validate(0)
        self._commit(self.state, metrics, titles)
        logger.info("Step 0: validation reward %.3f", metrics[names.VAL_REWARD_MEAN])

    def replay(self) -> None:
        """Tell the tracker everything that is committed; it leaves alone what it has."""
        for step in sorted(self._rows):
            self._tell_tracker(step)
        logger.info("Continuing after step %d", self.state.cursor.step)

    async def step(self) -> None:
        """Make one policy update, validate where it is due, and commit."""
        started = time.monotonic()
        groups, empty_batches, state = await self._roll_out()
        rolled_out = time.monotonic()
        step = state.cursor.step
        trainer = await self._session.train(trainable(groups), step=step)
        trained = time.monotonic()
        difference = await self._session.check_canary(step)
        ended = time.monotonic()
        metrics = train_metrics(groups) | {
            own: trainer[theirs] for theirs, own in TRAINER_METRICS.items() if theirs in trainer
        }
        metrics |= {
            names.TRAIN_EMPTY_BATCHES: float(empty_batches),
            names.TIME_ROLLOUT: rolled_out - started,
            names.TIME_TRAIN: trained - rolled_out,
            names.TIME_STEP: ended - started,
            names.THROUGHPUT_TOKENS: tokens_of(groups) / (ended - started),
        }
        if difference is not None:
            metrics[names.CANARY_MAX_DIFFERENCE] = difference
        metrics[names.TRAIN_COLLAPSED] = self._watch_for_collapse(step, metrics[names.TRAIN_REWARD])
        titles: list[dict[str, Any]] = []
        if step % self._profile.eval_steps == 0 or step == self._profile.max_steps:
            titles, validation = await self._validate(step)
            metrics |= validation
        self._commit(state, metrics, titles)
        await self._prune()
        logger.info("Step %d of %d: training reward %.3f", step, self._profile.max_steps, metrics[names.TRAIN_REWARD])

    async def _roll_out(self) -> tuple[list[RolloutGroup], int, TrainingState]:
        """Draw batches until one has something to train on.

        Returns the groups of all of them, how many batches had nothing, and the state after the step. A
        batch without any spread of rewards is no step: the cursor moves on alone.
        """
        state = self.state
        groups: list[RolloutGroup] = []
        for empty_batches in range(self._profile.max_empty_batches):
            sampling = Sampling(
                model=await self._session.model_name(state.cursor.step),
                temperature=self._profile.temperature,
                run_seed=self._profile.seed,
                step=state.cursor.step,
                epoch=state.cursor.epoch,
            )

            roll_out = partial(self._roller.group, sampling=sampling, size=self._profile.group_size)
            prompts, cursor = state.cursor.next_batch(self._request.train, self._profile.groups_per_step)
            batch = await self._map_groups(roll_out, prompts, cursor.step + 1)
            failed = check_failures(batch, self._profile.max_failed_share)
            groups += batch
            state = replace(state, cursor=cursor, trajectories_dropped=state.trajectories_dropped + failed)
            if trainable(batch):
                return groups, empty_batches, replace(state, cursor=cursor.stepped())
            logger.warning("No group of this batch of %d has a spread of rewards; drawing the next", len(batch))
        raise NothingToTrainOn(_why_nothing(groups, self._profile.max_empty_batches))

    async def _validate(self, step: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Write a title per validation story with checkpoint `step`; return the titles and the metrics.

        Titles are sampled as in training, so that their reward is the one that training raises. Every
        checkpoint draws with the same seeds, which leaves less chance in the difference of two checkpoints.
        """
        started = time.monotonic()
        sampling = Sampling(
            model=await self._session.model_name(step),
            temperature=self._profile.temperature,
            run_seed=self._profile.seed,
            step=0,
        )
        groups = await together(self._roller.group(prompt, sampling, 1) for prompt in self._request.val)
        check_failures(groups, self._profile.max_failed_share)
        titles = [
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
        return titles, val_metrics(groups) | {names.TIME_EVAL: time.monotonic() - started}

    def _watch_for_collapse(self, step: int, reward: float) -> float:
        rewards = [self._rows[at][names.TRAIN_REWARD] for at in sorted(self._rows) if at > 0] + [reward]
        if not has_collapsed(rewards, self._profile.groups_per_step):
            return 0.0
        logger.warning(
            "Step %d: the training reward of the last steps is under half of the first steps'. The learning rate (%g) "
            "is probably too high: the policy has collapsed, and the best checkpoint lies before.",
            step,
            self._profile.learning_rate.art,
        )
        return 1.0

    def _commit(self, state: TrainingState, metrics: dict[str, float], titles: Sequence[Mapping[str, Any]]) -> None:
        """Make the step count: titles, then the journal's row, then the checkpoint's mark, then the tracker."""
        step = state.cursor.step
        seconds = self._seconds_before + time.monotonic() - self._started
        validated = metrics.get(names.VAL_REWARD_MEAN, -math.inf)
        # Of checkpoints that the judges cannot tell apart, the earliest stays the best.
        if validated > state.best_reward + JUDGE_NOISE:
            state = replace(state, best_step=step, best_reward=validated)
        state = replace(state, seconds=seconds)
        if titles:
            write_json(_titles_file(self._request.run_dir, step), list(titles))
        self._journal.append(step, metrics)
        commit_checkpoint(adapter_folder(self._request.run_dir, step), state.to_json())
        self.state, self._rows[step] = state, metrics
        self._tell_tracker(step)
        if self._on_progress is not None:
            self._on_progress(Progress(step, self._profile.max_steps, metrics, tuple(titles)))

    def _tell_tracker(self, step: int) -> None:
        """Hand a committed step to the tracker: its metrics, and its titles and checkpoint where it was validated."""
        metrics = self._rows[step]
        self._tracker.log_metrics(step, metrics)
        titles = _titles_file(self._request.run_dir, step)
        if names.VAL_REWARD_MEAN in metrics and titles.exists():
            self._tracker.log_titles(f"validation-{step:04d}", json.loads(titles.read_text(encoding="utf-8")))
            if _is_complete(self._request.run_dir, step):
                self._tracker.log_checkpoint(step, adapter_folder(self._request.run_dir, step), metrics)

    def finish(self) -> TrainingResult:
        """Hand the kept checkpoints that were never validated to the tracker, too, and return the result."""
        folder = checkpoints_folder(self._request.run_dir)
        checkpoints = {step: adapter_folder(self._request.run_dir, step) for step in complete_steps(folder)}
        for step, checkpoint in checkpoints.items():
            self._tracker.log_checkpoint(step, checkpoint, self._rows[step])
        return TrainingResult(
            engine=ENGINE,
            steps=self.state.cursor.step,
            best_step=self.state.best_step,
            checkpoints=checkpoints,
            seconds=self.state.seconds,
            trajectories_dropped=self.state.trajectories_dropped,
            collapsed_at=first_collapse(self._rows),
        )

    async def _prune(self) -> None:
        """Keep checkpoint 0, the best and the newest; the others leave the disk and the server."""
        folder = checkpoints_folder(self._request.run_dir)
        keep = {0, self.state.best_step, *complete_steps(folder)[-self._profile.keep_checkpoints :]}
        prune(folder, keep)
        await self._session.forget(keep)


def _titles_file(run_dir: Path, step: int) -> Path:
    return run_dir / "validation" / f"{step:04d}.json"


def _is_complete(run_dir: Path, step: int) -> bool:
    return step in complete_steps(checkpoints_folder(run_dir))


def _why_nothing(groups: Sequence[RolloutGroup], batches: int) -> str:
    counts = count_groups([rewards_of(group) for group in groups])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    unsupported = sum(not rollout.verdict for rollout in rollouts)
    empty = sum(rollout.empty for rollout in rollouts)
    return (
        f"{batches} batches in a row had nothing to train on: of {counts.submitted} groups {counts.without_spread} had "
        f"rewards that are all alike and {counts.dropped} had fewer than two titles; {unsupported} of "
        f"{len(rollouts)} titles were unsupported, {empty} of them blank. If the titles of a group are all alike or "
        "all unsupported, the base model or the learning rate is at fault; a larger group_size gives more spread, "
        "max_empty_batches more patience."
    )
