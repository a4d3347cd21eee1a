"""Training a reward model as Prefect tasks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from reward_server.model_files import ADAPTER_FOLDER
from tasks.engines.tracker import MlflowTracker
from tasks.reward_training.calibration_picture import draw_calibration
from tasks.reward_training.registry import register_model
from tasks.reward_training.report import RewardModelReport, TrainedRewardModel
from tasks.reward_training.runs import model_folder
from tasks.reward_training.stories import LabelledStories, labelled_stories
from tasks.reward_training.trainer import Listener, train_reward_model
from tasks.titles.config import Profile
from tasks.titles.errors import HnTitlesError
from tasks.titles.run_directory import RunDirectory, write_json
from tasks.titles.run_note import run_note
from tasks.titles.sources import load_stories
from tasks.titles.summary import markdown_table


@task(name="label stories", cache_policy=NO_CACHE, persist_result=False)
def label_stories(profile: Profile) -> LabelledStories:
    """Load the stories, and split those that a reward model can learn from."""
    stories = labelled_stories(load_stories(profile.stories), profile.reward_training)
    get_run_logger().info("%s: %s. %s %s", stories.source, stories.as_line(), stories.rule, dict(stories.dropped))
    return stories


# Never retried: a training that stops continues from its last checkpoint when the same command is given again.
@task(name="train reward model", cache_policy=NO_CACHE, persist_result=False, retries=0)
async def train_classifier(
    run: RunDirectory, stories: LabelledStories, tracker: MlflowTracker, on_progress: Listener
) -> TrainedRewardModel:
    """Train to the last step and measure every split; an interruption ends it after the present pass."""
    stop = threading.Event()
    # In a thread: the event loop must hear of an interruption while the model computes.
    training = asyncio.create_task(
        asyncio.to_thread(
            train_reward_model,
            run.path,
            model_folder(run),
            run.profile.reward_training,
            stories,
            seed=run.profile.seed,
            device=run.profile.device,
            metrics=tracker,
            on_progress=on_progress,
            stop=stop,
        )
    )
    try:
        trained = await asyncio.shield(training)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(HnTitlesError):
            await training
        raise
    get_run_logger().info("%d steps, %d bodies cut, dropped: %s", trained.steps, trained.cut, dict(trained.dropped))
    return trained


@task(name="store reward model", cache_policy=NO_CACHE, persist_result=False)
def store_reward_model(
    run: RunDirectory, stories: LabelledStories, trained: TrainedRewardModel, tracker: MlflowTracker
) -> RewardModelReport:
    """Register the model, and write figures and picture into the run's folder and into MLflow."""
    folder = model_folder(run)
    registered = register_model(
        folder,
        name=run.profile.reward_training.registered_name,
        tracking_uri=tracker.tracking_uri,
        run_id=tracker.run_id,
    )
    report = RewardModelReport(run.name, stories, trained, str(folder / ADAPTER_FOLDER), registered)
    picture = run.path / "calibration.png"
    draw_calibration(trained.figures, picture)
    write_json(run.summary_path, report.as_dict())
    for path in (picture, run.summary_path):
        tracker.log_file(path)
    results = [f"Registered as `{registered}`. Figures in log upvotes:", markdown_table(report.rows())]
    tracker.describe(run_note(run, "reward model", results))
    get_run_logger().info("Registered as %s; figures in %s", registered, run.summary_path)
    return report


@task(name="show reward model", cache_policy=NO_CACHE, persist_result=False)
async def show_reward_model(report: RewardModelReport, links: Sequence[str]) -> None:
    """Keep the figures as a Markdown artifact."""
    await acreate_markdown_artifact(
        report.markdown(links), key="reward-model", description=f"Figures of the reward model of {report.run_name}"
    )
