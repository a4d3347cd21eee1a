"""Train a reward model: stories with scores in, a registered model and its figures out."""

from __future__ import annotations

from prefect import flow

from flows.form import Day, Epochs, LearningRate, MaxSteps, Overrides, ProfileName, RunName, Stories, filled_in
from flows.progress import tell
from flows.termination import no_sigterm_lost
from tasks.reward_model import label_stories, show_reward_model, store_reward_model, train_classifier
from tasks.reward_training.report import RewardModelReport
from tasks.reward_training.runs import open_reward_run
from tasks.titles.config import Settings, load_profile
from tasks.tracking import flow_run_label, links, peak_memory_of, tracked


@flow(name="train-reward-model", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def train_reward_model(
    profile: ProfileName = "starter",
    overrides: Overrides = None,
    run_name: RunName = None,
    fresh: bool = False,
    stories: Stories = None,
    train_until: Day = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = None,
) -> RewardModelReport:
    """Train a reward model on stories and their scores, and register it in MLflow.

    Args:
        profile: settings to start from
        overrides: other settings that differ from the profile's, each `key=value`
        run_name: run to continue or to start; empty: the newest unfinished run of this very profile, or a new one
        fresh: start a new run even where one could be continued
        stories: 'starter', a .parquet or .jsonl file, or a hub data set's name; empty: the profile's
        train_until: last day of training, all later stories are test; empty: the profile's, or else the source's splits
        epochs: passes over the training stories; empty: the profile's
        max_steps: updates at most; empty: the profile's
        learning_rate: empty: the profile's
    """
    settings = Settings()
    fields = {
        "stories": stories,
        "reward_training.train_until": train_until,
        "reward_training.epochs": epochs,
        "reward_training.max_steps": max_steps,
        "reward_training.learning_rate": learning_rate,
    }
    wanted = load_profile(profile, filled_in(overrides, fields))
    run = open_reward_run(wanted, settings.runs_dir, run_name=run_name, fresh=fresh)
    with run.locked(), tracked(run, settings.tracking_uri, "reward model") as tracker:
        tell("stories", 0)
        labelled = label_stories(run.profile)
        tell("stories", 1, 1, labelled.as_line())
        async with no_sigterm_lost():
            with peak_memory_of(run):
                trained = await train_classifier(run, labelled, tracker, tell)
        report = store_reward_model(run, labelled, trained, tracker)
        await show_reward_model(report, links(run, tracker))
        run.update(state="trained")
    return report
