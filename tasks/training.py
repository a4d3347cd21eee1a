"""Training as a Prefect task."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.engines import art_loop
from tasks.engines.art_session import open_session
from tasks.engines.contract import (
    GroupMapper,
    Progress,
    ProgressListener,
    RunTracker,
    TrainingRequest,
    TrainingResult,
)
from tasks.engines.journal import first_collapse
from tasks.engines.resume import adapter_folder, journal_of, stored_state
from tasks.engines.trl_engine.launch import train as train_with_trl
from tasks.rollouts import map_groups, mapped_on_dask
from tasks.starter.paths import BASE_MODEL, resolve
from tasks.titles.config import Profile, Settings
from tasks.titles.errors import CheckpointError
from tasks.titles.metric_names import TRAIN_REWARD, VAL_REWARD_MEAN
from tasks.titles.prepare import PreparedPrompts
from tasks.titles.run_directory import RunDirectory
from tasks.titles.summary import TrainingFacts


def base_model_of(profile: Profile) -> str:
    """Return the base model's folder or hub name."""
    return resolve(profile.base_model, BASE_MODEL)


def training_request(
    run: RunDirectory, prompts: PreparedPrompts, reward_model_url: str, settings: Settings
) -> TrainingRequest:
    """Return what an engine needs for this run."""
    key = settings.reward_model_api_key
    return TrainingRequest(
        profile=run.profile,
        run_name=run.name,
        run_dir=run.path,
        base_model=base_model_of(run.profile),
        train=prompts.train,
        val=prompts.val,
        reward_model_url=reward_model_url,
        reward_model_api_key=key.get_secret_value() if key else None,
    )


# Never retried: a training that stops continues from its last checkpoint when the same command is given again.
@task(name="train policy", cache_policy=NO_CACHE, persist_result=False, retries=0)
async def train_policy(
    request: TrainingRequest, *, tracker: RunTracker, on_progress: ProgressListener, dask_address: str | None = None
) -> TrainingResult:
    """Train to `max_steps` with the profile's engine, from the last complete checkpoint on where there is one.

    ART's rollouts are task runs on the Dask cluster at `dask_address` where it is given.
    """
    if request.profile.engine == "trl":
        result = await train_with_trl(request, tracker=tracker, on_progress=on_progress)
    else:
        async with open_session(request) as (session, state):
            with group_mapper(request.profile, dask_address) as mapper:
                result = await art_loop.train(
                    request, session=session, state=state, tracker=tracker, map_groups=mapper, on_progress=on_progress
                )
    get_run_logger().info(
        "%d steps in %.0f s, best checkpoint %d, %d trajectories dropped",
        result.steps,
        result.seconds,
        result.best_step,
        result.trajectories_dropped,
    )
    return result


def group_mapper(profile: Profile, dask_address: str | None) -> AbstractContextManager[GroupMapper]:
    """Return what runs a step's rollouts, while the context is open."""
    if not profile.prefect_rollouts:
        return nullcontext(art_loop.map_plainly)
    return mapped_on_dask(dask_address) if dask_address else nullcontext(map_groups)


def describe_step(progress: Progress) -> str:
    """Return a step's rewards in a few words."""
    words = {TRAIN_REWARD: "reward", VAL_REWARD_MEAN: "validation"}
    return ", ".join(f"{word} {progress.metrics[name]:.2f}" for name, word in words.items() if name in progress.metrics)


def training_facts(run: RunDirectory) -> TrainingFacts:
    """Return what a run's last complete checkpoint and its journal say of its training.

    Raises `CheckpointError` where it has no complete checkpoint.
    """
    state = stored_state(run.path, run.profile.engine)
    if state is None:
        raise CheckpointError(f"Run '{run.name}' has no complete checkpoint. Train it with: hn-titles train")
    return TrainingFacts(
        engine=run.profile.engine,
        steps=state.cursor.step,
        best_step=state.best_step,
        seconds=state.seconds,
        trajectories_dropped=state.trajectories_dropped,
        collapsed_at=first_collapse(journal_of(run.path).rows()),
        mlflow_run_id=state.mlflow_run_id,
    )


def checkpoint_folders(run: RunDirectory, training: TrainingFacts) -> dict[str, Path]:
    """Return the folders of a run's best and last checkpoint; the last is left out where it is the best one."""
    steps = {"best": training.best_step, "last": training.steps}
    if training.steps == training.best_step:
        del steps["last"]
    return {name: adapter_folder(run.path, run.profile.engine, step) for name, step in steps.items()}
