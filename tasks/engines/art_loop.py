"""Training with ART, the loop in the open.

Draw a batch of stories, roll out a group of titles for each, hand the groups that have a spread of
rewards to the trainer, check that server and trainer agree on the new weights, validate where it is due,
and commit the step. `resume` tells how a killed run continues.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from reward_server.client import RewardClient
from tasks.engines.art_session import ArtSession
from tasks.engines.contract import (
    GroupMapper,
    GroupRollout,
    ProgressListener,
    RunTracker,
    TrainingRequest,
    TrainingResult,
)
from tasks.engines.ledger import Ledger, check_start, finish, tell, tell_all, validation_rows
from tasks.engines.training_state import TrainingState, first_state
from tasks.titles import metric_names as names
from tasks.titles.cursor import VALIDATION_STEP
from tasks.titles.errors import NothingToTrainOn
from tasks.titles.rollout import GroupRoller, Roller, RolloutGroup, Sampling, check_failures
from tasks.titles.rollout_metrics import tokens_of, train_metrics, trainable, val_metrics, why_nothing
from tasks.titles.story import Prompt
from tasks.titles.together import together

logger = logging.getLogger(__name__)

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
    check_start(request, state, tracker)
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
            tell_all(request, tracker)
            logger.info("Continuing after step %d", state.cursor.step)
        # What is loaded by now stays: the garbage collector would look through all of it again every few steps, which
        # takes half a second.
        gc.collect()
        gc.freeze()
        try:
            while training.state.cursor.step < profile.max_steps:
                await training.step()
        finally:
            gc.unfreeze()
    return finish(request, tracker, training.state)


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
        self._ledger = Ledger(request, state or first_state(request, tracker.run_id))
        self._request, self._profile = request, request.profile
        self._session, self._roller, self._tracker = session, roller, tracker
        self._map_groups, self._on_progress = map_groups, on_progress

    @property
    def state(self) -> TrainingState:
        """The state after the last committed step."""
        return self._ledger.state

    async def start(self) -> None:
        """Validate the untrained adapter and commit it as checkpoint 0."""
        groups, metrics = await self._validate(0)
        self._commit(self.state, metrics, validation_rows(groups, 0))

    async def step(self) -> None:
        """Make one policy update, validate where it is due, and commit."""
        started = time.monotonic()
        rolled = await self._roll_out()
        rolled_out = time.monotonic()
        step = rolled.state.cursor.step
        trainer = await self._session.train(trainable(rolled.groups), step=step)
        trained = time.monotonic()
        canary = await self._session.check_canary(step)
        ended = time.monotonic()
        metrics = train_metrics(rolled.groups) | {
            own: trainer[theirs] for theirs, own in TRAINER_METRICS.items() if theirs in trainer
        }
        metrics |= {name: trainer[name] for name in names.GPU_TRAINING_TIMES if name in trainer}
        metrics |= {
            names.TRAIN_EMPTY_BATCHES: float(rolled.empty_batches),
            names.TIME_ROLLOUT: rolled_out - started,
            names.TIME_JUDGE: rolled.judge_seconds,
            names.TIME_TRAIN: trained - rolled_out,
            names.TIME_STEP: ended - started,
            names.THROUGHPUT_TOKENS: tokens_of(rolled.groups) / (ended - started),
        }
        metrics |= canary.metrics()
        titles: list[dict[str, Any]] = []
        if self._profile.validates(step):
            validated, validation = await self._validate(step)
            metrics |= validation
            titles = validation_rows(validated, step)
        self._commit(rolled.state, metrics, titles, rolled.groups)
        await self._session.forget(self._ledger.prune())

    async def _roll_out(self) -> _RolledOut:
        """Draw batches until one has something to train on.

        A batch without any spread of rewards is no step: the cursor moves on alone.
        """
        state = self.state
        groups: list[RolloutGroup] = []
        judge_seconds = 0.0
        for empty_batches in range(self._profile.max_empty_batches):
            sampling = Sampling(
                model=await self._session.model_name(state.cursor.step),
                temperature=self._profile.temperature,
                run_seed=self._profile.seed,
                step=state.cursor.step,
                epoch=state.cursor.epoch,
            )
            roll_out = GroupRoller(self._roller, sampling, self._profile.group_size)
            prompts, cursor = state.cursor.next_batch(self._request.train, self._profile.groups_per_step)
            batch = await self._map_groups(roll_out, prompts, cursor.step + 1)
            failed = check_failures(batch, self._profile.max_failed_share)
            judge_seconds += max(0.0, time.time() - max(title.written for group in batch for title in group.rollouts))
            groups += batch
            state = replace(state, cursor=cursor, trajectories_dropped=state.trajectories_dropped + failed)
            if trainable(batch):
                return _RolledOut(groups, empty_batches, judge_seconds, replace(state, cursor=cursor.stepped()))
            logger.warning("No group of this batch of %d has a spread of rewards; drawing the next", len(batch))
        raise NothingToTrainOn(why_nothing(groups, self._profile.max_empty_batches))

    async def _validate(self, step: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        """Write a title per validation story with checkpoint `step`; return the groups and the metrics.

        Titles are sampled as in training, so that their reward is the one that training raises. Every
        checkpoint draws with the same seeds, which leaves less chance in the difference of two checkpoints.
        """
        started = time.monotonic()
        sampling = Sampling(
            model=await self._session.model_name(step),
            temperature=self._profile.temperature,
            run_seed=self._profile.seed,
            step=VALIDATION_STEP,
        )
        groups = await together(self._roller.group(prompt, sampling, 1) for prompt in self._request.val)
        check_failures(groups, self._profile.max_failed_share)
        return groups, val_metrics(groups) | {names.TIME_EVAL: time.monotonic() - started}

    def _commit(
        self,
        state: TrainingState,
        metrics: dict[str, float],
        titles: list[dict[str, Any]],
        groups: Sequence[RolloutGroup] = (),
    ) -> None:
        self._ledger.commit(state, metrics, titles, groups)
        step = state.cursor.step
        progress = tell(self._request, self._tracker, step, self._ledger.rows[step])
        if self._on_progress is not None:
            self._on_progress(progress)


@dataclass(frozen=True)
class _RolledOut:
    """What a step trains on."""

    groups: list[RolloutGroup]
    """Of all batches that were drawn for it."""
    empty_batches: int
    judge_seconds: float
    """In which titles were judged and none was written."""
    state: TrainingState
    """After the step."""
