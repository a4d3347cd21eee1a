"""Train a reward model: stories with scores in, a registered model and its figures out."""

from __future__ import annotations

from prefect import flow

from flows.progress import tell
from tasks.reward_model import label_stories, show_reward_model, store_reward_model, train_classifier
from tasks.reward_training.report import RewardModelReport
from tasks.reward_training.runs import open_reward_run
from tasks.titles.config import Settings, load_profile
from tasks.tracking import flow_run_label, links, peak_memory_of, tracked


@flow(name="train-reward-model", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def train_reward_model(
    profile: str = "starter", overrides: list[str] | None = None, run_name: str | None = None, fresh: bool = False
) -> RewardModelReport:
    """Train a reward model on stories and their scores, and register it in MLflow.

    Args:
        profile: name of a profile, or path of a .toml file
        overrides: settings that differ from the profile's, each `key=value`
        run_name: run to continue or to start; empty: the newest unfinished run of this very profile, or a new one
        fresh: start a new run even where one could be continued
    """
    settings = Settings()
    run = open_reward_run(load_profile(profile, overrides or []), settings.runs_dir, run_name=run_name, fresh=fresh)
    with run.locked(), tracked(run, settings.tracking_uri) as tracker:
        tell("stories", 0)
        stories = label_stories(run.profile)
        tell("stories", 1, 1, stories.as_line())
        with peak_memory_of(run):
            trained = await train_classifier(run, stories, tracker, tell)
        report = store_reward_model(run, stories, trained, tracker)
        await show_reward_model(report, links(run, tracker))
        run.update(state="trained")
    return report
